"""The kinds of layers that can carry adapters, and what differs between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from smartinit.adapters.layer import LoraLayer
from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Linear(LoraLayer):
    """LoRA around `torch.nn.Linear`; its weight is ``(out, in)``."""

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """``(in_features, out_features)``, from the layer's fields: a quantised weight has another shape."""
        return base_layer.in_features, base_layer.out_features  # type: ignore[return-value]

    def low_rank(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        """``s·b a x`` of rows ``x (..., in)``."""
        return low_rank_product(self.get_base_layer(), x, a, b, scaling)


class Conv1D(Linear):
    """LoRA around transformers' ``Conv1D`` (GPT-2), a linear layer whose weight is stored as ``(in, out)``."""

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """``(in_features, out_features)``."""
        in_features, out_features = base_layer.weight.shape  # type: ignore[misc]
        return in_features, out_features


class Conv2d(Linear):
    """LoRA around `torch.nn.Conv2d` without groups.

    A is a convolution like the base layer's, ``(r, in_channels, kh, kw)``; B one of single points, ``(out, r, 1, 1)``.
    PEFT's has A without the base layer's dilation and padding mode; this one has them.
    """

    base_layer: nn.Conv2d

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """``(in_channels, out_channels)``."""
        return base_layer.in_channels, base_layer.out_channels  # type: ignore[return-value]

    def new_matrices(self, adapter_name: str, r: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Make A and B of one adapter, without values."""
        base = self.base_layer
        self.lora_A[adapter_name] = nn.Conv2d(
            base.in_channels,
            r,
            base.kernel_size,  # type: ignore[arg-type]
            base.stride,  # type: ignore[arg-type]
            base.padding,  # type: ignore[arg-type]
            base.dilation,  # type: ignore[arg-type]
            bias=False,
            padding_mode=base.padding_mode,
            device=device,
            dtype=dtype,
        )
        self.lora_B[adapter_name] = nn.Conv2d(r, base.out_channels, 1, bias=False, device=device, dtype=dtype)


class Embedding(Linear):
    """LoRA around `torch.nn.Embedding`: ``A (r, num_embeddings)``, ``B (embedding_dim, r)``, parameters as in PEFT."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """``(num_embeddings, embedding_dim)``."""
        return base_layer.num_embeddings, base_layer.embedding_dim  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """None: embeddings have none."""
        return None

    def new_matrices(self, adapter_name: str, r: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Make A and B of one adapter, without values."""
        a = torch.empty(r, self.in_features, device=device, dtype=dtype)
        b = torch.empty(self.out_features, r, device=device, dtype=dtype)
        self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name] = nn.Parameter(a), nn.Parameter(b)

    def matrices(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``A (r, num_embeddings)`` and ``B (embedding_dim, r)``, the parameters themselves."""
        return self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """As PEFT: A zero and B normal; both normal with ``False``."""
        a, b = self.matrices(adapter_name)
        nn.init.normal_(b)
        if init_lora_weights is False:
            nn.init.normal_(a)
        else:
            nn.init.zeros_(a)

    def product(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """``s·B A x``; numbers of tokens know no dropout."""
        return self.low_rank(x, *self.matrices(adapter_name), self.scaling[adapter_name])


def low_rank_product(
    base_layer: nn.Module, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float = 1.0
) -> torch.Tensor:
    """``s·b a x`` as ``base_layer`` would multiply, in the dtype of ``a``; ``a (rank, in)`` and ``b (out, rank)``.

    Args:
        base_layer: a linear layer, transformers' ``Conv1D``, a ``Conv2d`` or an ``Embedding``.
        x: its input.
        a: first factor, as a matrix or in the layer's own shape.
        b: second factor, likewise.
        scaling: ``s``; it multiplies what ``a`` gives, of which there is least.
    """
    if isinstance(base_layer, nn.Embedding):
        rows = functional.embedding(x, a.T, padding_idx=base_layer.padding_idx) * scaling @ b.T
        scale = getattr(base_layer, "embed_scale", None)  # some models scale what their embeddings give
        if scale is None:
            return rows
        return rows * (scale.to(rows.dtype) if isinstance(scale, torch.Tensor) else scale)
    x = x.to(a.dtype)
    if isinstance(base_layer, nn.Conv2d):
        kernel = a.reshape(-1, *base_layer.weight.shape[1:])
        # The layer's own method pads in its own mode.
        inner = base_layer._conv_forward(x, kernel, None)  # noqa: SLF001
        return functional.conv2d(inner * scaling, b.reshape(*b.shape[:2], 1, 1))
    return functional.linear(functional.linear(x, a) * scaling, b)


_KINDS: Mapping[type[nn.Module], type[LoraLayer]] = {
    TransformersConv1D: Conv1D,
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.Embedding: Embedding,
}


def wrap(name: str, module: nn.Module) -> LoraLayer:
    """The LoRA layer for one module of a model.

    Raises:
        ConfigError: a kind of module for which there is no layer here.
    """
    for kind, layer in _KINDS.items():
        if isinstance(module, kind) and getattr(module, "groups", 1) == 1:
            return layer(module)
    raise ConfigError(
        f"target module '{name}' is a {type(module).__name__}; adapters exist for torch.nn.Linear, transformers' "
        "Conv1D, torch.nn.Conv2d without groups and torch.nn.Embedding, so narrow target_modules"
    )
