"""Random numbers of one's own: what is read ahead draws what it would have drawn in its turn."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


class RandomStream:
    """The streams of torch (CPU), NumPy and Python, from where they are now, apart from those of everybody else."""

    def __init__(self) -> None:
        self._state: tuple[Any, ...] = _state()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside, random numbers come from this stream; outside, they go on as if nothing had been drawn."""
        others = _state()
        _set(self._state)
        try:
            yield
        finally:
            self._state = _state()
            _set(others)


def _state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - a user's stream


def _set(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])
