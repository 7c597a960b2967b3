"""Adapters that start as what a quantiser took from the weight, whatever the quantiser: factors of ``W - Q``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smartinit.errors import ConfigError, ModelError
from smartinit.factors import Factors
from smartinit.linalg.krylov import top_triplets
from smartinit.spectrum import Certificate, Spectrum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Of the triplets' own error; the energy's is of second order in it (measured: at most 1e-5).
_TOLERANCE = 0.1
_TOGETHER = 2**26  # numbers in one call: enough to fill a device, little beside a model


def residual_factors(weight: Tensor, dequantised: Tensor, rank: int, scaling: float, *, seed: int = 0) -> Factors:
    """The factors that bring a quantised layer closest to the original: ``s·B A`` = best rank-r part of ``W - Q``.

    Args:
        weight: ``(out, in)`` original.
        dequantised: ``(out, in)`` what the quantised layer computes with, ``Q``.
        rank: of the adapter; 0 gives empty matrices.
        scaling: the layer's ``s``.
        seed: of the random start of the decomposition.

    Returns:
        ``a (rank, in)`` and ``b (out, rank)`` float32, each with half of σ and of 1/s, and ``Q`` as `base`.

    Raises:
        ConfigError: a rank above ``min(out, in)``, a scaling that is not positive, or two different shapes.
        ModelError: NaN or Inf in one of the weights.

    Source: arXiv 2310.08659, eq. 6-8 for ``T = 1``. Cost: O(out · in · rank).
    """
    if rank > min(weight.shape):
        raise ConfigError(f"rank {rank} is above min(out, in) = {min(weight.shape)} of a {tuple(weight.shape)} weight")
    return error_factors(error_spectra([weight], [dequantised], rank, seeds=[seed])[0], rank, scaling)


def error_spectra(
    weights: Sequence[Tensor], dequantised: Sequence[Tensor], limit: int, *, seeds: Sequence[int]
) -> list[Spectrum]:
    """Of each layer the leading ``limit`` singular triplets of ``W - Q``.

    ``values = σ²``, ``total = ‖W - Q‖²_F``, ``base = Q``. What a quantiser leaves is close to white noise, whose
    leading singular values are nearly equal: which mixture of them is found is a matter of chance, so the iteration
    is stopped by the energy that is found, which is then within 1e-4 of the most there is.

    Args:
        weights: ``(out, in)`` originals of one shape.
        dequantised: ``(out, in)`` each.
        limit: triplets, at most.
        seeds: of the random starts, one per layer.

    Raises:
        ConfigError: two different shapes.
        ModelError: NaN or Inf in one of the weights.
    """
    found: list[Spectrum] = []
    together = max(1, _TOGETHER // max(1, weights[0].numel())) if weights else 1
    for start in range(0, len(weights), together):
        some = slice(start, start + together)
        found += _spectra_of_some(weights[some], dequantised[some], limit, seeds[some])
    return found


def error_factors(spectrum: Spectrum, rank: int, scaling: float) -> Factors:
    """``s·B A = Σ_{i≤rank} σᵢ uᵢ vᵢᵀ`` of one of `error_spectra`; ``a`` and ``b`` get ``√(σ/s)`` each.

    Raises:
        ConfigError: a rank above the number of triplets, or a scaling that is not positive.
    """
    if rank > len(spectrum):
        raise ConfigError(f"rank {rank} asked of a spectrum with {len(spectrum)} directions; compute it with more")
    if not 0 < scaling < float("inf"):
        raise ConfigError(f"a correction needs a positive scaling (alpha / r), not {scaling}")
    assert spectrum.left is not None  # noqa: S101 - for the type checker
    directions, left = spectrum.directions[:rank].float(), spectrum.left[:, :rank].float()
    share = (spectrum.values[:rank].sqrt() / scaling).sqrt().to(directions)
    return Factors(
        a=share.unsqueeze(1) * directions, b=(left * share).contiguous(), effect="quantises", base=spectrum.base
    )


def _spectra_of_some(
    weights: Sequence[Tensor], dequantised: Sequence[Tensor], limit: int, seeds: Sequence[int]
) -> list[Spectrum]:
    errors = torch.stack([_error(weight, base) for weight, base in zip(weights, dequantised, strict=True)])
    totals = [float(total) ** 2 for total in torch.linalg.vector_norm(errors, dim=(1, 2), dtype=torch.float64)]
    if not all(total < float("inf") for total in totals):
        raise ModelError(f"a weight of shape {tuple(weights[0].shape)}, or its quantised form, holds NaN or Inf")
    count = min(limit, *errors.shape[1:])
    found = top_triplets(errors, count, seeds=seeds, tolerance=_TOLERANCE)
    spectra = []
    for i, (base, total) in enumerate(zip(dequantised, totals, strict=True)):
        values = found.values[i].double() ** 2
        certificate = Certificate(
            rows=0,
            residual=float(found.residual[i]),
            captured=min(float(values.sum()) / total, 1.0) if total > 0 else None,
            components=count,
        )
        # Of their own, so that one layer's result does not keep the whole stack in memory.
        right, left = (side[i].clone(memory_format=torch.contiguous_format) for side in (found.right, found.left))
        spectra.append(
            Spectrum(right, values, total, (left.shape[0], right.shape[1]), certificate, left, base.detach())
        )
    return spectra


def _error(weight: Tensor, base: Tensor) -> Tensor:
    if weight.shape != base.shape or weight.dim() != 2:  # noqa: PLR2004 - matrices
        raise ConfigError(
            f"the original weight is {tuple(weight.shape)}, the quantised one {tuple(base.shape)}: expected two "
            "matrices (out, in) of one shape"
        )
    return weight.detach().float() - base.detach().to(weight.device).float()
