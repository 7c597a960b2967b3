"""Subtracting the start within PEFT's layers: ``h = W x + s·B A x - s₀·B₀ A₀ x`` with the base weight untouched.

PEFT has no such layer. Two ways were weighed against this one. A second, frozen adapter that holds ``-B₀, A₀`` is lost,
silently, as soon as someone calls ``set_adapter``. A forward hook computes the right thing but knows nothing of
merging, and a merged model would be wrong, silently. So the layer's class becomes a subclass of itself: its forward
pass subtracts the start of every active adapter, and so does the delta that PEFT merges and unmerges; disabled,
unloaded or without the adapter it is the base layer, as ever.

What reads ``lora_A`` and ``lora_B`` by itself sees the trained matrices only: a folder written by ``save_pretrained``
holds ``B A``, not ``B A - B₀ A₀`` (convert it, or write the start again before loading it), and
``add_weighted_adapter`` combines what the adapters are now. The start is in no state dict, because PEFT would save it
with the adapter and nobody could load that; it comes from the artefact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from smartinit.adapters.host import factor_parameters
from smartinit.adapters.kinds import low_rank_product
from smartinit.adapters.start import forget_start, start_of
from smartinit.targets.weight import Target

if TYPE_CHECKING:
    import torch
    from torch import nn

    from smartinit.adapters.start import Start


class SubtractsStart:
    """What a PEFT layer does differently while one of its adapters has a start with ``base="offset"``."""

    peft_class: ClassVar[type[nn.Module]]

    def forward(self: Any, x: torch.Tensor, *args: object, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """PEFT's forward pass, less the starts of the adapters that take part in it."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        names = kwargs.get("adapter_names")
        special = getattr(self, "tp_layer", None) is not None  # tensor-parallel embeddings
        if names is None and not special and not any(name in self.lora_variant for name in self.active_adapters):
            return self._plain_forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        result: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if names is None:
            for name in self.active_adapters:
                result = self._less(result, name, x)
            return result
        for name in set(names):  # rows of one batch, each with an adapter of its own
            rows = [row for row, wanted in enumerate(names) if wanted == name]
            result[rows] = self._less(result[rows], name, x[rows])
        return result

    def _plain_forward(self: Any, x: torch.Tensor, *args: object, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Without rounding in between: in half precision PEFT's result is rounded, and its start subtracted again."""
        self._check_forward_args(x, *args, **kwargs)
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in self.active_adapters:
            if name not in self.r:
                continue
            if name in self.lora_A:
                rows = self.lora_dropout[name](self._cast_input_dtype(x, self.lora_A[name].weight.dtype))
                product = self.lora_B[name](self.lora_A[name](rows))
            else:
                product = low_rank_product(self.get_base_layer(), x, *factor_parameters(self, name))
            update = product * self.scaling[name]
            start = _offset(self, name)
            if start is not None:
                update = update - low_rank_product(self.get_base_layer(), x, start.a, start.b) * start.scaling
            result = result + update
        return result.to(dtype)

    def _less(self: Any, result: torch.Tensor, name: str, x: torch.Tensor) -> torch.Tensor:
        start = _offset(self, name)
        if start is None:
            return result
        product = low_rank_product(self.get_base_layer(), x, start.a, start.b) * start.scaling
        return (result - product).to(result.dtype)

    def get_delta_weight(self: Any, adapter: str) -> torch.Tensor:
        """What PEFT merges and unmerges: ``s·B A - s₀·B₀ A₀``, as the base layer stores its weight."""
        delta: torch.Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        start = _offset(self, adapter)
        if start is None:
            return delta
        return delta - start.delta(Target.of(self.get_base_layer(), "base_layer"), delta.dtype).to(delta.device)

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """The start goes with the adapter."""
        forget_start(self, adapter_name)
        super().delete_adapter(adapter_name)  # type: ignore[misc]

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """For copies and pickles, which find no class that was made here."""
        return _blank, (self.peft_class,), self.__dict__


def subtract_start(layer: nn.Module) -> None:
    """Make a layer of PEFT subtract the starts that it keeps with ``base="offset"``."""
    if not isinstance(layer, SubtractsStart):
        layer.__class__ = _subtracting(type(layer))


def _offset(layer: nn.Module, adapter_name: str) -> Start | None:
    start = start_of(layer, adapter_name)
    return start if start is not None and start.base == "offset" else None


_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def _subtracting(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _MADE:
        _MADE[kind] = type(f"{kind.__name__}LessStart", (SubtractsStart, kind), {"peft_class": kind})
    return _MADE[kind]


def _blank(kind: type[nn.Module]) -> nn.Module:
    made = _subtracting(kind)
    return made.__new__(made)
