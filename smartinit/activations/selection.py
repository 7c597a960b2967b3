"""How each target's input becomes rows: the default masks, all rows, or the caller's function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from smartinit.activations.rows import (
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from smartinit.errors import UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from smartinit.activations.rows import (
        PrepareLayerInputs,
        PrepareModelInputs,
    )


_CROSS_ATTENTION = frozenset({"EncDecAttention", "encoder_attn", "crossattention", "cross_attn"})
_KEYS_AND_VALUES = frozenset({"k", "v", "k_proj", "v_proj", "key", "value"})


class HookTarget(Protocol):
    """What capture needs to know of a target."""

    @property
    def name(self) -> str:
        """Its name in the base model."""
        ...

    @property
    def path(self) -> str:
        """Its name in the model that is run."""
        ...

    @property
    def module(self) -> nn.Module:
        """The module whose input is read."""
        ...

    @property
    def in_features(self) -> int:
        """Last dimension of its input."""
        ...

    @property
    def counts(self) -> bool:
        """Whether what this process sees of its input is nothing that another one has seen as well."""
        ...


def row_selectors(
    targets: Sequence[HookTarget],
    prepare: PrepareLayerInputs | Mapping[str, PrepareLayerInputs] | None,
    prepare_model: PrepareModelInputs | None,
) -> dict[str, PrepareLayerInputs | str | None]:
    """Per target: a callable, ``"masked"`` (the default rows), or None (all rows). The mapping is only read."""
    if isinstance(prepare, Mapping):
        names = {key: target.name for target in targets for key in (target.name, target.path)}
        unknown = [key for key in prepare if key not in names]
        if unknown:
            msg = (
                f"prepare_layer_inputs_fn is a mapping, but no target is called {unknown}; "
                f"targets are, for instance, {[t.path for t in targets[:3]]}"
            )
            raise UnknownMappingKeyError(msg)
        given = {names[key]: function for key, function in prepare.items()}
    else:
        given = {target.name: prepare for target in targets if prepare is not None}
    default = prepare_layer_inputs_fn_language_modeling
    masked = prepare_model is prepare_model_inputs_fn_language_modeling or prepare_model is None
    out: dict[str, PrepareLayerInputs | str | None] = {}
    for target in targets:
        function = given.get(target.name)
        out[target.name] = "masked" if function is default and masked else function
    return out


class UnknownMappingKeyError(UnknownNameError, ValueError):
    """A mapping with a module name that is no target (PEFT raises ValueError here)."""


def reads_decoder(path: str) -> bool:
    """Whether a target of an encoder-decoder model reads the decoder's tokens, by the names that such models use.

    Only asked where both sequences have one length, so that the shape does not tell. Keys and values of
    cross-attention read the encoder's.
    """
    parts = path.split(".")
    crosses = any(part in _CROSS_ATTENTION for part in parts) and parts[-1] in _KEYS_AND_VALUES
    return "decoder" in parts and not crosses
