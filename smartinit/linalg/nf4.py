"""Blockwise quantisation by a code book: NF4 as bitsandbytes stores it, and normal and uniform books of 2, 4, 8 bits.

A matrix is read row by row as one list of numbers and cut into blocks of 64. A block keeps one scale; each of its
numbers, divided by the scale, becomes the index of the nearest entry of the book:

    weight (..., out, in) ── quantise ──> codes (..., blocks, block_size) uint8, scales (..., blocks) float32

NF4 is the book of QLoRA (arXiv 2305.14314, appendix E). The other books are those of LoftQ's authors, which PEFT had
up to 0.19; since 0.20 PEFT leaves everything to bitsandbytes, refuses 2 bits, and means int8 rows by 8 bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Book = Literal["nf4", "normal", "uniform"]
Scale = Literal["absmax", "spread"]

BLOCK_SIZE = 64

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 values of NF4, in the order of their codes: the numbers that bitsandbytes has in its kernels."""

_OFFSET = 0.9677083  # the outermost quantile: QLoRA's ½·((1 - 1/32) + (1 - 1/30))
_UNIFORM_WIDTH = 2.5  # standard deviations that a uniform book covers
_IN_CACHE = 2**17  # numbers
_FEW = 16  # entries


def code_book(book: Book, bits: int) -> Tensor:
    """The ``(2**bits,)`` float32 values of a book, ascending, in -1..1.

    ``"normal"``: quantiles of a normal distribution, one more above zero than below, with an exact zero; with 4 bits
    they are NF4's to 1e-6. ``"uniform"``: equally far apart, without a zero.

    Raises:
        ConfigError: bits other than 2, 4, 8 (``"nf4"``: 4).
    """
    allowed = (4,) if book == "nf4" else (2, 4, 8)
    if bits not in allowed:
        raise ConfigError(f"the {book} code book has {' or '.join(map(str, allowed))} bits, not {bits}")
    if book == "nf4":
        return torch.tensor(NF4, dtype=torch.float32, device="cpu")
    if book == "uniform":
        return torch.linspace(-1, 1, 2**bits, dtype=torch.float64, device="cpu").float()
    half = 2 ** (bits - 1)
    above = torch.special.ndtri(torch.linspace(_OFFSET, 0.5, half + 1, dtype=torch.float64, device="cpu")[:-1])
    below = -torch.special.ndtri(torch.linspace(_OFFSET, 0.5, half, dtype=torch.float64, device="cpu")[:-1])
    values = torch.cat([above, torch.zeros(1, dtype=torch.float64, device="cpu"), below]).sort().values
    return (values / values[-1]).float()


def quantise(
    weight: Tensor, book: Tensor, block_size: int = BLOCK_SIZE, *, scale: Scale = "absmax"
) -> tuple[Tensor, Tensor]:
    """Codes and scales of one matrix or a batch of equal shapes.

    Args:
        weight: ``(..., out, in)`` of any floating dtype; the last block of a matrix is filled up with zeros.
        book: ``(n,)`` ascending values in -1..1, n at most 256.
        block_size: numbers per scale.
        scale: ``"absmax"``, or ``"spread"``: |mean| + 2.5 standard deviations, which cuts outliers off. (LoftQ's
            authors and PEFT's former class take the signed mean, so that a block below zero on average gets a scale
            that is too small, or negative.)

    Returns:
        Codes ``(..., blocks, block_size)`` uint8 and scales ``(..., blocks)`` float32. Values exactly between two
        entries get the lower one, as in bitsandbytes. Cost: O(out·in·log n).

    Raises:
        ConfigError: a block size below 1.
    """
    blocks = _blocks(weight, block_size)
    book = book.to(blocks.device)
    rows = blocks.reshape(-1, block_size)
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    step = max(1, _IN_CACHE // block_size) if rows.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), step):  # a piece that stays in the CPU's cache: 2x faster than all at once
        piece = rows[start : start + step].float()
        scales[start : start + step] = scales_here = _scales(piece, scale)
        codes[start : start + step] = _nearest(piece * _inverse(scales_here).unsqueeze(-1), book)
    return codes.view(blocks.shape), scales.view(blocks.shape[:-1])


def dequantise(codes: Tensor, scales: Tensor, book: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The float32 matrices ``(..., out, in)`` = ``shape`` that codes and scales stand for. Cost: O(out·in)."""
    book = book.to(codes.device)
    rows = codes.reshape(-1, codes.shape[-1])
    flat_scales = scales.reshape(-1, 1)
    values = torch.empty(rows.shape, dtype=torch.float32, device=codes.device)
    step = max(1, _IN_CACHE // codes.shape[-1]) if codes.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), step):
        values[start : start + step] = book[rows[start : start + step].int()] * flat_scales[start : start + step]
    size = math.prod(shape[-2:])
    whole = values.view(*shape[:-2], -1)[..., :size]
    return whole.reshape(torch.Size(shape))


def pack(codes: Tensor, bits: int) -> Tensor:
    """``(..., n)`` codes of 2, 4 or 8 bits -> ``(..., ⌈n·bits/8⌉)`` bytes, the first code in the highest bits.

    This is bitsandbytes' order for 4 bits. The last byte is filled up with zeros.
    """
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    parts = codes.reshape(*codes.shape[:-1], -1, per_byte)
    packed = torch.zeros(parts.shape[:-1], dtype=torch.uint8, device=codes.device)
    for place in range(per_byte):
        packed |= parts[..., place] << (bits * (per_byte - 1 - place))
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What `pack` was given, and what it filled the last byte up with: ``(..., bytes·8/bits)`` uint8."""
    per_byte = 8 // bits
    parts = [(packed >> (bits * (per_byte - 1 - place))) & (2**bits - 1) for place in range(per_byte)]
    return torch.stack(parts, -1).flatten(-2)


def _blocks(weight: Tensor, block_size: int) -> Tensor:
    """``(..., blocks, block_size)``, in the weight's dtype."""
    if block_size < 1:
        raise ConfigError(f"a block holds at least one number, but block_size is {block_size}")
    flat = weight.detach().flatten(-2)
    missing = -flat.shape[-1] % block_size
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.reshape(*flat.shape[:-1], flat.shape[-1] // block_size, block_size)


def _scales(rows: Tensor, scale: Scale) -> Tensor:
    if scale == "absmax":
        return rows.abs().amax(-1)
    if rows.shape[-1] == 1:  # the deviation of one number
        return rows.abs().squeeze(-1)
    spread, mean = torch.std_mean(rows, -1)
    return mean.abs() + _UNIFORM_WIDTH * spread


def _inverse(scales: Tensor) -> Tensor:
    """1/scale; 0 for a block of zeros. A scale so small that its inverse overflows is as good as zero, too."""
    inverse = 1 / scales
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _nearest(values: Tensor, book: Tensor) -> Tensor:
    """Index of the nearest entry, uint8."""
    bounds = (book[1:] + book[:-1]) / 2
    if len(book) > _FEW or values.device.type != "cpu":
        return torch.bucketize(values, bounds, out_int32=True).to(torch.uint8)
    # On a CPU fifteen vectorised comparisons take a quarter of the time of a binary search per number.
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for bound in bounds.tolist():
        codes += values > bound
    return codes
