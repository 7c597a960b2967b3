"""What the methods that decompose a weight share: checking it, batching it, halving the triplets between A and B."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smartinit.errors import ConfigError, ModelError
from smartinit.factors import Factors
from smartinit.linalg.bottom import bottom_triplets
from smartinit.linalg.triplets import frobenius_norms, working_copy
from smartinit.spectrum import Certificate, Spectrum

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from smartinit.linalg.triplets import Triplets

# Weights of one shape are stacked up to this much: beyond, a batched product gains nothing and memory doubles.
_STACK_BYTES = 64 * 1024**2


def checked_weight(weight: Tensor | None, shape: tuple[int, int], method: str) -> Tensor:
    """The weight as a method can use it.

    Raises:
        ConfigError: there is none, or it has another shape.
        ModelError: it is not of floating point, or has no numbers yet.
    """
    if weight is None:
        raise ConfigError(f"'{method}' decomposes the base weight and got none for a layer of shape {shape}")
    if tuple(weight.shape) != tuple(shape):
        raise ConfigError(f"'{method}' was given a weight of shape {tuple(weight.shape)}, expected (out, in) = {shape}")
    if not weight.is_floating_point():
        raise ModelError(f"'{method}' needs the weight in floating point, not {weight.dtype}: load the original model")
    if weight.is_meta:
        raise ModelError(
            f"'{method}' needs the numbers of a weight of shape {shape}, which is on the meta device: load it"
        )
    return weight.detach()


def stacks(weights: Sequence[Tensor]) -> Iterator[slice]:
    """Which weights to decompose together: as many as fit into a bounded copy, one at least."""
    size = max(1, weights[0].numel() * 4) if weights else 1
    step = max(1, _STACK_BYTES // size)
    for start in range(0, len(weights), step):
        yield slice(start, start + step)


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """``(s, out, in)`` in the precision of the products; a view of a single float32 weight."""
    if len(weights) == 1:
        return working_copy(weights[0]).unsqueeze(0)
    return torch.stack([working_copy(weight) for weight in weights])


def energies(weight: Tensor, method: str) -> list[float]:
    """``‖W‖_F²`` of every matrix of a stack ``(s, out, in)``.

    Raises:
        ModelError: one of them holds NaN or Inf.
    """
    norms = frobenius_norms(weight)
    if not bool(norms.isfinite().all()):
        shape = tuple(weight.shape[1:])
        raise ModelError(f"'{method}' cannot decompose a weight of shape {shape} that holds NaN or Inf")
    return [norm**2 for norm in norms.tolist()]


def triplet_spectra(found: Triplets, totals: Sequence[float], shape: tuple[int, int]) -> list[Spectrum]:
    """One spectrum for every matrix of a stack: ``values = σ²``, ``total = ‖W‖_F²``."""
    spectra = []
    for i, total in enumerate(totals):
        values = found.values[i].double().cpu() ** 2
        captured = min(1.0, float(values.sum()) / total) if total > 0 else None
        certificate = Certificate(
            rows=0,
            residual=float(found.residual[i]),
            captured=captured,
            settled=bool(found.settled[i]),
            components=values.numel(),
        )
        directions, left = found.right[i].float().contiguous(), found.left[i].float().contiguous()
        spectra.append(Spectrum(directions, values, total, shape, certificate, left))
    return spectra


def minor_spectra(
    weights: Sequence[Tensor | None], limit: int, shape: tuple[int, int], seeds: Sequence[int], method: str
) -> list[Spectrum]:
    """The ``limit`` smallest triplets of every weight, ascending; raises as `checked_weight` and `energies` do."""
    sound = [checked_weight(weight, shape, method) for weight in weights]
    spectra: list[Spectrum] = []
    for part in stacks(sound):
        stack = stacked(sound[part])
        totals = energies(stack, method)
        spectra += triplet_spectra(bottom_triplets(stack, min(limit, *shape), seeds=seeds[part]), totals, shape)
    return spectra


def checked_rank(spectrum: Spectrum, rank: int, method: str) -> tuple[Tensor, Tensor]:
    """The first ``rank`` directions ``(rank, in)`` and their partners ``(out, rank)``.

    Raises:
        ConfigError: the spectrum holds fewer.
    """
    if not 0 <= rank <= len(spectrum):
        raise ConfigError(
            f"'{method}' was asked for rank {rank} of a {spectrum.shape} weight with {len(spectrum)} candidate "
            "directions; lower the rank or compute a longer spectrum"
        )
    if spectrum.left is None:
        raise ConfigError(f"'{method}' needs the left factors of its spectrum, and this one has none")
    return spectrum.directions[:rank], spectrum.left[:, :rank]


def positive_scaling(scaling: float, method: str) -> float:
    """``scaling``, if a weight can be split by it.

    Raises:
        ConfigError: it is not positive.
    """
    if not 0 < scaling < float("inf"):
        raise ConfigError(f"'{method}' splits the weight into base and s·B A, which needs s > 0, not {scaling}")
    return scaling


def split_triplets(spectrum: Spectrum, rank: int, scaling: float, method: str) -> Factors:
    """``B = U √(Σ/s)``, ``A = √(Σ/s) Vᵀ``: ``s·B A`` is the sum of the first ``rank`` triplets.

    Raises:
        ConfigError: a rank beyond the spectrum, or a scaling that is not positive.
    """
    directions, left = checked_rank(spectrum, rank, method)
    root = (spectrum.values[:rank].sqrt() / positive_scaling(scaling, method)).sqrt().to(directions)
    return Factors(a=root.unsqueeze(1) * directions, b=left * root, effect="splits")
