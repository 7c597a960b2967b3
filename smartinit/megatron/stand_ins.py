"""Parallel layers that look and compute like Megatron-Core's, in plain torch: for machines where that is not installed.

Names, attributes, shapes, arguments and what is returned, ``(output, bias)``, are Megatron-Core's; kernels, fusions and
asynchronous communication are not here. The same numbers are drawn for a weight however many ranks share it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from smartinit.adapters.parallel.collectives import (
    gather,
    rank_of,
    reduce_scatter,
    shard,
    size_of,
    spread,
    total,
)
from smartinit.errors import ConfigError
from smartinit.formats.rows import shard_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup


class _ParallelLinear(nn.Module):
    """What both kinds have.

    Args:
        input_size: columns of the whole weight.
        output_size: rows of the whole weight.
        bias: whether there is one.
        skip_bias_add: return the bias instead of adding it.
        tp_group: the tensor-parallel ranks.
        sequence_parallel: tokens are in shards along dimension 0 where features are whole.
        is_expert: whether it belongs to an expert: then nothing is exchanged in the layer.
        num_gemms: of a grouped layer, the number of experts; their weights are ``weight0``, ``weight1``, …
        config: whatever the model has to say of itself: ``gated_linear_unit``, ``moe_router_topk``, …
        stride: blocks of rows that are shared out one by one: 2 for the gate and up projections of a ``linear_fc1``.
        generator: of the weights; the same state on every rank.
    """

    partition_dim = 0

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool = True,
        skip_bias_add: bool = False,
        tp_group: ProcessGroup | None = None,
        sequence_parallel: bool = False,
        is_expert: bool = False,
        num_gemms: int = 0,
        config: Any = None,  # noqa: ANN401 - Megatron's is a class of its own
        stride: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.skip_bias_add, self.tp_group, self.config, self.stride = skip_bias_add, tp_group, config, stride
        self.sequence_parallel, self.is_expert = sequence_parallel, is_expert
        self.explicit_expert_comm = is_expert and size_of(tp_group) > 1
        if num_gemms:
            self.num_gemms = num_gemms
        for i in range(max(1, num_gemms)):
            name = f"weight{i}" if num_gemms else "weight"
            bound = 1 / math.sqrt(input_size)
            whole = torch.empty(output_size, input_size).uniform_(-bound, bound, generator=generator)
            weight = nn.Parameter(self._own(whole).clone())
            weight.tensor_model_parallel, weight.partition_dim = True, self.partition_dim  # type: ignore[attr-defined]
            setattr(self, name, weight)
        self.bias: nn.Parameter | None = None
        if bias:
            whole = torch.empty(output_size).uniform_(-bound, bound, generator=generator)
            self.bias = nn.Parameter((self._own(whole) if self.partition_dim == 0 else whole).clone())

    def _own(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a weight, or of a column-parallel layer's bias."""
        size = size_of(self.tp_group)
        dim = self.partition_dim
        if whole.shape[dim] % size:
            raise ConfigError(f"{whole.shape[dim]} features cannot be shared evenly by {size} tensor-parallel ranks")
        return shard_rows(whole, rank_of(self.tp_group), size, gated=dim == 0 and self.stride == 2, dim=dim)  # noqa: PLR2004

    def _product(self, x: torch.Tensor, m_splits: Sequence[int] | torch.Tensor | None) -> torch.Tensor:
        """``W x``, by each expert for its own rows."""
        if not hasattr(self, "num_gemms"):
            return functional.linear(x, self.get_parameter("weight"))
        sizes = m_splits.tolist() if isinstance(m_splits, torch.Tensor) else list(m_splits or ())
        parts = x.split(sizes)
        return torch.cat([functional.linear(part, self.get_parameter(f"weight{i}")) for i, part in enumerate(parts)])

    def _with_bias(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.skip_bias_add or self.bias is None:
            return y, self.bias
        return y + self.bias, None


class ColumnParallelLinear(_ParallelLinear):
    """``y = W x + b``, each rank with some rows of W ``(out/t, in)``.

    Args:
        input_size: see `_ParallelLinear`, as all other arguments but this one:
        gather_output: return all rows on every rank.
        disable_grad_reduce: leave the gradient of the input as addends; ignored with sequence parallelism.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        gather_output: bool = False,
        disable_grad_reduce: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self.gather_output, self.disable_grad_reduce = gather_output, disable_grad_reduce
        self.output_size_per_partition = output_size // size_of(self.tp_group)

    def forward(
        self,
        input_: torch.Tensor,
        m_splits: Sequence[int] | torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``(output, bias)``; ``input_`` is ``(tokens, ..., in)``, tokens in shards with sequence parallelism.

        ``runtime_gather_output`` is for this call what ``gather_output`` is for all; ``weight`` is used instead of the
        layer's own.
        """
        group, x = self.tp_group, input_
        if not self.explicit_expert_comm:
            if self.sequence_parallel:
                x = gather(x, 0, group, gradient="sum")
            elif not self.disable_grad_reduce:
                x = spread(x, group)
        y, bias = self._with_bias(self._product(x, m_splits) if weight is None else functional.linear(x, weight))
        gathers = self.gather_output if runtime_gather_output is None else runtime_gather_output
        return (gather(y, -1, group, gradient="slice") if gathers else y), bias


class RowParallelLinear(_ParallelLinear):
    """``y = W x + b``, each rank with some columns of W ``(out, in/t)``.

    Args:
        input_size: see `_ParallelLinear`, as all other arguments but this one:
        input_is_parallel: the input's features are in shards already.
    """

    partition_dim = 1

    def __init__(self, input_size: int, output_size: int, *, input_is_parallel: bool = True, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(input_size, output_size, **kwargs)
        self.input_is_parallel = input_is_parallel
        self.input_size_per_partition = input_size // size_of(self.tp_group)

    def forward(
        self, input_: torch.Tensor, m_splits: Sequence[int] | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``(output, bias)``; the output's tokens are in shards with sequence parallelism, addends in an expert."""
        group = self.tp_group
        y = self._product(input_ if self.input_is_parallel else shard(input_, -1, group), m_splits)
        if not self.explicit_expert_comm:
            y = reduce_scatter(y, 0, group) if self.sequence_parallel else total(y, group)
        return self._with_bias(y)
