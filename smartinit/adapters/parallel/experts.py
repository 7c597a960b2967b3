"""Adapters of experts: one for all of a rank's experts, or one for each of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from smartinit.adapters.parallel.adapter import LowRankAdapter
from smartinit.adapters.parallel.collectives import size_of
from smartinit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from torch.distributed import ProcessGroup

    from smartinit.adapters.parallel.base import ParallelBase
    from smartinit.adapters.parallel.flow import Product

_EXPERT = re.compile(r"(?:^|.*\.)mlp\.(?:.*\.)?experts(?:\..*)?\.linear_fc[12]")


def is_expert(name: str, module: nn.Module | None = None) -> bool:
    """Whether a linear layer belongs to routed experts.

    Args:
        name: ``mlp…experts….linear_fc1|2`` is an expert's; what is in ``shared_experts``, where all tokens go, is not.
        module: the layer, which may say so itself: ``is_expert``, or ``num_gemms`` weights.
    """
    if "shared_experts" in name.split("."):
        return False
    says_so = bool(getattr(module, "is_expert", False)) or bool(getattr(module, "num_gemms", 0))
    return says_so or _EXPERT.fullmatch(name) is not None


def check_expert_group(module: nn.Module, name: str, group: ProcessGroup | None) -> None:
    """Whether the ranks with other experts are known: adapters would start, or drift, apart without a word.

    Args:
        module: the base layer; its ``config`` may say how many such ranks there are.
        name: for messages.
        group: those ranks.

    Raises:
        ConfigError: there are others.
    """
    expected: Any = getattr(getattr(module, "config", None), "expert_model_parallel_size", None)
    if isinstance(expected, int) and expected != size_of(group):
        has = "no expert-parallel group" if group is None else f"an expert-parallel group of {size_of(group)} ranks"
        raise ConfigError(
            f"the config of '{name}' has expert_model_parallel_size={expected}, but the module of its experts has "
            f"{has}; give that module the group (ep_group) that it was made for, and adapt the model, not a layer alone"
        )


def without_layers(module: nn.Module) -> bool:
    """Whether a module of experts holds their weights as parameters of its own, as Megatron-Core's GroupedMLP does."""
    weights = [getattr(module, name, None) for name in ("weight1", "weight2")]
    return hasattr(module, "num_local_experts") and all(isinstance(weight, torch.Tensor) for weight in weights)


def expert_dim(module: nn.Module, name: str, dim: int, base: ParallelBase) -> int:
    """The rank of an expert's adapter so that those of the experts which a token visits have ``dim`` together.

    Args:
        module: the base layer; its ``config`` says how many experts a token visits.
        name: for messages.
        dim: that of other layers.
        base: the layer among the ranks.

    Raises:
        ConfigError: ``config.moe_router_topk`` is missing, or does not divide ``dim``; or a column-parallel layer's
            ranks cannot share the quotient evenly.
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
    if base.split == "column" and dim // topk % base.size:
        raise ConfigError(
            f"dim={dim} divided by moe_router_topk={topk} is {dim // topk}, which cannot be shared evenly by the "
            f"{base.size} expert-tensor-parallel ranks of '{name}'; choose a dim that is a multiple of "
            f"{topk * base.size}, or set normalize_moe_lora=False"
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
        """Each expert's rows by its own matrix, in a loop over the experts that have rows.

        ``torch.nn.functional.grouped_mm`` was measured against it (64 experts of about 4 rows, float32, one CPU core,
        forward and backward: 0.95 ms and 1.8 ms) and not taken: strides must be multiples of 16 bytes, gradients
        included.

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
            # Without any rows one product is left: a rank without tokens still takes part in the backward pass.
            busy = [(part, matrix) for part, matrix in pairs if len(part)] or [(rows, matrices[0])]
            return torch.cat([functional.linear(part, matrix) for part, matrix in busy])

        return grouped
