"""Starts from gradients the slow and obvious way: the whole gradient by autograd in float64, and its full SVD."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn


def mean_gradients(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], loss: Callable[[nn.Module, object], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Parameter name -> mean gradient of the loss over the batches, of a float64 copy of the model in eval mode."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    count = 0
    for batch in batches:
        loss(model, batch).backward()
        count += 1
    return {name: p.grad / count for name, p in model.named_parameters() if p.grad is not None}


def lora_ga_product(gradient: torch.Tensor, rank: int, gamma: float = 16.0, first: str = "a") -> torch.Tensor:
    """``B A`` of algorithm 1 of arXiv 2407.05000: r right vectors, the *next* r left ones (or the other way round)."""
    u, _, vt = torch.linalg.svd(gradient.double(), full_matrices=False)
    for_a, for_b = (slice(0, rank), slice(rank, 2 * rank))[:: 1 if first == "a" else -1]
    zeta = gradient.shape[0] ** 0.25 / gamma**0.5
    return (zeta * u[:, for_b]) @ (zeta * vt[for_a])


def without_signs(product: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """``|Uᵀ X V|`` with all singular vectors of the gradient: what ``X = B A`` is, but for the free signs of triplets.

    LoRA-GA's A and B hold *different* triplets, whose signs do not cancel in their product.
    """
    u, _, vt = torch.linalg.svd(gradient.double(), full_matrices=True)
    return (u.T @ product.double() @ vt.T).abs()


def lora_one_product(
    gradient: torch.Tensor, rank: int, gamma: float = 128.0, *, normalise: bool = True
) -> torch.Tensor:
    """``B A`` of arXiv 2502.01235, spectral initialisation of ``-G``."""
    u, s, vt = torch.linalg.svd(-gradient.double(), full_matrices=False)
    sigma = s[:rank] / s[0] if normalise else s[:rank]
    return (u[:, :rank] * sigma) @ vt[:rank] / gamma


def low_rank(out: int, in_features: int, values: list[float], seed: int) -> torch.Tensor:
    """``(out, in)`` float64 with these singular values and no others."""
    generator = torch.Generator().manual_seed(seed)
    k = len(values)
    u = torch.linalg.qr(torch.randn(out, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(in_features, k, generator=generator, dtype=torch.float64)).Q
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.T


def rows_with_product(gradient: torch.Tensor, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs ``x (rows, in)`` and output gradients ``δ (rows, out)`` with ``δᵀ x = gradient``."""
    u, s, vt = torch.linalg.svd(gradient.double(), full_matrices=False)
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(rows, s.numel(), generator=generator, dtype=torch.float64)).Q
    return (mix * s.sqrt()) @ vt, (mix * s.sqrt()) @ u.T
