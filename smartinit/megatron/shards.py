"""What this rank has of the adapters of a whole model, under the names that they have there."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from smartinit.adapters.parallel.collectives import rank_of, size_of
from smartinit.adapters.parallel.stored import stored
from smartinit.errors import ModelError
from smartinit.formats.megatron_layout import Ranges, parts
from smartinit.megatron.walk import adapted_layers

if TYPE_CHECKING:
    from smartinit.adapters.parallel.layer import AdaptedLayer
    from smartinit.adapters.parallel.stored import Stored
    from smartinit.formats.megatron_folder import ShardedFolder
    from smartinit.megatron.walk import Model, Place


Parts = tuple[tuple[Ranges, tuple[int, ...]], ...]
_PROJECTION = re.compile(r"adapter\.(adapter_\w+)\.")


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

    @property
    def projection(self) -> str:
        """The layer's name, of an adapter of one of its projections ``….linear_qkv.adapter_q``."""
        match = _PROJECTION.match(self.key.removeprefix(f"{self.layer}."))
        return self.layer if match is None else f"{self.layer}.{match[1]}"


def number_of(text: str) -> int:
    """64 bits that stand for a text, the same on every rank."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def read_part(saved: ShardedFolder, shard: Shard) -> torch.Tensor:
    """What a folder has for a parameter.

    Raises:
        ArtefactError, VerificationError: see `ShardedFolder.read`.
    """
    cuts = [(at, saved.read(shard.key, ranges)) for ranges, at in shard.parts]
    out = torch.empty(shard.parameter.shape, dtype=saved.dtype(shard.key))
    for at, cut in cuts:
        out[tuple(slice(first, first + n) for first, n in zip(at, cut.shape, strict=True))] = cut
    return out


def adapter_shards(model: Model) -> dict[str, Shard]:
    """Every parameter of the model's adapters, by key.

    Raises:
        ModelError: two have one key; one has no numbers, or is in shards that this package has not made.
    """
    found: dict[str, Shard] = {}
    for place, layer in adapted_layers(model):
        for shard in shards_of(place, layer):
            if shard.key in found:
                raise ModelError(
                    f"two adapters of this rank have the name '{shard.key}' in the whole model; give the layers of "
                    "every chunk their layer_number"
                )
            found[shard.key] = shard
    return found


def shards_of(place: Place, layer: AdaptedLayer) -> list[Shard]:
    """The parameters of one layer's adapter, in the order of `smartinit.adapters.parallel.stored.stored`.

    Raises:
        ModelError: see `adapter_shards`.
    """
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
