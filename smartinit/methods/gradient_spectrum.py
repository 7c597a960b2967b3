"""What the initialisations from gradients keep of a layer: triplets of its mean gradient, more than there are ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smartinit.errors import ConfigError, DataError
from smartinit.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.statistics.gradient import GradientSketch


@dataclass(frozen=True)
class GradientSpectrum(Spectrum):
    """Leading singular triplets of ``G``; ``values`` are ``σ²``, ``total`` is ``‖G‖²_F``.

    Attributes:
        whole: the same with up to twice as many triplets, for methods that take 2r of them at rank r; `truncate`
            leaves it alone.
        weight_values: ``(k,)`` float64, leading singular values of the base weight, for scales that need them.
    """

    whole: Spectrum | None = None
    weight_values: Tensor | None = None


def gradient_spectrum(
    sketch: GradientSketch | None,
    limit: int,
    shape: tuple[int, int],
    method: str,
    *,
    per_rank: int = 1,
    weight_values: Tensor | None = None,
) -> GradientSpectrum:
    """The spectrum of a sketch: ``limit`` candidates, and ``per_rank`` times as many triplets.

    Raises:
        ConfigError: no sketch, or one of another layer.
        DataError: a gradient of zeros.
    """
    if sketch is None:
        raise ConfigError(f"'{method}' starts from gradients: pass a data loader whose batches give a loss")
    if sketch.shape != tuple(shape):
        raise ConfigError(f"'{method}' got the gradient of a {sketch.shape} weight for a layer of shape {tuple(shape)}")
    found = sketch.triplets(per_rank * limit)
    if not found.s.numel() or float(found.s[0]) == 0.0:
        raise DataError(
            f"the gradient of a layer of shape {tuple(shape)} is zero in all {sketch.batches} batches, so '{method}' "
            "has no direction to start from; check that the loss depends on the layer, or leave it out of "
            "target_modules"
        )
    values = found.s.square().cpu()
    whole = Spectrum(found.v, values, found.total, sketch.shape, found.certificate, found.u)
    front = whole.truncate(limit)
    return GradientSpectrum(
        front.directions,
        front.values,
        front.total,
        front.shape,
        sketch.triplets(limit).certificate,
        front.left,
        whole=whole,
        weight_values=weight_values,
    )


def checked_triplets(spectrum: Spectrum, rank: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """``u (out, k)``, ``σ (k,)`` float64 and ``v (k, in)`` of all triplets there are, k ≥ ``rank``.

    Raises:
        ConfigError: fewer than ``rank``, or no left factors.
    """
    if not 0 <= rank <= len(spectrum):
        raise ConfigError(
            f"'{method}' was asked for rank {rank} of a {spectrum.shape} weight with {len(spectrum)} candidate "
            "directions; lower the rank or compute a longer spectrum"
        )
    whole = getattr(spectrum, "whole", None) or spectrum
    if whole.left is None:
        raise ConfigError(f"'{method}' needs the left factors of its spectrum, and this one has none")
    return whole.left, whole.values.sqrt(), whole.directions
