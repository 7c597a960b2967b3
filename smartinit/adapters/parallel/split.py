"""Adapters of their own for the projections that one fused layer computes: q, k and v, or gate and up.

The rows of ``linear_qkv`` are grouped: for each query group its h heads of q, then k, then v, each of d rows. A rank
holds whole groups. Those of a gated ``linear_fc1`` are the gate's and then the up projection's, on each rank its part
of both. Either way the rows are some groups of a few units of equal width, and a projection has the same units of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smartinit.adapters.parallel.adapter import LowRankAdapter
from smartinit.adapters.parallel.call import called, counts_of
from smartinit.adapters.parallel.layer import AdaptedLayer
from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smartinit.adapters.parallel.base import ParallelBase


@dataclass(frozen=True)
class Interleaving:
    """How the rows of several projections lie in a rank's shard of a weight.

    Attributes:
        groups: in the shard.
        units: in a group.
        parts: name of a projection's adapter -> its units.
    """

    groups: int
    units: int
    parts: Mapping[str, range]

    def view(self, tensor: torch.Tensor, dim: int, shards: int = 1) -> torch.Tensor:
        """``(..., rows, ...)`` as ``(..., groups, units, width, ...)``, without a copy.

        Args:
            tensor: with the rows of the shard, or those of several, one after another.
            dim: of the rows.
            shards: how many.
        """
        view: torch.Tensor = tensor.unflatten(dim, (self.groups * shards, self.units, -1))
        return view

    def part(self, tensor: torch.Tensor, name: str, dim: int, shards: int = 1) -> torch.Tensor:
        """A projection's rows: ``(..., groups, its units, width, ...)``, without a copy.

        Args:
            tensor: see `view`.
            name: of the projection's adapter.
            dim: of the rows.
            shards: see `view`.
        """
        own = self.parts[name]
        units = self.view(tensor, dim, shards)
        return units.narrow(dim - 1 if dim < 0 else dim + 1, own.start, len(own))

    def replaced(self, tensor: torch.Tensor, parts: Mapping[str, torch.Tensor], shards: int = 1) -> torch.Tensor:
        """``(..., rows)`` with other rows for some projections.

        Args:
            tensor: it; not changed.
            parts: by name, in the shape of `part`.
            shards: see `view`.

        Cost: one copy.
        """
        units = self.view(tensor, -1, shards)
        pieces, done = [], 0
        for name, own in self.parts.items():
            if name in parts:
                pieces += [units[..., done : own.start, :], parts[name]]
                done = own.stop
        pieces.append(units[..., done:, :])
        return torch.cat(pieces, dim=-2).flatten(-3)


def attention_rows(base: ParallelBase, heads: int, groups: int, width: int, name: str) -> Interleaving:
    """Of ``linear_qkv``.

    Args:
        base: the layer.
        heads: attention heads.
        groups: query groups: heads of k, and of v.
        width: size of a head.
        name: for messages.

    Raises:
        ConfigError: such heads do not make up the layer's rows, or the ranks do not have whole groups.
    """
    if heads % groups or base.out_features != (heads + 2 * groups) * width:
        raise ConfigError(
            f"'{name}' has {base.out_features} rows, which are not those of q, k and v with num_attention_heads="
            f"{heads}, num_query_groups={groups} and kv_channels={width} of its config (that would be "
            f"{(heads + 2 * groups) * width}, heads a multiple of groups); correct the config, or adapt the layer as a "
            "whole with LoRA(target_modules=['linear_qkv'])"
        )
    ranks = base.size if base.split == "column" else 1
    if groups % ranks:
        raise ConfigError(
            f"the {groups} query groups of '{name}' cannot be shared evenly by {ranks} tensor-parallel ranks, so that "
            f"a rank has parts of a group; expected a multiple of {ranks}: use fewer ranks"
        )
    per_group = heads // groups
    parts = {"q": range(per_group), "k": range(per_group, per_group + 1), "v": range(per_group + 1, per_group + 2)}
    return Interleaving(groups // ranks, per_group + 2, {f"adapter_{name}": units for name, units in parts.items()})


def gated_rows(base: ParallelBase, name: str) -> Interleaving:
    """Of a ``linear_fc1`` whose rows are those of a gate and of an up projection.

    Raises:
        ConfigError: the ranks do not have parts of both.
    """
    if base.out_features % 2:
        raise ConfigError(
            f"'{name}' has {base.out_features} rows, which are not those of a gate and of an up projection of the same "
            "size; adapt it with LoRA"
        )
    if base.split == "column" and base.size > 1 and not base.gated:
        raise ConfigError(
            f"the rows of '{name}' are shared by {base.size} ranks as they come, so that one has rows of the gate and "
            "another those of the up projection; adapt it with LoRA, or use Megatron's layers"
        )
    return Interleaving(1, 2, {"adapter_gate": range(1), "adapter_up": range(1, 2)})


def part_of(base: ParallelBase, rows: Interleaving, part: str) -> ParallelBase:
    """The base layer as if it had the rows of one projection only."""
    return replace(base, out_features=base.out_features // rows.units * len(rows.parts[part]), gated=False)


class SplitAdapter(nn.ModuleDict):
    """Adapters by projection: ``adapter_q``, ``adapter_k``, ``adapter_v``, or ``adapter_gate``, ``adapter_up``.

    Args:
        adapters: some of them, each beside `part_of` the layer.
        rows: where theirs are.
    """

    def __init__(self, adapters: Mapping[str, nn.Module], rows: Interleaving) -> None:
        super().__init__(dict(adapters))
        self.rows = rows

    def base_of(self, name: str) -> ParallelBase:
        """What the layer does among the ranks, with the rows of one projection."""
        adapter = self[name]
        assert isinstance(adapter, LowRankAdapter)  # noqa: S101 - see `part_of`
        return adapter.base


class SplitLayer(AdaptedLayer):
    """A fused layer, of whose projections some have an adapter."""

    adapter: SplitAdapter

    def adapted(self, output: torch.Tensor, rows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """The base layer's output with each adapter's update in the rows of its projection.

        Cost: that of the adapters, and one copy of the output.
        """
        base = called(self.to_wrap, self.base, args, kwargs)
        counts = counts_of(base, args, kwargs)
        split = self.adapter.rows
        shards = base.size if base.whole_output else 1
        parts = {}
        for name, adapter in self.adapter.items():
            own = split.part(output, name, -1, shards)
            asked = replace(self.adapter.base_of(name), whole_output=base.whole_output)
            parts[name] = own + adapter(rows, asked, counts).to(output.dtype).view(own.shape)
        return split.replaced(output, parts, shards)
