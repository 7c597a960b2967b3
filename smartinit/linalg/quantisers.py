"""What a weight becomes when it is stored with few bits: ``q(W)``, ready to be subtracted from ``W``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from smartinit.errors import ConfigError, ModelError
from smartinit.linalg.nf4 import BLOCK_SIZE, code_book, dequantise, quantise

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.linalg.nf4 import Book, Scale

Format = Literal["bitsandbytes", "normal", "uniform"]
FORMATS: tuple[Format, ...] = ("bitsandbytes", "normal", "uniform")
BITS = (2, 4, 8)

_SCALES_BLOCK = 256
_INT8 = 127.0


@dataclass(frozen=True)
class Quantiser:
    """A storage format of few bits, as a function from a weight to the weight that the format makes of it.

    Formats by bits:

    ================  ==================  =====================  ============================
    format            2                   4                      8
    ================  ==================  =====================  ============================
    bitsandbytes      as ``"normal"``     NF4 (QLoRA)            int8 rows (LLM.int8)
    normal            normal quantiles    normal quantiles       normal quantiles
    uniform           uniform, by spread  uniform, by spread     uniform, by spread
    ================  ==================  =====================  ============================

    What a format makes of a weight is a fixed point of it: ``q(q(W)) = q(W)``, except with ``"uniform"`` (whose scale
    is no entry of the block) and `double`. So a base that was written as ``q(W)`` can be stored in the format later
    and stays what it is.

    Attributes:
        bits: 2, 4 or 8.
        format: see above. bitsandbytes has no 2-bit format.
        block_size: numbers that share a scale; int8 rows have one per row.
        double: keep the scales of blocks in 8 bits too (QLoRA's double quantisation, arXiv 2305.14314, sec. 3);
            bitsandbytes' ``compress_statistics``.

    Raises:
        ConfigError: a format, width or block size that does not exist.
    """

    bits: int = 4
    format: Format = "bitsandbytes"
    block_size: int = BLOCK_SIZE
    double: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"a weight is quantised to 2, 4 or 8 bits, not {self.bits!r}")
        if self.format not in FORMATS:
            raise ConfigError(f"the quantiser is one of {', '.join(FORMATS)}, not {self.format!r}")
        if type(self.block_size) is not int or self.block_size < 1:
            raise ConfigError(f"a block holds a whole number of weights, at least one, not {self.block_size!r}")

    @property
    def by_rows(self) -> bool:
        """Whether it keeps int8 rows instead of blocks of codes."""
        return self.format == "bitsandbytes" and self.bits == 8  # noqa: PLR2004 - the width

    @property
    def book(self) -> Tensor:
        """The ``(2**bits,)`` values of its codes.

        Raises:
            ConfigError: it keeps int8 rows.
        """
        if self.by_rows:
            raise ConfigError("bitsandbytes keeps 8 bits as int8 rows, without a code book")
        return code_book(self._book, self.bits)

    @property
    def scale(self) -> Scale:
        """How the scale of a block is found."""
        return "spread" if self.format == "uniform" else "absmax"

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``(..., blocks, block_size)`` uint8, scales ``(..., blocks)``; or int8 ``(..., out, in)``, row scales.

        With `double` the scales are what the 8 bits make of them.

        Raises:
            ModelError: NaN or Inf in the weight.
        """
        if weight.numel() == 0:
            raise ModelError(f"a weight of shape {tuple(weight.shape)} holds nothing to quantise")
        low, high = weight.detach().aminmax()  # NaN in any entry makes both NaN
        if not (low.isfinite() and high.isfinite()):
            raise ModelError(f"a weight of shape {tuple(weight.shape)} holds NaN or Inf, which no quantiser can keep")
        if self.by_rows:
            return quantise_rows(weight)
        codes, scales = quantise(weight, self.book, self.block_size, scale=self.scale)
        return codes, round_scales(scales) if self.double else scales

    def decode(self, codes: Tensor, scales: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """The float32 weight ``shape = (..., out, in)`` that `encode`'s result stands for."""
        if self.by_rows:
            return codes.float() * (scales / _INT8).unsqueeze(-1)
        return dequantise(codes, scales, self.book, shape)

    def __call__(self, weight: Tensor) -> Tensor:
        """``q(W)``, float32, of one matrix or a batch ``(..., out, in)``; ``weight`` is not changed. See `encode`."""
        return self.decode(*self.encode(weight), weight.shape)

    @property
    def _book(self) -> Book:
        if self.format == "bitsandbytes":
            return "nf4" if self.bits == 4 else "normal"  # noqa: PLR2004 - the width
        return self.format


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 ``(..., out, in)`` and the largest size in each row, ``(..., out)`` (LLM.int8, arXiv 2208.07339, sec. 2.1).

    The weight is rounded to float16 first, as bitsandbytes' layer does. A number beyond its range takes its bound.
    """
    limit = torch.finfo(torch.float16).max
    rounded = weight.detach().clamp(-limit, limit).half().float()
    scales = rounded.abs().amax(-1)
    inverse = torch.where(scales > 0, _INT8 / scales, 0.0)
    return (rounded * inverse.unsqueeze(-1)).round_().to(torch.int8), scales


def round_scales(scales: Tensor) -> Tensor:
    """``(..., blocks)`` scales after their own quantisation: centred, then 8 bits in blocks of 256."""
    offset = scales.mean(-1, keepdim=True)
    centred = (scales - offset).unsqueeze(-2)  # one row of numbers per matrix
    book = dynamic_code_book().to(scales.device)
    codes, outer = quantise(centred, book, _SCALES_BLOCK)
    return dequantise(codes, outer, book, centred.shape).squeeze(-2) + offset


def dynamic_code_book() -> Tensor:
    """The 256 values of the dynamic data type (arXiv 1511.04561; bitsandbytes' signed map with 7 exponent bits).

    A number is a sign, a power of ten from 1e-6 to 1 (by the count of leading zero bits), and a fraction in 0.1..1 for
    which the bits that are left serve: the larger the power, the finer. Zero and one are entries, minus one is not.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += middles + [-value for value in middles]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")
