"""Adapters of experts: one for all of a rank's experts, or one for each of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from smartinit.adapters.parallel.adapter import LowRankAdapter
from smartinit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from smartinit.adapters.parallel.flow import Product

_EXPERT = re.compile(r"(?:^|.*\.)mlp\.(?:.*\.)?experts(?:\..*)?\.linear_fc[12]")


def is_expert(name: str) -> bool:
    """Whether a linear layer belongs to a routed expert: ``mlp…experts….linear_fc1|2``, but no shared expert."""
    return _EXPERT.fullmatch(name) is not None and "shared_experts" not in name.split(".")


def expert_dim(module: nn.Module, name: str, dim: int) -> int:
    """The rank of an expert's adapter so that those of the experts which a token visits have ``dim`` together.

    Args:
        module: the base layer; its ``config`` says how many experts a token visits.
        name: for messages.
        dim: that of other layers.

    Raises:
        ConfigError: ``config.moe_router_topk`` is missing, or does not divide ``dim``.
    """
    topk: Any = getattr(getattr(module, "config", None), "moe_router_topk", None)
    if not isinstance(topk, int) or topk < 1:
        raise ConfigError(
            f"normalize_moe_lora divides dim by moe_router_topk, which the config of '{name}' does not have; give its "
            "config the number of experts that a token visits, or set normalize_moe_lora=False"
        )
    if dim % topk:
        raise ConfigError(
            f"dim={dim} cannot be divided by moe_router_topk={topk} for '{name}'; choose a multiple of {topk}, or set "
            "normalize_moe_lora=False"
        )
    return dim // topk


class ExpertAdapter(LowRankAdapter):
    """A and B for each of this rank's experts: ``(E, r, in)`` and ``(E, out, r)``.

    The base layer has the experts' weights in one module, and the rows of its input are sorted by expert.
    """

    def whole_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A ``(E, r, in)`` and B ``(E, out, r)``, E being this rank's experts."""
        a, b = super().whole_shapes()
        return (self.base.experts, *a), (self.base.experts, *b)

    def product(self, counts: torch.Tensor | Sequence[int] | None) -> Product:
        """Each expert's rows by its own matrix.

        Raises:
            ModelError: the rows of each expert are not known, or their number does not fit.
        """
        if counts is None:
            raise ModelError(
                f"'{self.name}' was called without the number of tokens of each expert, so its adapters cannot be told "
                "apart; expected it as the layer's second argument"
            )
        sizes = [int(n) for n in (counts.tolist() if isinstance(counts, torch.Tensor) else counts)]

        def grouped(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
            if len(sizes) != len(matrices) or sum(sizes) != rows.shape[0]:
                raise ModelError(
                    f"'{self.name}' has {len(matrices)} experts and {rows.shape[0]} rows, but was told of {sizes}"
                )
            pairs = zip(rows.split(sizes), matrices, strict=True)
            return torch.cat([functional.linear(part, matrix) for part, matrix in pairs])

        return grouped
