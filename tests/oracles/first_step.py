"""The first step of training by simulation: draw a gradient, let the optimiser step, look at the outputs. float64."""

from __future__ import annotations

import numpy as np


def root(moment: np.ndarray) -> np.ndarray:
    """Symmetric square root."""
    values, vectors = np.linalg.eigh(moment)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def simulated_step(
    a: np.ndarray,
    b: np.ndarray,
    scaling: float,
    moment: np.ndarray,
    *,
    optimiser: str = "adam",
    trains: str = "both",
    draws: int = 200,
    lr: float = 1e-9,
    seed: int = 0,
) -> float:
    """Root-mean-square change of the output per unit of learning rate, for ``E[x xᵀ] = moment``.

    Gradients have the covariance of the inputs along rows and unit variance across outputs; with ``lr`` this small,
    what is of second order vanishes.
    """
    random = np.random.default_rng(seed)
    half = root(moment)
    squares = []
    for _ in range(draws):
        gradient = random.normal(size=(b.shape[0], a.shape[1])) @ half
        steps = [scaling * b.T @ gradient, scaling * gradient @ a.T]
        if optimiser == "adam":
            steps = [np.sign(step) for step in steps]
        change_a, change_b = (-lr * step for step in steps)
        if trains == "a":
            change_b = 0 * change_b
        if trains == "b":
            change_a = 0 * change_a
        # The difference of products would lose its digits to a step this small.
        change = scaling * (change_b @ a + b @ change_a)
        squares.append(np.trace(change @ moment @ change.T) / lr**2)
    return float(np.sqrt(np.mean(squares)))


def simulated_reference(
    rank: int,
    out_features: int,
    scaling: float,
    moment: np.ndarray,
    *,
    optimiser: str = "adam",
    draws: int = 400,
    seed: int = 0,
) -> float:
    """The same for LoRA's own start, over many starts."""
    random = np.random.default_rng(seed)
    n = moment.shape[0]
    squares = []
    for i in range(draws):
        a = random.uniform(-1, 1, size=(rank, n)) / np.sqrt(n)
        step = simulated_step(
            a, np.zeros((out_features, rank)), scaling, moment, optimiser=optimiser, draws=1, seed=seed + i
        )
        squares.append(step**2)
    return float(np.sqrt(np.mean(squares)))


def decaying_moment(n: int, *, decay: float = 1.0, offset: float = 0.5, seed: int = 0) -> np.ndarray:
    """Eigenvalues ``i^-decay`` in random directions, a mean of length ``offset``, coordinates of all sizes."""
    random = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(random.normal(size=(n, n)))
    mean = random.normal(size=n) * offset / np.sqrt(n)
    moment = (turn * np.arange(1, n + 1) ** -decay) @ turn.T + np.outer(mean, mean)
    sizes = np.exp(random.normal(size=n) * 0.5)
    return moment * np.outer(sizes, sizes)
