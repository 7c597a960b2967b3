"""What reaches adapters during passes over data: whole rows and whole gradients, whatever each rank has of them."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smartinit.adapters.parallel.call import called, counts_of
from smartinit.adapters.parallel.collectives import gather, gathered, shard, size_of
from smartinit.adapters.parallel.split import SplitAdapter
from smartinit.distributed.reduce import world_size
from smartinit.formats.rows import join_rows, shard_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch.distributed import ProcessGroup

    from smartinit.adapters.parallel.base import ParallelBase
    from smartinit.adapters.parallel.layer import AdaptedLayer

_SEQUENCE_FIRST = 3  # dimensions of Megatron's activations: (tokens, batch, features)


class Ear(nn.Module):
    """Where `smartinit.activations` puts its hooks: its input is that of a whole layer, and so is its output.

    Args:
        part: of a layer with several projections, the adapter of the one whose output it hears; None: all of it.
    """

    def __init__(self, part: str | None = None) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """``y``, the part of the layer's output that goes through here."""
        return x if y is None else y


@contextmanager
def listening(ears: Iterable[tuple[Ear, Sequence[AdaptedLayer]]], *, gradients: bool) -> Iterator[Heard]:
    """Let ears hear what reaches layers with adapters; the model computes what its base does meanwhile.

    With several ranks, what an ear cannot take is kept, and raised by `Heard.check`, which is to be called after each
    forward pass: a rank that left it alone would leave the others waiting in their next layer.

    Args:
        ears: each with its layers: one, or the same layer of several experts. Several ears at one layer have an expert
            each, or a projection, or a projection of an expert.
        gradients: whether the gradients of their outputs are wanted too.

    Cost: of a row-parallel layer, and of every layer with sequence parallelism, the inputs of all ranks are gathered.
    """
    at: dict[int, tuple[AdaptedLayer, list[Ear]]] = {}
    for ear, layers in ears:
        for layer in layers:
            at.setdefault(id(layer), (layer, []))[1].append(ear)
    around = _Around(any(layer.base.returns_tuple for layer, _ in at.values()), Heard(later=world_size() > 1))
    with ExitStack() as stack:
        for layer, own in at.values():
            if not layer.adapter_enabled:
                layer.enable_adapter_layers()
                stack.callback(layer.disable_adapter_layers)
            # In place of the method, for as long as this lasts.
            vars(layer)["adapted"] = partial(_hear, layer, own, around, gradients)
            stack.callback(vars(layer).pop, "adapted")
        yield around.heard


@dataclass
class Heard:
    """What came of a forward pass.

    Attributes:
        later: whether an error waits for `check`.
        failed: the first thing that an ear has raised.
    """

    later: bool
    failed: Exception | None = None

    def show(self, ear: Ear, rows: torch.Tensor) -> None:
        """Let an ear hear these rows, unless something has failed in this pass already."""
        try:
            if self.failed is None:
                ear(rows)
        except Exception as error:
            if not self.later:
                raise
            self.failed = error

    def check(self) -> None:
        """Raise what an ear has raised, and forget it."""
        failed, self.failed = self.failed, None
        if failed is not None:
            raise failed


@dataclass
class _Around:
    """What is known of the layers around those that no ranks share.

    Attributes:
        megatron: whether there are some of Megatron's.
        heard: what came of the pass.
        group: with sequence parallelism, whose.
        tokens: of all of its ranks.
    """

    megatron: bool
    heard: Heard
    group: ProcessGroup | None = None
    tokens: int = 0

    def settled(self, base: ParallelBase, x: torch.Tensor) -> ParallelBase:
        """The layer as it is here: a plain one between sequence-parallel ones has tokens in shards as they have."""
        if base.sequence and base.split == "column":
            self.group, self.tokens = base.group, x.shape[0] * base.size
        apart = self.group is not None and base.group is None and base.split == "none" and not base.experts
        if apart and x.dim() == _SEQUENCE_FIRST and x.shape[0] * size_of(self.group) == self.tokens:
            return replace(base, group=self.group, sequence=True)
        return base


def _hear(
    layer: AdaptedLayer,
    ears: Sequence[Ear],
    around: _Around,
    gradients: bool,
    output: torch.Tensor,
    rows: torch.Tensor,
    *args: Any,  # noqa: ANN401 - the layer's
    **kwargs: Any,  # noqa: ANN401
) -> torch.Tensor:
    """What stands for `AdaptedLayer.adapted`: the base layer's output, which has been through the ears."""
    counts = counts_of(layer.base, args, kwargs)
    base = around.settled(called(layer.to_wrap, layer.base, args, kwargs), rows)
    whole = whole_input(rows, base)
    by_part: dict[str | None, list[Ear]] = {}
    for ear in ears:
        by_part.setdefault(ear.part, []).append(ear)
    if not gradients:
        if around.megatron and whole.dim() == _SEQUENCE_FIRST:
            whole = whole.transpose(0, 1)  # as masks are: (batch, tokens)
        for same in by_part.values():
            for ear, part in zip(same, _parts(whole, counts, len(same)), strict=True):
                around.heard.show(ear, part)
        return output
    adapter = layer.adapter
    if not isinstance(adapter, SplitAdapter):
        return _through(ears, whole, output, base, counts)
    changed, shards = {}, base.size if base.whole_output else 1
    for name, same in by_part.items():
        assert name is not None  # noqa: S101 - see `smartinit.megatron.sharded_target.targets_of`
        own = adapter.rows.part(output, name, -1, shards)
        beside = replace(around.settled(adapter.base_of(name), rows), whole_output=base.whole_output)
        changed[name] = _through(same, whole, own.flatten(-3), beside, counts).view(own.shape)
    return adapter.rows.replaced(output, changed, shards)


def _through(
    ears: Sequence[Ear],
    whole: torch.Tensor,
    output: torch.Tensor,
    base: ParallelBase,
    counts: Any,  # noqa: ANN401 - the layer's argument
) -> torch.Tensor:
    """An output that has been, whole, through the ears: one, or one for each expert's rows of it."""
    outputs = _parts(whole_output(output, base), counts, len(ears))
    parts = zip(ears, _parts(whole, counts, len(ears)), outputs, strict=True)
    # The hooks change what they are given in place.
    heard = [ear(part, made.clone()) for ear, part, made in parts]
    return own_output(heard[0] if len(heard) == 1 else torch.cat(heard), base)


def _parts(rows: torch.Tensor, counts: Any, ears: int) -> Sequence[torch.Tensor]:  # noqa: ANN401 - the layer's argument
    """Of several experts, the rows of each."""
    if ears == 1:
        return (rows,)
    sizes = [int(count) for count in counts]
    return torch.split(rows, sizes)


def whole_input(x: torch.Tensor, base: ParallelBase) -> torch.Tensor:
    """All features of all tokens of a layer's input; collective over the group, without gradient."""
    if base.split == "row":
        return x if base.whole_input else gathered(x, -1, base.group)
    return gathered(x, base.token_dim, base.group) if base.sequence else x


def whole_output(y: torch.Tensor, base: ParallelBase) -> torch.Tensor:
    """All features of all tokens of a layer's output, or what has the gradient of that; collective over the group."""
    if base.size == 1:
        return y
    if base.split != "column":
        return gather(y, base.token_dim, base.group, gradient="slice") if base.sequence else y
    joined = y if base.whole_output else gather(y, -1, base.group, gradient="slice")
    return join_rows(joined.chunk(base.size, -1), gated=True, dim=-1) if base.gated else joined


def own_output(y: torch.Tensor, base: ParallelBase) -> torch.Tensor:
    """The inverse of `whole_output`, whose gradient is gathered."""
    if base.size == 1:
        return y
    if base.split != "column":
        return shard(y, base.token_dim, base.group) if base.sequence else y
    if base.gated:
        y = torch.cat([shard_rows(y, rank, base.size, gated=True, dim=-1) for rank in range(base.size)], -1)
    return y if base.whole_output else shard(y, -1, base.group)
