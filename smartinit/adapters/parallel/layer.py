"""A layer of Megatron (or of PyTorch's own tensor parallelism) with an adapter beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smartinit.adapters.parallel.call import called, counts_of, with_input_first
from smartinit.adapters.parallel.placed import check_whole, within
from smartinit.errors import ModelError

if TYPE_CHECKING:
    from smartinit.adapters.parallel.base import ParallelBase

# Transformer Engine's layers with a norm in front: what the adapter multiplies is the norm's output.
_NORM_OUTPUT = "return_layernorm_output"


class AdaptedLayer(nn.Module):
    """Stands where ``to_wrap`` stood. Attributes that it does not have are those of the base layer.

    The keys of the base layer in state dicts stay what they were; the adapter's are ``<name>.adapter.…``: a checkpoint
    of the base model loads into the adapted one (``strict=False``), and the state dict of one into the other. While the
    adapter is merged, the state dict is that of a plain layer with the merged weight, and none can be loaded.

    Args:
        to_wrap: the layer as the model had it.
        adapter: what is added to its output.
        base: what the layer does among the ranks.
        name: of the layer, for messages.

    Attributes:
        merged: whether the adapter is in the base weight at present; it adds nothing then.
        originals: what the base weights were on this rank before, by name, in the host's memory.
    """

    def __init__(self, to_wrap: nn.Module, adapter: nn.Module, base: ParallelBase, name: str = "") -> None:
        super().__init__()
        self.to_wrap, self.adapter = to_wrap, adapter
        self.base, self.name = base, name
        self.merged = False
        self.originals: dict[str, torch.Tensor] = {}
        self._adapter_enabled = True
        adapter.train(to_wrap.training)
        self.train(to_wrap.training)
        if hasattr(to_wrap, _NORM_OUTPUT):
            self._norm_output = bool(getattr(to_wrap, _NORM_OUTPUT))
            setattr(to_wrap, _NORM_OUTPUT, True)
        self.register_state_dict_post_hook(_names_of_the_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_names_of_the_wrapped)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the base layer has
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in {"to_wrap", "adapter"}:  # while it is being made, or copied
                raise
            return getattr(self.to_wrap, name)

    @property
    def adapter_enabled(self) -> bool:
        """Whether the adapter adds its update; a merged one does not."""
        return self._adapter_enabled and not self.merged

    def enable_adapter_layers(self) -> None:
        """Let the adapter add its update."""
        self._adapter_enabled = True

    def disable_adapter_layers(self) -> None:
        """Return what the base layer returns.

        Raises:
            ModelError: the adapter is merged, so that the base layer returns something else.
        """
        if self.merged:
            raise ModelError(
                f"the adapter of '{self.name}' is merged into its base weight, so it cannot be switched off; take it "
                "out first: LoRAMerge().unmerge(model)"
            )
        self._adapter_enabled = False

    def get_base_layer(self) -> nn.Module:
        """The wrapped layer."""
        return self.to_wrap

    def unwrapped(self) -> nn.Module:
        """The base layer, set back to what it returned before it was wrapped."""
        if "_norm_output" in vars(self):
            setattr(self.to_wrap, _NORM_OUTPUT, self._norm_output)
        return self.to_wrap

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the base layer
        """What the base layer returns, with the adapter's update in its first tensor.

        The input is the first argument, or has the name that the base layer calls it by, or ``x``.

        Raises:
            ModelError: there is none; or see `parts`.
        """
        x, args, kwargs = with_input_first(self.to_wrap, args, kwargs, self.name)
        if self.adapter_enabled:
            if self.base.placed:
                return within(self.to_wrap, self.base, self.adapted, x, self.name)
            check_whole(self.to_wrap, self.name)
        returned = self.to_wrap(x, *args, **kwargs)
        output, rows = self.parts(returned, x)
        if self.adapter_enabled:
            output = self.adapted(output, rows, *args, **kwargs)
        return self.like(returned, output)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """For Megatron-Core's distributed checkpoints; see `smartinit.adapters.parallel.sharded_state`."""
        from smartinit.adapters.parallel.sharded_state import sharded_state

        state = sharded_state(self.to_wrap, self.adapter, self.base, prefix, sharded_offsets, metadata)
        return {key: kept for key, kept in state.items() if not (self.merged and key.startswith(f"{prefix}adapter."))}

    def parts(self, returned: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401 - the base's
        """The layer's output and the adapter's input.

        Raises:
            ModelError: something else than a linear layer returns.
        """
        output, rows = returned, x
        if isinstance(returned, tuple):
            output = returned[0]
            if isinstance(output, tuple):  # ((output, norm's output), bias)
                output, rows = output
            elif self._returns_norm(returned):
                rows = returned[2]
        if not isinstance(output, torch.Tensor):
            raise ModelError(
                f"'{self.name}' returned a {type(output).__name__} where the output of a layer was expected"
            )
        return output, rows

    def like(self, returned: Any, output: torch.Tensor) -> Any:  # noqa: ANN401 - as the base layer
        """What the base layer returned with another output, as the caller of the layer expects it."""
        if not isinstance(returned, tuple):
            return output
        wanted = vars(self).get("_norm_output", True)  # of the norm: whether it was returned before the adapter came
        if isinstance(returned[0], tuple):
            return ((output, returned[0][1]) if wanted else output, *returned[1:])
        return (output, *(returned[1:] if wanted or not self._returns_norm(returned) else returned[1:2]))

    def _returns_norm(self, returned: tuple[Any, ...]) -> bool:
        """Whether a tuple is ``(output, bias, norm's output)``."""
        return "_norm_output" in vars(self) and len(returned) == 3  # noqa: PLR2004

    def adapted(self, output: torch.Tensor, rows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """The base layer's output with the adapter's update."""
        base = called(self.to_wrap, self.base, args, kwargs)
        update = self.adapter(rows, base, counts_of(base, args, kwargs))
        added: torch.Tensor = output + update.to(output.dtype)
        return added


def _names_of_the_base(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    """``<name>.to_wrap.weight`` -> ``<name>.weight``, in place.

    Of a merged layer the adapter's are left out: with them the update would count twice in who loads it.
    """
    if module.merged:
        for key in [key for key in state if key.startswith(f"{prefix}adapter.")]:
            del state[key]
    inner = f"{prefix}to_wrap."
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _names_of_the_wrapped(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """The inverse, before the layer's own keys are looked up.

    Raises:
        ModelError: the layer is merged, so that what comes in would be lost with the next un-merging.
    """
    if module.merged:
        raise ModelError(
            f"'{module.name}' is merged, so no state can be loaded into it; take the adapter out first: "
            "LoRAMerge().unmerge(model)"
        )
    ours = (f"{prefix}to_wrap.", f"{prefix}adapter.")
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(ours)]:
        state[f"{prefix}to_wrap.{key.removeprefix(prefix)}"] = state.pop(key)
