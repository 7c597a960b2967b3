"""LoRA in Megatron Bridge's words (arXiv 2106.09685)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from smartinit.adapters.parallel.adapter import LowRankAdapter
from smartinit.adapters.parallel.base import describe
from smartinit.adapters.parallel.experts import ExpertAdapter, check_expert_group, expert_dim, is_expert
from smartinit.adapters.parallel.initial import fill
from smartinit.adapters.parallel.layer import AdaptedLayer
from smartinit.adapters.parallel.router import AdaptedRouter, describe_router, is_router
from smartinit.config import checks
from smartinit.errors import ConfigError
from smartinit.megatron.startable import Startable

if TYPE_CHECKING:
    from torch import nn

    from smartinit.adapters.parallel.base import ParallelBase
    from smartinit.megatron.walk import Place
    from smartinit.methods.base import Method


@dataclass
class LoRA(Startable):
    """Low-rank adapters beside linear layers, parallel or not.

    ``LoRA(dim=16)(model)`` freezes the model and adapts it, in place; see `PEFT.__call__`.

    Args:
        target_modules: see `ModuleMatcher`.
        exclude_modules: see `ModuleMatcher`.
        dim: rank of the update; a multiple of the tensor-parallel size for column-parallel layers.
        alpha: the update is scaled by ``alpha / dim``.
        dropout: probability of dropout, in ``[0, 1)``.
        dropout_position: ``"pre"``: of the layer's input; ``"post"``: of the update.
        lora_A_init_method: ``"xavier"`` (normal), ``"normal"`` (standard deviation 0.2), ``"kaiming"`` (uniform, a=√5),
            ``"uniform"`` (the same) or ``"zero"``; or a method of `smartinit.methods`, by name (``"eva"``, ``"pissa"``,
            …) or as an object with options, which starts B as well. Those that read data start in `initialize`.
        lora_B_init_method: likewise, without smartinit's methods.
        a2a_experimental: row-parallel layers with sequence parallelism exchange outputs in one all-to-all, instead of
            gathering B; the numbers are equal.
        lora_dtype: of the factors; None: that of the base weight (float32 beside a quantised one).
        normalize_moe_lora: adapters of experts have rank ``dim // moe_router_topk``; their alpha stays.
        share_expert_adapters: one adapter for all of a rank's experts, the same on all expert-parallel ranks; False:
            one for each expert.
    """

    dim: int = 32
    alpha: float = 32
    dropout: float = 0.0
    dropout_position: Literal["pre", "post"] = "pre"
    lora_A_init_method: str | Method = "xavier"
    lora_B_init_method: str = "zero"
    a2a_experimental: bool = False
    lora_dtype: torch.dtype | None = None
    normalize_moe_lora: bool = False
    share_expert_adapters: bool = True

    def check(self) -> None:
        """Whether the options go together.

        Raises:
            ConfigError: they do not.
        """
        self.patterns()
        checks.integer("dim", self.dim, 1)
        checks.positive("alpha", self.alpha)
        checks.choice("dropout_position", self.dropout_position, ("pre", "post"))
        checks.number("dropout", self.dropout, "a probability below 1", 0, math.nextafter(1, 0))
        for name in ("a2a_experimental", "normalize_moe_lora", "share_expert_adapters"):
            checks.boolean(name, getattr(self, name))
        dtype: object = self.lora_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"lora_dtype={dtype!r} cannot be: expected a floating-point torch.dtype or None")
        self.check_starts(self.lora_B_init_method)

    def adapted(self, place: Place, pattern: str, *, seed: int, shared: dict[str, nn.Module]) -> nn.Module:
        """See `PEFT.adapted`."""
        del pattern
        expert = is_expert(place.name, place.module)
        if expert:
            check_expert_group(place.module, place.name, place.ep_group)
        router = is_router(place.module)
        base = describe_router(place.module) if router else describe(place.module, place.name, expert=expert)
        own = expert and not self.share_expert_adapters
        name = place.whole_name if own or not expert else place.experts_name
        adapter = shared.get(name)
        if adapter is None:
            adapter = self.adapter(place, base, expert=expert)
            fill(
                adapter,
                self.a_initial,
                self.lora_B_init_method,
                seed=seed,
                name=name,
                first_expert=place.first_expert,
            )
            if expert and not own:
                shared[name] = adapter
        kind = AdaptedRouter if router else AdaptedLayer
        return kind(place.module, adapter, base, place.name)

    def adapter(self, place: Place, base: ParallelBase, *, expert: bool) -> LowRankAdapter:
        """The adapter of one layer, without values.

        Raises:
            ConfigError: the options do not fit the layer.
        """
        own = expert and not self.share_expert_adapters
        kind = ExpertAdapter if own and base.experts else LowRankAdapter
        weight = next(t for t in (*place.module.parameters(), *place.module.buffers()))
        dtype = self.lora_dtype or (weight.dtype if weight.is_floating_point() else torch.float32)
        normalise = expert and self.normalize_moe_lora
        return kind(
            base,
            expert_dim(place.module, place.name, self.dim, base) if normalise else self.dim,
            self.alpha,
            dropout=self.dropout,
            dropout_position=self.dropout_position,
            a2a_experimental=self.a2a_experimental,
            device=weight.device,
            dtype=dtype,
            name=place.name,
            expert=expert,
            shared_over=place.ep_group if expert and not own else None,
        )
