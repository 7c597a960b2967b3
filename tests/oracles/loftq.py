"""LoftQ and its quantisers, written out in float64 from the papers: slow and obvious."""

from __future__ import annotations

import torch

# QLoRA (arXiv 2305.14314), appendix E: the published values of NormalFloat4.
NF4 = [
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
]


def normal_book(bits: int) -> list[float]:
    """Quantiles of the normal distribution by scipy: 2^(bits-1) above zero, zero, one less below."""
    from scipy.stats import norm

    offset, half = 0.9677083, 2 ** (bits - 1)
    above = [norm.ppf(offset + (0.5 - offset) * i / half) for i in range(half)]
    below = [-norm.ppf(offset + (0.5 - offset) * i / (half - 1)) for i in range(half - 1)]
    return sorted(value / max(above) for value in [*above, 0.0, *below])


def uniform_book(bits: int) -> list[float]:
    """2^bits values from -1 to 1 with equal steps."""
    steps = 2**bits - 1
    return [-1 + 2 * i / steps for i in range(steps + 1)]


def quantise_blocks(weight: torch.Tensor, book: list[float], block: int = 64, *, spread: bool = False) -> torch.Tensor:
    """What blockwise quantisation makes of a matrix, number by number's nearest value."""
    values = torch.tensor(book, dtype=torch.float64)
    flat = weight.double().flatten()
    out = torch.zeros_like(flat)
    for start in range(0, len(flat), block):
        piece = flat[start : start + block]
        # A last block that is not full is filled up with zeros, which changes no largest size.
        scale = piece.mean().abs() + 2.5 * piece.std() if spread else piece.abs().max()
        if scale > 0:
            nearest = (piece[:, None] / scale - values[None, :]).abs().argmin(1)
            out[start : start + block] = values[nearest] * scale
    return out.reshape(weight.shape)


def quantise_rows(weight: torch.Tensor) -> torch.Tensor:
    """What int8 rows make of a matrix: float16, then 127 steps up to each row's largest size."""
    rounded = weight.half().double()
    scale = rounded.abs().amax(1, keepdim=True).clamp(min=1e-300)
    return (rounded * 127 / scale).round() * scale / 127


def best_correction(error: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix of a rank (Eckart and Young), by a full SVD."""
    u, s, v = torch.linalg.svd(error.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def loftq(weight: torch.Tensor, rank: int, iterations: int, quantise) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Algorithm 1 of arXiv 2310.08659: every iterate (Q, correction)."""
    correction = torch.zeros_like(weight, dtype=torch.float64)
    iterates = []
    for _ in range(iterations):
        quantised = quantise(weight.double() - correction)
        correction = best_correction(weight.double() - quantised, rank)
        iterates.append((quantised, correction))
    return iterates


def dynamic_book() -> list[float]:
    """The 8-bit dynamic type: per power of ten 10^(e-6), 2^e middles of equal parts of 0.1..1, of both signs; 0, 1."""
    positive = [10.0 ** (e - 6) * (0.1 + 0.9 * (i + 0.5) / 2**e) for e in range(7) for i in range(2**e)]
    return sorted([0.0, 1.0, *positive, *(-value for value in positive)])


def quantise_twice(weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    """NF4 whose scales, less their mean, are quantised to the dynamic type in blocks of 256."""
    rows = weight.double().reshape(-1, block)
    scales = rows.abs().amax(1)
    centred = (scales - scales.mean())[None]
    rounded = quantise_blocks(centred, dynamic_book(), 256)[0] + scales.mean()
    values = torch.tensor(NF4, dtype=torch.float64)
    nearest = (rows[:, :, None] / scales[:, None, None] - values).abs().argmin(2)
    return (values[nearest] * rounded[:, None]).reshape(weight.shape)
