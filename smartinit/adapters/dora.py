"""Weight-decomposed adapters: ``h = m ⊙ (W + s·B A) x / ‖W + s·B A‖ + bias``, norms by rows (DoRA, arXiv 2402.09353).

The norm is a constant of the step: no gradient goes through it (sec. 4.3). Neither is ``W + s·B A`` made for it:

``‖W + s·B A‖² = ‖W‖² + 2 s (W Aᵀ ⊙ B) 1 + s² (B (A Aᵀ) ⊙ B) 1``, by rows,

where ``‖W‖²`` changes only when somebody writes to the base weight, and the rest costs O(r·out·in) without a
temporary of the weight's size.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

_CPU_BLOCK, _GPU_BLOCK = 1 << 19, 1 << 24  # numbers at a time: what fits into a core's cache; what fills a device


class Decomposable(Protocol):
    """What weight decomposition asks of a LoRA layer."""

    lora_magnitude_vector: nn.ModuleDict
    scaling: dict[str, float]
    base_norms: BaseNorms

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's."""

    def weight_matrix(self) -> torch.Tensor:
        """The base weight, ``(out, in)``."""

    def stored_tensor(self) -> torch.Tensor | None:
        """The tensor whose change means that `weight_matrix` has changed."""

    def matrices(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of one adapter."""

    def magnitude_shape(self) -> tuple[int, ...]:
        """The shape of a magnitude, which broadcasts against the layer's output."""

    def drops(self, adapter_name: str) -> bool:
        """Whether dropout changes the input of one adapter now."""

    def dropped(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """The input of one adapter."""

    def product(self, adapter_name: str, rows: torch.Tensor) -> torch.Tensor:
        """``s·B A`` times what `dropped` gave."""

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        """``W x`` without the bias."""


class BaseNorms:
    """``‖W‖²`` by rows of one layer's base weight, kept for as long as the weight is what it was.

    That is judged by the tensor's identity, address, dtype and version, which most writes change. Those through
    ``.data``, through a storage or a numpy view, and those of foreign kernels do not: whoever writes so must call
    `forget`. Layers forget by themselves when they are moved, cast, or switched between training and evaluation.
    Nothing is kept of a weight that is trained itself (torch's fused optimisers leave its version as it was), none in
    compiled code, where the norm is one reduction in the graph, and none under the transforms of ``torch.func``.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, tuple[object, ...], torch.Tensor] | None = None

    def forget(self) -> None:
        """Compute it anew when it is needed next."""
        self._kept = None

    def squared(self, stored: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
        """``(out,)`` squared norms of the rows of ``matrix (out, in)``, in float64 where the device has it.

        Args:
            stored: the tensor from which ``matrix`` comes; None: keep nothing.
            matrix: the weight.

        Cost: O(out·in) if the weight is another one than at the last call.
        """
        if stored is None or torch.compiler.is_compiling() or not _can_be_known_again(stored):
            return squared_norms(matrix)
        now = (stored._version, stored.data_ptr(), stored.dtype, stored.device)  # noqa: SLF001 - the documented counter
        kept = self._kept  # once: replicas of a module share this object among threads
        if kept is None or kept[0]() is not stored or kept[1] != now:
            kept = self._kept = (weakref.ref(stored), now, squared_norms(matrix))
        return kept[2]

    def __deepcopy__(self, memo: dict[int, object]) -> BaseNorms:
        """A copy of a layer has a weight of its own."""
        return BaseNorms()

    def __reduce__(self) -> tuple[type[BaseNorms], tuple[()]]:
        """Nothing of it goes to other processes."""
        return BaseNorms, ()


class Magnitude(nn.Module):
    """The trained row norms m of one adapter on one layer, at first those of ``W + s·B A``.

    Args:
        layer: the layer, with the adapter's matrices on it.
        adapter_name: which adapter.

    Attributes:
        weight: ``(out,)``; a convolution's ``(1, out, 1, …)``. In the adapter's dtype and on its device; without values
            while those are on the meta device.
    """

    weight: nn.Parameter

    def __init__(self, layer: Decomposable, adapter_name: str) -> None:
        super().__init__()
        a, _ = layer.matrices(adapter_name)
        self.weight = nn.Parameter(torch.empty(layer.magnitude_shape(), dtype=a.dtype, device=a.device))
        self.reset(layer, adapter_name)

    @torch.no_grad()
    def reset(self, layer: Decomposable, adapter_name: str) -> None:
        """Set m to the norms of what base layer and adapter hold now; nothing while one of them has no values.

        They are those by which the forward pass divides, bit for bit, so that the layer then computes what it would
        without decomposition.
        """
        if not self.weight.is_meta and not layer.weight_matrix().is_meta:
            self.weight.copy_(row_norms(layer, adapter_name).reshape(self.weight.shape))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{tuple(self.weight.shape)}"


def decomposed_update(layer: Decomposable, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """``result`` with one decomposed adapter: ``q ⊙ (W x + s·B A x) + bias``, ``q = m / ‖W + s·B A‖``.

    As in PEFT, adapters before this one are in ``W x``; and with dropout only what the adapter changes sees the
    dropped input x': ``result + (q - 1) ⊙ W x' + q ⊙ s·B A x'``.

    Args:
        layer: the layer.
        adapter_name: which adapter; it has a magnitude.
        x: the layer's input.
        result: what the base layer, and adapters before this one, made of it.

    Returns:
        The shape of ``result``, in the wider dtype of it and of the magnitude.

    Cost: besides plain LoRA's, O(r·out·in), and one temporary of the output's size; with dropout the base layer's
    product a second time.
    """
    quotient = magnitude_quotient(layer, adapter_name)
    if quotient.dim() > result.dim():  # a convolution of one image without a batch
        quotient = quotient[0]
    rows = layer.dropped(adapter_name, x)
    update = layer.product(adapter_name, rows).to(quotient.dtype)  # autocast would add in half precision
    if layer.drops(adapter_name):
        result = torch.addcmul(result, quotient - 1, layer.base_product(rows.to(x.dtype)))
        return torch.addcmul(result, quotient, update)
    whole = result + update
    bias = layer.bias
    if bias is None:
        return whole * quotient
    # At the start q is one: nothing is added, and the base layer's output is not rounded again.
    return torch.addcmul(bias.view(quotient.shape) * (1 - quotient), whole, quotient)


def magnitude_quotient(layer: Decomposable, adapter_name: str) -> torch.Tensor:
    """``m / ‖W + s·B A‖`` by rows, in the magnitude's shape; its gradient goes to m alone.

    Cost: O(r·out·in).
    """
    magnitude: torch.Tensor = layer.lora_magnitude_vector[adapter_name].weight  # type: ignore[assignment]
    return magnitude / row_norms(layer, adapter_name).to(magnitude.dtype).view(magnitude.shape)


@torch.no_grad()
def row_norms(layer: Decomposable, adapter_name: str, weight: torch.Tensor | None = None) -> torch.Tensor:
    """``(out,)`` norms of the rows of ``W + s·B A``, float64 where the device has it; never zero, without gradient.

    The products with A and B are taken in at least float32, also under autocast. A row that W and ``s·B A`` all but
    cancel is known to its rounding only, ``ε·(‖W‖² + ‖s·B A‖²)`` of its square, and taken to be no shorter than that.

    Args:
        layer: the layer.
        adapter_name: which adapter.
        weight: ``(out, in)`` in place of the base weight, for a base that is merged at present.

    Cost: O(r·out·in) time; O(r·(in + out)) memory, and a block of the weight if it is in another dtype.
    """
    a, b = (matrix.detach().flatten(1) for matrix in layer.matrices(adapter_name))
    matrix = layer.weight_matrix() if weight is None else weight
    matrix = matrix.detach()
    wide = torch.promote_types(torch.promote_types(a.dtype, matrix.dtype), torch.float32)
    a, b = a.to(matrix.device, wide), b.to(matrix.device, wide)
    stored = None if weight is not None else layer.stored_tensor()
    base = layer.base_norms.squared(stored, matrix)
    return norms_from(*squared_sums(a, b, matrix, base, layer.scaling[adapter_name]), wide)


@torch.no_grad()
def squared_sums(
    a: torch.Tensor, b: torch.Tensor, matrix: torch.Tensor, base: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``‖W + s·B A‖²`` by rows and ``‖W‖² + ‖s·B A‖²``, whose rounding the first is known to; each ``(out,)``.

    Both are sums over the columns of ``W`` and ``A``: those of shards of the columns add up to those of the whole.

    Args:
        a: ``(r, in)``, float32 or wider.
        b: ``(out, r)``, likewise.
        matrix: ``W (out, in)``.
        base: ``‖W‖²`` by rows.
        scaling: ``s``.

    Cost: see `row_norms`.
    """
    with _exactly(matrix.device):
        cross = (_product(a, matrix).T * b).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
    own = own.to(base.dtype) * scaling**2
    return base + 2 * scaling * cross.to(base.dtype) + own, base + own


def norms_from(squared: torch.Tensor, known_to: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Norms from what `squared_sums` gave for all columns; never zero.

    Args:
        squared: ``‖W + s·B A‖²``.
        known_to: what its rounding error is a part of.
        wide: in which dtype the products were taken.
    """
    # No shorter than what a magnitude can hold, squared.
    shortest = max(torch.finfo(wide).tiny ** 2, torch.finfo(squared.dtype).tiny)
    floor = torch.finfo(wide).eps * known_to + shortest
    return torch.maximum(squared, floor).sqrt()


def _can_be_known_again(stored: torch.Tensor) -> bool:
    """Whether a tensor's address and version tell that it was written to."""
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(stored)  # noqa: SLF001 - has no public name
    return not (stored.requires_grad or stored.is_inference() or stored.is_meta or transformed)


@torch.no_grad()
def squared_norms(matrix: torch.Tensor) -> torch.Tensor:
    """``(out,)`` squared norms of the rows of ``(out, in)``, summed in float64 where the device has it.

    Cost: O(out·in) time, and a block of the matrix in the wider dtype.
    """
    wide = torch.float32 if matrix.device.type == "mps" else torch.float64
    if torch.compiler.is_compiling():
        whole: torch.Tensor = torch.linalg.vector_norm(matrix, dim=1, dtype=wide)
        return whole.square()
    if matrix.stride(0) == 1 and matrix.shape[1] > 1:  # stored transposed: the memory's rows are the matrix's columns
        total = torch.zeros(matrix.shape[0], dtype=wide, device=matrix.device)
        for columns in _blocks(matrix.T):
            total += matrix[:, columns].to(wide).square().sum(1)
        return total
    parts = [torch.linalg.vector_norm(matrix[rows].to(wide), dim=1) for rows in _blocks(matrix)]
    return torch.cat(parts).square()


def _product(a: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``A Wᵀ (r, out)`` in the dtype of ``A``, without a copy of a W in another."""
    if matrix.dtype == a.dtype:
        return nn.functional.linear(a, matrix)
    return torch.cat([nn.functional.linear(a, matrix[rows].to(a.dtype)) for rows in _blocks(matrix)], dim=1)


def _blocks(matrix: torch.Tensor) -> Iterator[slice]:
    """Slices of the first dimension."""
    numbers = _CPU_BLOCK if matrix.device.type == "cpu" else _GPU_BLOCK
    step = max(1, numbers // max(1, matrix.shape[1]))
    return (slice(first, first + step) for first in range(0, matrix.shape[0], step))


def _exactly(device: torch.device) -> Any:  # noqa: ANN401 - a context manager
    """Without autocast, which would round the factors."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
