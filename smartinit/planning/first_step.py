r"""How far the first step of training moves a layer's outputs, before any step is taken.

With ``h = W x + s·B A x``, gradient ``G = ∂L/∂W`` and updates ``ΔA, ΔB``, to first order

    Δh(x) = s·(ΔB A + B ΔA) x,    ΔB ∝ s·G Aᵀ,    ΔA ∝ s·Bᵀ G.

What is unknown before training is ``G = Σ_t g_t x_tᵀ``. It is modelled as having rows with the covariance of the
inputs, ``Σ = E[x xᵀ]``, in directions of the output that nothing distinguishes: ``G = σ Z Σ^½`` with ``Z`` Gaussian.
Write ``C = A Σ Aᵀ`` and ``D = Bᵀ B`` (both r×r).

*Adam.* The first update is ``-lr·sign``: the gradient's size σ drops out. The signs of Gaussians of correlation ρ have
the covariance ``(2/π) arcsin ρ`` (the arcsine law); with ``R = (2/π) arcsin(corr C)``

    E‖Δh‖² / lr² = s²·[ out·tr(R C)  +  Σ_kl D_kl φ(corr D_kl)  +  (4/π)·Σ_k √D_kk·Σ_jl (AΣ)_lj² / √(Σ_jj C_ll) ]

by B's update, by A's, and by both together (for small correlations between the two), with
``φ(t) = Σ_ij Σ_ij (2/π) arcsin(t·corr Σ_ij)``. If the rows of ``A`` see uncorrelated inputs, ``R = I``, and with
``B = 0`` the change is ``s·lr·√(out·tr(A Σ Aᵀ))``; rows that see the same thing move together, and further.

*SGD.* ``E‖Δh‖² / lr² = s⁴σ²·[ out·tr C² + tr D²·tr Σ² + 2 tr D·tr(A Σ² Aᵀ) ]``, ``σ² = ‖G‖_F² / (out·tr Σ)``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from smartinit.errors import ConfigError
from smartinit.planning.moment import arcsine_law, correlation

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.factors import Factors
    from smartinit.planning.moment import SecondMoment

Optimiser = Literal["adam", "sgd"]


def predict_step(
    factors: Factors,
    scaling: float,
    moment: SecondMoment,
    lr: float,
    *,
    optimiser: Optimiser = "adam",
    gradient: Tensor | float | None = None,
) -> float:
    """Root-mean-square change of the layer's output vector that the first optimiser step makes.

    Args:
        factors: where training starts.
        scaling: the layer's s.
        moment: of the layer's inputs.
        lr: learning rate of the step.
        optimiser: Adam without ``eps`` (AdamW too, whose decay is no matter here), or SGD.
        gradient: of the loss by the layer's weight: ``(out, in)`` gives the exact step on inputs of this moment, a
            number is its Frobenius norm, which the model of the module docstring needs for SGD alone.

    Raises:
        ConfigError: SGD without a gradient.
    """
    if isinstance(gradient, torch.Tensor):
        change = scaling * _product_change(factors, scaling, gradient, lr, optimiser)
        return math.sqrt(max(0.0, float((moment.times(change) * change.to(moment.mean.device)).sum())))
    if optimiser == "adam":
        return lr * abs(scaling) * math.sqrt(sum(adam_terms(factors, moment)))
    if gradient is None:
        raise ConfigError("the first step of SGD is as long as the gradient: pass gradient (a matrix, or its norm)")
    if moment.trace <= 0:
        return 0.0
    sigma = float(gradient) / math.sqrt(factors.b.shape[0] * moment.trace)
    return lr * scaling**2 * sigma * math.sqrt(sgd_energy(factors, moment))


class StepTerms(NamedTuple):
    """Parts of ``E‖Δh‖² / (lr² s²)`` under Adam."""

    by_a: float
    by_b: float
    by_both: float


def adam_terms(factors: Factors, moment: SecondMoment) -> StepTerms:
    """Expected size of Adam's first step, by what makes it; see the module docstring."""
    a, b = factors.a.detach().double().to(moment.mean.device), factors.b.detach().double().to(moment.mean.device)
    seen = moment.times(a)
    C, D = seen @ a.mT, b.mT @ b
    by_a = by_b = by_both = 0.0
    if factors.trains != "a":
        by_b = b.shape[0] * float((arcsine_law(C) * C).sum())
    if factors.trains != "b" and b.any():
        by_a = float((D * moment.coherence(correlation(D))).sum())
    if factors.trains == "both" and by_a and by_b:
        scale = torch.outer(C.diagonal().clamp_min(0), moment.diagonal).sqrt()
        pull = torch.where(scale > 0, seen.square() / scale.clamp_min(1e-300), 0.0).sum()
        by_both = 4 / math.pi * float(D.diagonal().clamp_min(0).sqrt().sum() * pull)
    return StepTerms(max(0.0, by_a), max(0.0, by_b), by_both)


def sgd_energy(factors: Factors, moment: SecondMoment) -> float:
    """``E‖Δh‖² / (lr² s⁴ σ²)`` under SGD."""
    a, b = factors.a.detach().double().to(moment.mean.device), factors.b.detach().double().to(moment.mean.device)
    seen = moment.times(a)
    C, D = seen @ a.mT, b.mT @ b
    by_b = 0.0 if factors.trains == "a" else b.shape[0] * float(C.square().sum())
    by_a = 0.0 if factors.trains == "b" else float(D.square().sum()) * moment.square_trace
    by_both = 2 * float(D.trace() * seen.square().sum()) if factors.trains == "both" else 0.0
    return by_a + by_b + by_both


def _product_change(factors: Factors, scaling: float, gradient: Tensor, lr: float, optimiser: Optimiser) -> Tensor:
    """``(out, in)`` float64: ``(B + ΔB)(A + ΔA) - B A``."""
    G = gradient.detach().double()
    a, b = factors.a.detach().double().to(G.device), factors.b.detach().double().to(G.device)
    gradients = scaling * b.mT @ G, scaling * G @ a.mT
    step_a, step_b = ((-lr * (g.sign() if optimiser == "adam" else g)) for g in gradients)
    if factors.trains == "a":
        step_b = torch.zeros_like(step_b)
    if factors.trains == "b":
        step_a = torch.zeros_like(step_a)
    return step_b @ a + b @ step_a + step_b @ step_a
