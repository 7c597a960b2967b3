"""A parameter that adapters are merged into at present, with what it was before."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from torch import nn


class Holds(Protocol):
    """What a merged parameter knows of the parts whose adapters are in it."""

    merged_adapters: list[str]
    merged_weights: list[MergedWeight]


class MergedWeight:
    """One parameter, kept as it was, until `restore`.

    A parameter that is only used where the merged adapters are is written in place, and its values are copied to the
    host's memory first. One that others use too is replaced where the adapters are; the others keep the original. So
    is one that was made in torch's inference mode.

    Args:
        places: modules that use the parameter, and its name there.
        original: the parameter itself.
        in_place: whether it is written in place.

    Attributes:
        parts: those whose adapters are merged into it.
    """

    def __init__(self, places: list[tuple[nn.Module, str]], original: nn.Parameter, *, in_place: bool) -> None:
        self.places = places
        self.original = original
        self.values = original.detach().to("cpu", copy=True) if in_place else None
        self.parts: list[Holds] = []

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def restore(self) -> None:
        """Put the original back, bit for bit; where the model has been moved or cast meanwhile, so is the original."""
        if self.values is not None:
            self.original.copy_(self.values)
        for module, name in self.places:
            now: torch.Tensor = getattr(module, name)
            # An adapter that trains the model's own biases puts them in and out of their places.
            if now is self.original or (self.values is not None and name == "bias"):
                continue
            if (self.original.device, self.original.dtype) != (now.device, now.dtype):
                self.original.data = self.original.data.to(now.device, now.dtype)
            setattr(module, name, self.original)

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedWeight:
        """A copied model has modules of its own; the values before merging are never written to, so one copy serves."""
        made = MergedWeight.__new__(MergedWeight)
        memo[id(self)] = made
        made.values = self.values
        made.places, made.original, made.parts = copy.deepcopy((self.places, self.original, self.parts), memo)
        return made


def unmerge(part: Holds) -> None:
    """Give the base parameters of a part their originals back, and of all parts that share one of these."""
    waiting, restored = [part], set[MergedWeight]()
    while waiting:
        one = waiting.pop()
        for weight in one.merged_weights:
            if weight not in restored:
                weight.restore()
                restored.add(weight)
                waiting += weight.parts
        one.merged_weights.clear()
        one.merged_adapters.clear()
