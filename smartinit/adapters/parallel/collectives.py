"""Collective operations with gradients, over one process group; without a group, or alone in it, each does nothing.

What a tensor is to the ranks of a group decides which gradient is right: a *whole* tensor is the same on every rank
and so is its gradient; *shards* are pieces of one along a dimension, and so are their gradients; *addends* sum up to
one. Each function says what it makes of what. All of them must be called by every rank of the group, in one order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Gradient = Literal["slice", "sum"]


def size_of(group: ProcessGroup | None) -> int:
    """Ranks in the group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def rank_of(group: ProcessGroup | None) -> int:
    """This process's number in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def spread(x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """A whole tensor, for use in shards of something: as it is; its gradient is the sum of all ranks' addends."""
    return x if size_of(group) == 1 else _Spread.apply(x, group)  # type: ignore[no-untyped-call]


def total(x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """The sum of all ranks' addends, whole on every rank; the gradient goes to each addend as it is."""
    return x if size_of(group) == 1 else _Total.apply(x, group)  # type: ignore[no-untyped-call]


def gather(x: torch.Tensor, dim: int, group: ProcessGroup | None, *, gradient: Gradient) -> torch.Tensor:
    """The whole tensor from shards along ``dim``, which are of one size.

    Args:
        x: this rank's shard.
        dim: along which.
        group: whose.
        gradient: ``"slice"`` if every rank does the same with the whole, so that its gradient is whole as well;
            ``"sum"`` if each does its own, so that the gradients are addends (a reduce-scatter).
    """
    if size_of(group) == 1:
        return x
    return _Gather.apply(x, dim % x.dim(), group, gradient)  # type: ignore[no-any-return, no-untyped-call]


def shard(x: torch.Tensor, dim: int, group: ProcessGroup | None) -> torch.Tensor:
    """This rank's shard of a whole tensor; the gradient is gathered, whole again."""
    return x if size_of(group) == 1 else _Shard.apply(x, dim % x.dim(), group)  # type: ignore[no-untyped-call]


def reduce_scatter(x: torch.Tensor, dim: int, group: ProcessGroup | None) -> torch.Tensor:
    """This rank's shard of the sum of all ranks' addends; the gradient is gathered."""
    return x if size_of(group) == 1 else _ReduceScatter.apply(x, dim % x.dim(), group)  # type: ignore[no-untyped-call]


def exchange(x: torch.Tensor, split: int, join: int, group: ProcessGroup | None) -> torch.Tensor:
    """From shards along ``join`` to shards along ``split`` in one all-to-all; the gradient goes the same way back."""
    if size_of(group) == 1:
        return x
    return _Exchange.apply(x, split % x.dim(), join % x.dim(), group)  # type: ignore[no-any-return, no-untyped-call]


def first_of(x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """What the group's first rank has, on every rank; without gradient.

    Ranks that computed the same may differ in the last digit, or in a sign.
    """
    if size_of(group) == 1:
        return x
    out = x.detach().clone().contiguous()
    dist.broadcast(out, src=dist.get_global_rank(group, 0), group=group)  # type: ignore[arg-type]
    return out


def gathered(x: torch.Tensor, dim: int, group: ProcessGroup | None) -> torch.Tensor:
    """As `gather`, without gradient."""
    return x.detach() if size_of(group) == 1 else _all_gather(x.detach(), dim % x.dim(), group)


def summed(x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """As `total`, without gradient; never ``x`` itself."""
    return _all_reduce(x.detach(), group)


def _all_reduce(x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    if size_of(group) > 1:
        dist.all_reduce(out, group=group)
    return out


def _all_gather(x: torch.Tensor, dim: int, group: ProcessGroup | None) -> torch.Tensor:
    size = size_of(group)
    x = x.contiguous()
    out = x.new_empty(size * x.shape[0] if x.dim() else size, *x.shape[1:])
    _into("all_gather_single", "all_gather_into_tensor")(out, x, group=group)
    return out if dim == 0 else torch.cat(out.chunk(size), dim)


def _scattered_sum(x: torch.Tensor, dim: int, group: ProcessGroup | None) -> torch.Tensor:
    size = size_of(group)
    if x.shape[dim] % size:
        raise ValueError(f"{x.shape[dim]} entries along dimension {dim} cannot be shared evenly by {size} ranks")
    x = x.contiguous() if dim == 0 else torch.cat(x.chunk(size, dim))
    out = x.new_empty(x.shape[0] // size, *x.shape[1:])
    _into("reduce_scatter_single", "reduce_scatter_tensor")(out, x, group=group)
    return out


def _own(x: torch.Tensor, dim: int, group: ProcessGroup | None) -> torch.Tensor:
    size = size_of(group)
    if x.shape[dim] % size:
        raise ValueError(f"{x.shape[dim]} entries along dimension {dim} cannot be shared evenly by {size} ranks")
    return x.chunk(size, dim)[rank_of(group)].contiguous()


def _into(name: str, before: str) -> Any:  # noqa: ANN401 - a collective of torch.distributed
    """A collective by its name, or by the one that it had before torch 2.13."""
    return getattr(dist, name, None) or getattr(dist, before)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:  # noqa: ANN401 - torch's
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        return total(grads[0], ctx.group), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:  # noqa: ANN401
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        return spread(grads[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: ProcessGroup, gradient: Gradient) -> torch.Tensor:  # noqa: ANN401
        ctx.dim, ctx.group, ctx.gradient = dim, group, gradient
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        own = shard if ctx.gradient == "slice" else reduce_scatter
        return own(grads[0], ctx.dim, ctx.group), None, None, None


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:  # noqa: ANN401
        ctx.dim, ctx.group = dim, group
        return _own(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        return gather(grads[0], ctx.dim, ctx.group, gradient="slice"), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:  # noqa: ANN401
        ctx.dim, ctx.group = dim, group
        return _scattered_sum(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        return gather(grads[0], ctx.dim, ctx.group, gradient="sum"), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, split: int, join: int, group: ProcessGroup) -> torch.Tensor:  # noqa: ANN401
        ctx.split, ctx.join, ctx.group = split, join, group
        size = size_of(group)
        if x.shape[split] % size:
            raise ValueError(f"{x.shape[split]} entries along dimension {split} cannot be shared by {size} ranks")
        parts = torch.cat([part.unsqueeze(0) for part in x.chunk(size, split)])
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return torch.cat(received.unbind(), join)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        return exchange(grads[0], ctx.join, ctx.split, ctx.group), None, None, None
