"""Layers of which each rank may have a shard, seen whole: what the methods of initialisation compute with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from smartinit.adapters.parallel.adapter import LowRankAdapter
from smartinit.adapters.parallel.collectives import gathered, summed
from smartinit.adapters.parallel.dtensors import to_local
from smartinit.adapters.parallel.experts import ExpertAdapter
from smartinit.adapters.parallel.split import SplitAdapter
from smartinit.adapters.parallel.weights import weight_names
from smartinit.errors import ModelError
from smartinit.formats.rows import join_rows, shard_rows
from smartinit.megatron.ear import Ear
from smartinit.targets.weight import Target, ordinary, storage_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from smartinit.adapters.parallel.base import ParallelBase
    from smartinit.adapters.parallel.layer import AdaptedLayer
    from smartinit.megatron.walk import Place
    from smartinit.targets.weight import Storage


@dataclass(frozen=True)
class ShardedTarget(Target):
    """One weight with one pair of factors; sizes and `weight` are those of the whole layer.

    Of a layer with adapters for its projections that is one projection's, whose weight is some rows of the layer's.

    Attributes:
        layers: those with these factors: one, or the same layer of several experts.
        weight_name: what the weight is called in its layer.
        expert: which of the adapter's pairs; None: it has one.
        shared: whether other weights have the same factors.
        part: the projection's adapter in the layer; None: the layer has one adapter.
    """

    layers: tuple[AdaptedLayer, ...] = field(kw_only=True)
    weight_name: str = field(kw_only=True)
    expert: int | None = field(default=None, kw_only=True)
    shared: bool = field(default=False, kw_only=True)
    part: str | None = field(default=None, kw_only=True)

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
        """What the layer does among the ranks; of a projection, as if it had no other rows."""
        return self.adapter.base

    @property
    def adapter(self) -> LowRankAdapter:
        """The factors."""
        adapter = self.layer.adapter
        if self.part is not None:
            assert isinstance(adapter, SplitAdapter)  # noqa: S101 - see `targets_of`
            adapter = adapter[self.part]
        assert isinstance(adapter, LowRankAdapter)  # noqa: S101 - see `targets_of`
        return adapter

    @property
    def note(self) -> str:
        """Under which name the layer notes what the weight has given up; no two weights of a layer have the same."""
        return self.weight_name if self.part is None else f"{self.weight_name}_{self.part}"

    @property
    def counts(self) -> bool:
        """The ranks of a group hear the same rows, of which the first one's count."""
        return self.base.rank == 0

    @property
    def storage(self) -> Storage | None:
        """Where this rank's shard lies; see `Target.storage`."""
        stored = self._layers_shard()
        if stored is None:
            return None
        return storage_of(stored if self.part is None else self._rows(stored))

    def numbers(self) -> torch.Tensor | None:
        """This rank's shard of the weight, of a projection a copy; None unless it is an ordinary tensor."""
        stored = self._layers_shard()
        return stored if stored is None or self.part is None else self._rows(stored).flatten(0, 2)

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
        """This rank's shard, if `change_weight` can write another one.

        Raises:
            ModelError: it cannot be read, or is not stored but computed from other parameters.
        """
        stored = self.stored_weight()
        if not isinstance(self._held(), torch.nn.Parameter):
            raise ModelError(f"the weight of '{self.name}' is not a parameter, so it cannot be changed in place")
        return stored

    def change_weight(self, shard: torch.Tensor) -> None:
        """Write another shard on this rank; one rounding, to the stored dtype.

        Raises:
            ModelError: see `changeable_weight`.
        """
        self.changeable_weight()
        stored = self._layers_shard()
        assert stored is not None  # noqa: S101 - it can be read
        memory = stored if self.part is None else self._rows(stored)
        memory.copy_(shard.view(memory.shape))

    def has_finite_weight(self) -> bool:
        """Whether no shard has NaN or Inf; collective over the group."""
        bad = torch.tensor([float(not super().has_finite_weight())], device=self.device)
        return not bool(summed(bad, self.base.group))

    def _layers_shard(self) -> torch.Tensor | None:
        """The memory of this rank's shard of all the layer's rows; None unless it is an ordinary tensor."""
        held = self._held()
        return None if held is None else ordinary(to_local(held.detach()))

    def _rows(self, shard: torch.Tensor) -> torch.Tensor:
        """The projection's rows, the same memory."""
        adapter = self.layer.adapter
        assert isinstance(adapter, SplitAdapter)  # noqa: S101 - as it has projections
        assert self.part is not None  # noqa: S101
        return adapter.rows.part(shard, self.part, 0)

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
        if not isinstance(adapter, LowRankAdapter | SplitAdapter):
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


def _targets(place: Place, layers: list[AdaptedLayer], *, share_experts: bool) -> Iterator[ShardedTarget]:
    adapter = layers[0].adapter
    if isinstance(adapter, SplitAdapter):
        for part in adapter.rows.parts:
            if part in adapter:
                yield from _of_adapter(place, layers, adapter[part], part=part)
        return
    yield from _of_adapter(place, layers, adapter, share_experts=share_experts)


def _of_adapter(
    place: Place,
    layers: list[AdaptedLayer],
    adapter: nn.Module,
    *,
    share_experts: bool = False,
    part: str | None = None,
) -> Iterator[ShardedTarget]:
    """The targets of one adapter: one, or one for each expert."""
    assert isinstance(adapter, LowRankAdapter)  # noqa: S101 - see `targets_of`
    base, shared = adapter.base, share_experts and adapter.expert
    ending = "" if part is None else f".{part}"  # as in `smartinit.formats`: ….linear_qkv.adapter_q

    def target(name: str, weight: str, expert: int | None = None) -> ShardedTarget:
        return ShardedTarget(
            f"{name}{ending}",
            Ear(part),
            base.out_features,
            base.in_features,
            "linear",
            f"{place.name}{ending}",
            layers=tuple(layers),
            weight_name=weight,
            expert=expert,
            shared=shared,
            part=part,
        )

    if isinstance(adapter, ExpertAdapter):  # named as Megatron's checkpoints number the weights of a grouped layer
        for i, weight in enumerate(weight_names(base)):
            yield target(f"{place.whole_name}.weight{place.first_expert + i}", weight, i)
    else:
        yield target(place.experts_name if shared else place.whole_name, weight_names(base)[0])
