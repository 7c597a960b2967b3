"""Blocks of a model used several times, each with adapters of its own: ``layer_replication``.

``[(0, 4), (2, 5)]`` makes of the blocks 0 1 2 3 4 the line 0 1 2 3 2 3 4 (PEFT's option of the same name; depth
up-scaling as in SOLAR, arXiv 2312.15166). Every place in the line is a module of its own, around which adapters can be
put, but the parameters in them are those of the original block: no weight is copied.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from smartinit.config import LoraConfig

# Under which names models keep their list of blocks: Llama and most others, BERT, GPT-2 and Falcon.
_LISTS = ("layers", "encoder.layer", "h")
# Under which names a model with a head, or one of images and text, keeps the model with the blocks.
_INNER = ("model", "language_model", "bert", "transformer")
_DEPTH = 8
_PAIR = 2


def replicate_layers(root: nn.Module, spans: Sequence[tuple[int, int]]) -> Callable[[], None]:
    """Replace a model's list of blocks by copies that share the weights.

    Every place in the new line is numbered anew (``layer_idx``, by which attention finds its part of the key-value
    cache); the model's configuration gets the new ``num_hidden_layers``, and per-layer lists such as ``layer_types``
    follow the blocks. (PEFT 0.21.2 leaves those lists, and models that read them fail.)

    Args:
        root: the model.
        spans: ``(first, end)`` of the blocks to line up, as in PEFT; ``end`` is not included.

    Returns:
        What undoes it: the original list, which was not touched, and the configuration as it was.

    Raises:
        ConfigError: no list of blocks was found, or a span is outside of it; the model is then as it was.

    Cost: O(number of modules in the new blocks); no weight is copied.
    """
    owner, attribute, blocks = _find_blocks(root)
    order = _order(spans, len(blocks))
    line = nn.ModuleList(_sharing(blocks[index], place) for place, index in enumerate(order))
    line.training = blocks.training
    config = getattr(owner, "config", None) or getattr(root, "config", None)
    undo = _Undo(owner, attribute, blocks, config, _renumber(config, order, len(blocks)), owner.training)
    setattr(owner, attribute, line)
    return undo


def replication_of(configs: Iterable[LoraConfig]) -> list[tuple[int, int]] | None:
    """How the blocks of a model with these adapters are lined up; None if as they were."""
    return next((config.layer_replication for config in configs if config.layer_replication), None)


def require_same_replication(config: LoraConfig, configs: Iterable[LoraConfig]) -> None:
    """Give a further adapter's configuration the replication that the model already has.

    Raises:
        ConfigError: it asks for another one.
    """
    here = replication_of(configs)
    wanted = config.layer_replication
    if wanted and list(map(tuple, wanted)) != list(map(tuple, here or ())):
        raise ConfigError(
            f"layer_replication={wanted!r} changes the model's layers, so only its first adapter can bring it; this "
            f"model has {here!r}"
        )
    config.layer_replication = here


@dataclass(frozen=True, eq=False)
class _Undo:
    """Puts the original blocks back. A value and not a closure, so that a deep copy of a model undoes its own."""

    owner: nn.Module
    attribute: str
    blocks: nn.ModuleList
    config: Any
    said: dict[str, Any]
    training: bool

    def __call__(self) -> None:
        setattr(self.owner, self.attribute, self.blocks)
        for name, value in self.said.items():
            setattr(self.config, name, value)
        if self.owner.training != self.training:  # someone has called train() or eval() meanwhile
            self.blocks.train(self.owner.training)


def _find_blocks(root: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that holds the list of blocks, the list's name there, and the list."""
    module = root
    for _ in range(_DEPTH):
        prefix = getattr(module, "base_model_prefix", None)  # transformers' own word for it
        names = [*_INNER, prefix] if isinstance(prefix, str) and prefix else _INNER
        inner = next((child for name in names if isinstance(child := module._modules.get(name), nn.Module)), None)  # noqa: SLF001 - getattr would ask wrappers
        if inner is None:
            break
        module = inner
    for path in _LISTS:
        parent, _, attribute = path.rpartition(".")
        owner = module._modules.get(parent) if parent else module  # noqa: SLF001
        found = owner._modules.get(attribute) if owner is not None else None  # noqa: SLF001
        if owner is not None and isinstance(found, nn.ModuleList):
            return owner, attribute, found
    raise ConfigError(
        f"layer_replication: no list of blocks was found in a {type(root).__name__}; looked for "
        f"{', '.join(map(repr, _LISTS))} in its {type(module).__name__}, as Llama, BERT, GPT-2 and Falcon have them"
    )


def _order(spans: Sequence[object], blocks: int) -> list[int]:
    """Which block stands at each place."""
    order: list[int] = []
    for span in spans:
        pair = list(span) if isinstance(span, (list, tuple)) else []
        fits = len(pair) == _PAIR and all(isinstance(end, int) for end in pair) and 0 <= pair[0] < pair[1] <= blocks
        if not fits:
            raise ConfigError(
                f"layer_replication: {span!r} is no span (first, end) of the model's {blocks} blocks, which are "
                f"numbered 0 to {blocks - 1}; end is not included"
            )
        order += range(pair[0], pair[1])
    return order


def _sharing(block: nn.Module, place: int) -> nn.Module:
    """A copy of a block with the same parameters, numbered by its place."""
    memo: dict[int, Any] = {}
    for module in block.modules():
        kept: list[torch.Tensor] = [tensor for tensor in module._parameters.values() if tensor is not None]  # noqa: SLF001 - own ones only
        # Quantised weights are buffers; what is not saved may be a place's own (caches).
        kept += [
            tensor
            for name, tensor in module._buffers.items()  # noqa: SLF001
            if tensor is not None and name not in module._non_persistent_buffers_set  # noqa: SLF001
        ]
        memo |= {id(tensor): tensor for tensor in kept}
        config = vars(module).get("config")
        if config is not None:  # the whole model's, which may be changed later
            memo[id(config)] = config
    clone = copy.deepcopy(block, memo)
    for module in clone.modules():
        if "layer_idx" in vars(module):
            vars(module)["layer_idx"] = place
    return clone


def _renumber(config: Any, order: Sequence[int], blocks: int) -> dict[str, Any]:  # noqa: ANN401 - any configuration
    """Bring a model's configuration into line with its blocks; returns what it said before."""
    if not hasattr(config, "num_hidden_layers"):
        return {}
    before = {"num_hidden_layers": config.num_hidden_layers}
    per_layer = {
        name: value
        for name, value in vars(config).items()
        if name.endswith("layer_types") and isinstance(value, list) and len(value) == blocks
    }
    config.num_hidden_layers = len(order)
    for name, value in per_layer.items():
        setattr(config, name, [value[index] for index in order])
    return before | per_layer
