"""A low-rank product that follows tokens and features through a parallel layer, into the state of its output.

What travels between the ranks has r numbers for a token where a layer of the same kind as the base would send ``in`` or
``out`` of them: whole factors are gathered from their shards (``r·in`` numbers, whatever the number of tokens), applied
to the tokens that a rank has, and only the r numbers in between are gathered or summed. By the base's kind:

===========================  ============================================  ==============================
base                         factors                                       in between
===========================  ============================================  ==============================
column                       A ``(r, in)`` whole, B ``(out/t, r)`` own     z as it is; its gradient summed
column, sequence             same                                          z gathered; reduce-scattered
column, output gathered      A and B whole                                 nothing
row                          A ``(r, in/t)`` own, B ``(out, r)`` whole     z summed
row, sequence                same                                          z reduce-scattered; gathered
row, sequence, all-to-all    A and B own                                   z summed; outputs exchanged
column or row, partial       as column or row                              nothing: outputs are addends
===========================  ============================================  ==============================

The gradient of a factor that is gathered goes back to its shards: cut where every rank has the whole of it, else
reduce-scattered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.adapters.parallel.collectives import (
    exchange,
    gather,
    reduce_scatter,
    shard,
    spread,
    total,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from smartinit.adapters.parallel.base import ParallelBase
    from smartinit.adapters.parallel.collectives import Gradient

    Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """``(rows (..., n), matrix (m, n)) -> (..., m)``; of several experts' matrices, each with its own rows."""


def low_rank(
    base: ParallelBase,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    product: Product,
    *,
    all_to_all: bool = False,
) -> torch.Tensor:
    """``s·B A x``, in the parallel state of the base layer's output.

    Args:
        base: the layer; what it does among the ranks.
        x: the layer's input on this rank.
        a: this rank's shard of A ``(…, r, in)``.
        b: this rank's shard of B ``(…, out, r)``.
        scaling: ``s``; it multiplies the r numbers in between, of which there are least.
        product: rows times a matrix.
        all_to_all: of a row-parallel layer with sequence parallelism, exchange outputs, not factors.

    Cost: see the table of this module; all calls are collective.
    """
    group = base.group
    if base.split == "column":
        return _column(base, x, a, b, scaling, product)
    if base.split == "row":
        return _row(base, x, a, b, scaling, product, all_to_all=all_to_all)
    if base.sequence:  # whole factors, each rank with tokens of its own
        a, b = spread(a, group), spread(b, group)
    return product(product(x, a) * scaling, b)


def _column(
    base: ParallelBase,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    product: Product,
) -> torch.Tensor:
    group, tokens = base.group, base.token_dim
    apart = base.sequence or base.partial
    z = product(x, gather(a, -2, group, gradient="sum" if apart else "slice")) * scaling
    if base.partial:
        y = product(z, b)
        return gather(y, -1, group, gradient="slice") if base.whole_output else y
    after: Gradient = "slice" if base.whole_output else "sum"
    if base.sequence:
        z = gather(z, tokens, group, gradient=after)
    elif not base.whole_output:
        z = spread(z, group)
    return product(z, gather(b, -2, group, gradient="slice") if base.whole_output else b)


def _row(
    base: ParallelBase,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    product: Product,
    *,
    all_to_all: bool,
) -> torch.Tensor:
    group, tokens = base.group, base.token_dim
    z = product(shard(x, -1, group) if base.whole_input else x, a) * scaling
    if base.partial:
        return product(z, gather(b, -2, group, gradient="sum"))
    if base.sequence and all_to_all:
        return exchange(product(spread(total(z, group), group), b), tokens, -1, group)
    if base.sequence:
        return product(reduce_scatter(z, tokens, group), gather(b, -2, group, gradient="sum"))
    return product(total(z, group), gather(b, -2, group, gradient="slice"))
