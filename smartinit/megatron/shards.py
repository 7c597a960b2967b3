"""What this rank has of the adapters of a whole model, under the names that they have there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smartinit.adapters.parallel.collectives import rank_of, size_of
from smartinit.adapters.parallel.stored import stored
from smartinit.errors import ModelError
from smartinit.formats.megatron_layout import Ranges, parts
from smartinit.megatron.walk import adapted_layers

if TYPE_CHECKING:
    import torch

    from smartinit.adapters.parallel.layer import AdaptedLayer
    from smartinit.adapters.parallel.stored import Stored
    from smartinit.megatron.walk import Model, Place


Parts = tuple[tuple[Ranges, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Shard:
    """One parameter of an adapter, on this rank.

    Attributes:
        key: its name in the whole model.
        layer: the name of the adapted layer in the whole model.
        parameter: the numbers.
        dim: rank of the adapter that it belongs to.
        alpha: of that adapter.
        shape: of the whole tensor.
        parts: which parts of it the parameter has, and where they start in the parameter.
        gated: whether its rows are those of a gate and then of an up projection.
    """

    key: str
    layer: str
    parameter: torch.Tensor
    dim: int
    alpha: float
    shape: tuple[int, ...]
    parts: Parts
    gated: bool


def adapter_shards(model: Model) -> dict[str, Shard]:
    """Every parameter of the model's adapters, by key.

    Raises:
        ModelError: two have one key; one has no numbers, or is in shards that this package has not made.
    """
    found: dict[str, Shard] = {}
    for place, layer in adapted_layers(model):
        for shard in _of_layer(place, layer):
            if shard.key in found:
                raise ModelError(
                    f"two adapters of this rank have the name '{shard.key}' in the whole model; give the layers of "
                    "every chunk their layer_number"
                )
            found[shard.key] = shard
    return found


def _of_layer(place: Place, layer: AdaptedLayer) -> list[Shard]:
    out = []
    for part in stored(layer.adapter, layer.base):
        key = f"{place.whole_name}.{part.path}" if place.whole_name else part.path
        parameter = part.parameter
        if parameter.is_meta or hasattr(parameter, "placements"):
            what = "no numbers yet (device meta)" if parameter.is_meta else "shards of torch's own (DTensor)"
            raise ModelError(f"the adapter weight '{key}' has {what}; expected plain tensors on a device")
        shape, cuts = _whole(part)
        if part.by_expert:  # of each expert its own
            shape, cuts = _among_experts(shape, cuts, place)
        out.append(Shard(key, place.whole_name, parameter, part.dim, part.alpha, shape, cuts, part.base.gated))
    return out


def _whole(part: Stored) -> tuple[tuple[int, ...], Parts]:
    """Shape of the whole tensor, and this rank's parts of it."""
    shape, dim, base = list(part.parameter.shape), part.partition_dim, part.base
    if dim is not None:
        shape[dim] *= base.size
    return tuple(shape), tuple(parts(shape, dim, base.rank, base.size, gated=part.gated))


def _among_experts(shape: tuple[int, ...], cuts: Parts, place: Place) -> tuple[tuple[int, ...], Parts]:
    """The same with the experts of the other ranks, along dimension 0."""
    count, start = shape[0], rank_of(place.ep_group) * shape[0]
    moved = tuple((((start, start + count), *ranges[1:]), at) for ranges, at in cuts)
    return (count * size_of(place.ep_group), *shape[1:]), moved
