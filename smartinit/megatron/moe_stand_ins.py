"""Modules of experts that look and compute like Megatron-Core's, in plain torch; see `smartinit.megatron.stand_ins`.

They take what a token dispatcher of Megatron-Core hands them: the rows of a rank's experts, sorted by expert, the same
on every rank of the expert-tensor-parallel group. They return addends, which the dispatcher sums up over that group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _MLP(nn.Module):
    """``linear_fc1``, an activation, ``linear_fc2``: of one expert, or of ``num_gemms`` in grouped layers."""

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        config: Any,  # noqa: ANN401 - Megatron's is a class of its own
        tp_group: ProcessGroup | None,
        generator: torch.Generator | None,
        num_gemms: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.gated = bool(getattr(config, "gated_linear_unit", False))
        options: dict[str, Any] = {"tp_group": tp_group, "config": config, "generator": generator}
        options |= {"bias": False, "skip_bias_add": True, "is_expert": True, "num_gemms": num_gemms}
        self.linear_fc1 = ColumnParallelLinear(
            hidden_size, ffn_hidden_size * (1 + self.gated), stride=1 + self.gated, **options
        )
        self.linear_fc2 = RowParallelLinear(ffn_hidden_size, hidden_size, **options)

    def rows(self, x: torch.Tensor, probs: torch.Tensor, *splits: torch.Tensor) -> torch.Tensor:
        """``(rows, hidden)`` to the same shape; ``splits`` goes to grouped layers."""
        y, _ = self.linear_fc1(x, *splits)
        if self.gated:
            gate, up = y.chunk(2, -1)
            y = functional.silu(gate) * up
        else:
            y = functional.gelu(y)
        output: torch.Tensor = self.linear_fc2(y * probs.unsqueeze(-1), *splits)[0]
        return output


class ExpertMLP(_MLP):
    """One expert: ``(rows (n, hidden), probabilities (n,)) -> (outputs, None)``."""

    def forward(self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The outputs, each times its probability (before ``linear_fc2``, as Megatron-Core does it)."""
        return self.rows(hidden_states, per_token_scale), None


class SequentialMLP(nn.Module):
    """Experts one after another: ``local_experts.N.linear_fc1|2``.

    Args:
        num_local_experts: how many this rank has.
        hidden_size: features of a token.
        ffn_hidden_size: features between an expert's two layers.
        config: says ``gated_linear_unit`` (SiLU of the gate times up, else GELU), ``moe_router_topk``, …
        ep_group: the ranks with other experts.
        tp_group: the expert-tensor-parallel ranks, which share each of this rank's experts.
        generator: of the weights; in the same state on the ranks of ``tp_group``.
    """

    def __init__(
        self,
        num_local_experts: int,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        config: Any = None,  # noqa: ANN401 - Megatron's is a class of its own
        ep_group: ProcessGroup | None = None,
        tp_group: ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_local_experts, self.ep_group, self.tp_group, self.config = (
            num_local_experts,
            ep_group,
            tp_group,
            config,
        )
        self.local_experts = nn.ModuleList(
            ExpertMLP(hidden_size, ffn_hidden_size, config=config, tp_group=tp_group, generator=generator)
            for _ in range(num_local_experts)
        )

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Rows ``(n, hidden)`` sorted by expert, how many of each, and their probabilities ``(n,)``."""
        sizes = tokens_per_expert.tolist()
        parts = zip(permuted_local_hidden_states.split(sizes), permuted_probs.split(sizes), strict=True)
        return torch.cat([expert(*part)[0] for expert, part in zip(self.local_experts, parts, strict=True)]), None


class TEGroupedMLP(_MLP):
    """All of a rank's experts in two grouped layers: ``linear_fc1|2`` with ``weight0``, ``weight1``, ….

    Args: see `SequentialMLP`.
    """

    def __init__(
        self,
        num_local_experts: int,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        config: Any = None,  # noqa: ANN401 - Megatron's is a class of its own
        ep_group: ProcessGroup | None = None,
        tp_group: ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            ffn_hidden_size,
            config=config,
            tp_group=tp_group,
            generator=generator,
            num_gemms=num_local_experts,
        )
        self.num_local_experts, self.ep_group, self.tp_group = num_local_experts, ep_group, tp_group

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """See `SequentialMLP.forward`."""
        return self.rows(permuted_local_hidden_states, permuted_probs, tokens_per_expert), None


class TopKRouter(nn.Module):
    """Chooses ``moe_router_topk`` experts for each token: ``(tokens..., hidden) -> (probabilities, chosen)``.

    Args:
        config: says ``num_moe_experts``, ``hidden_size``, ``moe_router_topk``; also ``sequence_parallel``, if tokens
            are in shards.
        tp_group: the tensor-parallel ranks, each with the whole weight.
        generator: of the weight; in the same state on every rank.
    """

    def __init__(
        self,
        config: Any,  # noqa: ANN401 - Megatron's is a class of its own
        *,
        tp_group: ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tp_group, self.topk = config, tp_group, int(config.moe_router_topk)
        weight = torch.empty(config.num_moe_experts, config.hidden_size)
        self.weight = nn.Parameter(weight.normal_(0, config.hidden_size**-0.5, generator=generator))

    def gating(self, x: torch.Tensor) -> torch.Tensor:
        """The logits ``(..., experts)``."""
        return functional.linear(x, self.weight)

    def routing(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities ``(tokens, experts)``, 0 for experts that were not chosen, and which were."""
        rows = logits.reshape(-1, logits.shape[-1])
        top = rows.topk(self.topk)
        probabilities = torch.zeros_like(rows).scatter(1, top.indices, top.values.softmax(-1))
        return probabilities, torch.zeros_like(rows, dtype=torch.bool).scatter(1, top.indices, value=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `routing`."""
        return self.routing(self.gating(x))
