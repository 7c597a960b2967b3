"""Layers of which each rank may have a shard, seen whole: what the methods of initialisation compute with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from smartinit.adapters.parallel.adapter import LowRankAdapter
from smartinit.adapters.parallel.collectives import gathered, summed
from smartinit.adapters.parallel.experts import ExpertAdapter
from smartinit.adapters.parallel.weights import to_local, weight_names
from smartinit.errors import ModelError
from smartinit.formats.rows import join_rows, shard_rows
from smartinit.megatron.ear import Ear
from smartinit.targets.weight import Target, ordinary

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smartinit.adapters.parallel.base import ParallelBase
    from smartinit.adapters.parallel.layer import AdaptedLayer
    from smartinit.megatron.walk import Place


@dataclass(frozen=True)
class ShardedTarget(Target):
    """One weight with one pair of factors; sizes and `weight` are those of the whole layer.

    Attributes:
        layers: those with these factors: one, or the same layer of several experts.
        weight_name: what the weight is called in its layer.
        expert: which of the adapter's pairs; None: it has one.
        shared: whether other weights have the same factors.
    """

    layers: tuple[AdaptedLayer, ...] = field(kw_only=True)
    weight_name: str = field(kw_only=True)
    expert: int | None = field(default=None, kw_only=True)
    shared: bool = field(default=False, kw_only=True)

    @property
    def ear(self) -> Ear:
        """Its module, which hears what reaches the layers, see `smartinit.megatron.ear.listening`."""
        assert isinstance(self.module, Ear)  # noqa: S101 - see `targets_of`
        return self.module

    @property
    def layer(self) -> AdaptedLayer:
        """The (first) layer."""
        return self.layers[0]

    @property
    def base(self) -> ParallelBase:
        """What the layer does among the ranks."""
        return self.layer.base

    @property
    def adapter(self) -> LowRankAdapter:
        """The factors."""
        adapter = self.layer.adapter
        assert isinstance(adapter, LowRankAdapter)  # noqa: S101 - see `targets_of`
        return adapter

    @property
    def counts(self) -> bool:
        """The ranks of a group hear the same rows, of which the first one's count."""
        return self.base.rank == 0

    def numbers(self) -> torch.Tensor | None:
        """This rank's shard of the weight; None unless it is an ordinary tensor."""
        held = self._held()
        return None if held is None else ordinary(to_local(held.detach()))

    def weight(self) -> torch.Tensor:
        """``W (out, in)`` with the rows in the order of a single process; collective over the group.

        Raises:
            ModelError: this rank's shard cannot be read as a matrix.

        Cost: the whole weight is on every rank while it is used.
        """
        stored, dim = self.stored_weight(), self.base.weight_dim
        if dim is None:
            return stored
        shards = gathered(stored, dim, self.base.group).chunk(self.base.size, dim)
        return join_rows(shards, gated=self.base.gated and dim == 0, dim=dim)

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a whole ``(out, in)``."""
        dim = self.base.weight_dim
        if dim is None:
            return whole
        return shard_rows(whole, self.base.rank, self.base.size, gated=self.base.gated and dim == 0, dim=dim)

    def delta(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        """This rank's shard of ``s·B A`` of whole factors, in the wider of float32 and their dtype."""
        wide = torch.promote_types(a.dtype, torch.float32)
        if self.base.weight_dim == 0:
            b = self.own(b)
        elif self.base.weight_dim == 1:
            a = self.own(a)
        return (b.to(wide) @ a.to(wide)).mul_(scaling)

    def changeable_weight(self) -> torch.Tensor:
        """This rank's shard, to be written to.

        Raises:
            ModelError: it cannot be read, or is not stored but computed from other parameters.
        """
        stored = self.stored_weight()
        if not isinstance(self._held(), torch.nn.Parameter):
            raise ModelError(f"the weight of '{self.name}' is not a parameter, so it cannot be changed in place")
        return stored

    def has_finite_weight(self) -> bool:
        """Whether no shard has NaN or Inf; collective over the group."""
        bad = torch.tensor([float(not super().has_finite_weight())], device=self.device)
        return not bool(summed(bad, self.base.group))

    def _held(self) -> torch.Tensor | None:
        return getattr(self.layer.to_wrap, self.weight_name, None)

    def _stored(self) -> torch.Tensor:
        tensors = (self._held(), *self.layer.to_wrap.parameters(), *self.layer.to_wrap.buffers())
        found = next((tensor for tensor in tensors if isinstance(tensor, torch.Tensor)), None)
        if found is None:
            raise ModelError(f"the layer '{self.name}' holds no tensor")
        return to_local(found.detach())


def targets_of(layers: Iterable[tuple[Place, AdaptedLayer]], *, share_experts: bool) -> list[ShardedTarget]:
    """One target for each pair of factors, in the order of the layers, under the names of the whole model.

    Args:
        layers: with their places.
        share_experts: whether the experts of a layer have one adapter.

    Raises:
        ModelError: an adapter of another kind, or one that is merged.
    """
    found: dict[int, tuple[Place, list[AdaptedLayer]]] = {}
    for place, layer in layers:
        adapter = layer.adapter
        if not isinstance(adapter, LowRankAdapter):
            raise ModelError(
                f"the adapter of '{place.name}' is a {type(adapter).__name__}, which the methods of initialisation do "
                "not know; start it by one of Megatron's (lora_A_init_method='xavier')"
            )
        if layer.merged:
            raise ModelError(
                f"the adapter of '{place.name}' is merged into its layer; unmerge it before it is given another start"
            )
        found.setdefault(id(adapter), (place, []))[1].append(layer)
    return [target for place, same in found.values() for target in _targets(place, same, share_experts=share_experts)]


def _targets(place: Place, layers: list[AdaptedLayer], *, share_experts: bool) -> list[ShardedTarget]:
    base, adapter = layers[0].base, layers[0].adapter
    shared = share_experts and isinstance(adapter, LowRankAdapter) and adapter.expert

    def target(name: str, weight: str, expert: int | None = None) -> ShardedTarget:
        return ShardedTarget(
            name,
            Ear(),
            base.out_features,
            base.in_features,
            "linear",
            place.name,
            layers=tuple(layers),
            weight_name=weight,
            expert=expert,
            shared=shared,
        )

    if isinstance(adapter, ExpertAdapter):  # named as Megatron's checkpoints number the weights of a grouped layer
        names = [f"{place.whole_name}.weight{place.first_expert + i}" for i in range(base.experts)]
        return [target(name, weight_names(base)[i], i) for i, name in enumerate(names)]
    return [target(place.experts_name if shared else place.whole_name, weight_names(base)[0])]
