"""A linear layer that keeps its weight in few bits, on every device: plain tensors, no kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from smartinit.errors import ArgumentError, ModelError
from smartinit.linalg.nf4 import pack, unpack
from smartinit.linalg.quantisers import Quantiser

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from smartinit.linalg.quantisers import Format


class FakeQuantLinear(nn.Linear):
    """``y = Q x + bias`` with ``Q`` kept as codes and scales and unpacked in every forward pass.

    It holds the numbers of bitsandbytes' layers (NF4 for 4 bits, int8 rows for 8) and their memory, but not their
    speed: for tests, for CPUs, and to see what a format costs in accuracy. Like theirs, its ``weight`` is a packed
    parameter of bytes that takes no gradient; the gradient of the input goes through.

    Args:
        in_features: columns of ``Q``.
        out_features: rows of ``Q``.
        bias: whether there is one.
        quantiser: storage format.
        device: where it lies.
        dtype: of the bias.

    Attributes:
        weight: ``(bytes, 1)`` uint8, the packed codes; with int8 rows ``(out, in)`` int8.
        scales: ``(blocks,)`` float32, or one per row.
        quantiser: storage format.
        source_cls: class of the layer that it was made from, as transformers notes it on bitsandbytes' layers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quantiser: Quantiser | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.quantiser = quantiser or Quantiser()
        self.source_cls: type[nn.Module] = nn.Linear
        self.scales: torch.Tensor
        self._keep(torch.zeros(out_features, in_features, device=device))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        bits: int = 4,
        format: Format = "bitsandbytes",  # noqa: A002 - the quantiser's word
        *,
        quantiser: Quantiser | None = None,
    ) -> FakeQuantLinear:
        """The quantised form of an ``nn.Linear`` or a transformers ``Conv1D``, which is left as it is.

        Raises:
            ArgumentError: another kind of layer.
            ModelError: NaN or Inf in the weight, or a weight that is quantised already.
        """
        weight, transposed = getattr(linear, "weight", None), hasattr(linear, "nf")
        is_matrix = isinstance(weight, torch.Tensor) and weight.dim() == 2  # noqa: PLR2004
        if not isinstance(weight, torch.Tensor) or not is_matrix or not (transposed or isinstance(linear, nn.Linear)):
            raise ArgumentError(f"a {type(linear).__name__} cannot be quantised: expected nn.Linear or Conv1D")
        if not weight.is_floating_point():
            raise ModelError(f"a {type(linear).__name__} with a weight of {weight.dtype} is quantised already")
        matrix = weight.detach().T if transposed else weight.detach()
        bias = linear.bias
        new = cls(matrix.shape[1], matrix.shape[0], False, quantiser or Quantiser(bits, format), device=matrix.device)
        new._keep(matrix)
        new.source_cls = type(linear)
        if isinstance(bias, torch.Tensor):
            new.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return new.train(linear.training)

    def dequantise(self) -> torch.Tensor:
        """``Q``, ``(out_features, in_features)`` float32. Cost: O(out · in)."""
        shape = (self.out_features, self.in_features)
        codes = self.weight.detach()
        if not self.quantiser.by_rows:
            count = len(self.scales) * self.quantiser.block_size
            codes = unpack(codes.reshape(-1), self.quantiser.bits)[:count].view(len(self.scales), -1)
        return self.quantiser.decode(codes, self.scales, shape)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """``(..., in_features)`` -> ``(..., out_features)``, in the input's dtype."""
        bias: torch.Tensor | None = self._parameters["bias"]
        bias = None if bias is None else bias.to(input.dtype)
        return nn.functional.linear(input, self.dequantise().to(input.dtype), bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """A change of the model's dtype moves the scales, but does not round them: they belong to the codes."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """As ``nn.Linear`` has it, with the format."""
        return f"{super().extra_repr()}, bits={self.quantiser.bits}, format={self.quantiser.format}"

    def _keep(self, matrix: torch.Tensor) -> None:
        codes, scales = self.quantiser.encode(matrix)
        stored = codes if self.quantiser.by_rows else pack(codes.reshape(-1), self.quantiser.bits).unsqueeze(1)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.register_buffer("scales", scales)
