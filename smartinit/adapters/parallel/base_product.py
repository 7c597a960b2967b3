"""``W x`` of a parallel layer without the layer itself: for inputs that must not pass its norm, or its bias, again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.adapters.parallel.collectives import gather, reduce_scatter, shard, spread, total

if TYPE_CHECKING:
    import torch

    from smartinit.adapters.parallel.base import ParallelBase
    from smartinit.adapters.parallel.flow import Product


def base_product(base: ParallelBase, x: torch.Tensor, weight: torch.Tensor, product: Product) -> torch.Tensor:
    """``W x`` in the parallel state of the layer's output.

    Args:
        base: the layer.
        x: its input on this rank.
        weight: this rank's shard of W ``(…, out, in)``.
        product: rows times a matrix.

    Cost: that of the layer, with what it sends; all calls are collective.
    """
    group, tokens = base.group, base.token_dim
    if base.split == "row":
        y = product(shard(x, -1, group) if base.whole_input else x, weight)
        if base.partial:
            return y
        return reduce_scatter(y, tokens, group) if base.sequence else total(y, group)
    if base.split == "column" and not base.partial:
        x = gather(x, tokens, group, gradient="sum") if base.sequence else spread(x, group)
    y = product(x, weight)
    return gather(y, -1, group, gradient="slice") if base.whole_output else y
