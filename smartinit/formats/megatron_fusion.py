"""The projections of a fused layer as one pair of factors, and one pair as its projections.

Rows of ``linear_qkv``, for G query groups of H/G heads of size d: seen as ``(H + 2G, d)``, block g holds the heads of
its group, then its key, then its value. Rows of ``linear_fc1``: those of the gate, then those of up.

A fused layer has one A. Where the projections share theirs, only the rows of B are put together, and nothing is lost.
Where they do not, ``[A_q; A_k; A_v]`` with a block-wise B of the sum of the ranks is exact, and a truncated SVD of
that is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from smartinit.errors import ConfigError
from smartinit.factors import Factors
from smartinit.formats.convert import distance, product_norm, recompress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smartinit.formats.megatron_names import Part


@dataclass(frozen=True)
class HeadShape:
    """How the rows of q, k and v go together.

    Attributes:
        heads: H, of the queries.
        groups: G, of heads that share a key and a value.
        size: d, of a head.

    Raises:
        ConfigError: one is below 1, or the groups do not divide the heads.
    """

    heads: int
    groups: int
    size: int

    def __post_init__(self) -> None:
        """Refuse what no model has."""
        if min(self.heads, self.groups, self.size) < 1 or self.heads % self.groups:
            raise ConfigError(
                f"{self.heads} heads in {self.groups} query groups of head size {self.size} cannot be; expected "
                "positive numbers, and heads that the groups divide"
            )

    @property
    def rows(self) -> dict[Part, int]:
        """Of each projection."""
        return {"q": self.heads * self.size, "k": self.groups * self.size, "v": self.groups * self.size}


@dataclass(frozen=True, eq=False)
class Update:
    """What an adapter adds to one weight: ``s·B A``.

    Attributes:
        a: ``(r, in)``, of all experts together ``(E, r, in)``.
        b: ``(out, r)``, or ``(E, out, r)``.
        scaling: s.
        magnitude: ``(out,)`` DoRA's, or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of one A."""
        return int(self.a.shape[-2])

    @property
    def alpha(self) -> float:
        """``s·r``, whole where it is so but for rounding."""
        alpha = self.scaling * self.rank
        return float(round(alpha)) if abs(alpha - round(alpha)) <= 1e-12 * abs(alpha) else alpha


def join_projections(parts: Mapping[Part, torch.Tensor], heads: HeadShape | None) -> torch.Tensor:
    """Rows of the projections in the order of the fused layer.

    Args:
        parts: q, k and v, or gate and up; ``(rows, …)``.
        heads: of q, k and v.
    """
    if "q" not in parts:
        return torch.cat([parts["gate"], parts["up"]])
    assert heads is not None  # noqa: S101 - callers look
    blocks = [parts[name].unflatten(0, (heads.groups, -1, heads.size)) for name in ("q", "k", "v")]
    return torch.cat(blocks, dim=1).flatten(0, 2)


def split_projections(whole: torch.Tensor, names: Sequence[Part], heads: HeadShape | None) -> dict[Part, torch.Tensor]:
    """The inverse of `join_projections`: each projection's rows, contiguous.

    Args:
        whole: ``(rows, …)``, that the heads fit.
        names: of the projections, in their order.
        heads: of q, k and v.
    """
    if "q" not in names:
        return dict(zip(names, (half.contiguous() for half in whole.chunk(2)), strict=True))
    assert heads is not None  # noqa: S101 - callers look
    per_group = heads.heads // heads.groups
    blocks = whole.unflatten(0, (heads.groups, per_group + 2, heads.size)).split([per_group, 1, 1], dim=1)
    return {name: block.flatten(0, 2).contiguous() for name, block in zip(names, blocks, strict=True)}


def shares_input(updates: Sequence[Update]) -> bool:
    """Whether the longest A begins with each of the others, bitwise, so that one A does for all."""
    longest = max(updates, key=lambda update: update.rank).a
    return all(torch.equal(longest[: update.rank], update.a) for update in updates)


def fuse(parts: Mapping[Part, Update], rows: Mapping[Part, int], heads: HeadShape | None) -> Update:
    """One pair of factors for all projections, exactly; a projection without an adapter has rows of zeros.

    With one A for all (see `shares_input`) the rank is that of the longest, else the sum of all. The scaling is that of
    the first of the longest; others have the ratio in their rows of B, which costs them a rounding.

    Args:
        parts: by projection; at least one.
        rows: of every projection of the layer.
        heads: of q, k and v.

    Raises:
        ConfigError: one of them has DoRA's magnitude, and another has no adapter.

    Cost: O((in + out)·r).
    """
    updates = list(parts.values())
    shared = shares_input(updates)
    first = max(updates, key=lambda update: update.rank)
    a = first.a if shared else torch.cat([update.a for update in updates])
    dtype = torch.promote_types(a.dtype, max((u.b.dtype for u in updates), key=lambda t: torch.finfo(t).bits))
    blocks: dict[Part, torch.Tensor] = {}
    start = 0
    for name, count in rows.items():
        block = torch.zeros(count, len(a), dtype=dtype)
        if (update := parts.get(name)) is not None:
            if not shared:
                start = sum(other.rank for key, other in _before(parts, name))
            block[:, start : start + update.rank] = rescaled(update, first.scaling).b
        blocks[name] = block
    return Update(a.to(dtype), join_projections(blocks, heads), first.scaling, _magnitude(parts, rows, heads))


def truncated(update: Update, rank: int) -> tuple[Update, float]:
    """The best update of at most ``rank`` (Eckart-Young), and its relative error in the Frobenius norm.

    Raises:
        ConfigError: ``rank`` below 1.
    """
    if rank < 1:
        raise ConfigError(f"rank={rank}: expected at least 1")
    pair = Factors(update.a, update.b)
    small = recompress(pair, rank)
    norm = product_norm(pair)
    return replace(update, a=small.a, b=small.b), distance(pair, small) / norm if norm else 0.0


def divide(update: Update, names: Sequence[Part], heads: HeadShape | None) -> dict[Part, Update]:
    """The projections of a fused layer: the same A for each, and its own rows of B.

    Where training has left columns of a projection's B zero that others use, as in what `fuse` has made of several A,
    that projection goes without them: it computes the same with its own rank and scaling.

    Args:
        update: of the fused layer, its rows those of the heads.
        names: of the projections, in their order.
        heads: of q, k and v.
    """
    rows = split_projections(update.b, names, heads)
    magnitudes = None if update.magnitude is None else split_projections(update.magnitude, names, heads)
    divided: dict[Part, Update] = {}
    for name, b in rows.items():
        used = (b != 0).any(dim=0)
        alive = bool(used.any()) and not bool(used.all())
        a, own = (update.a[used], b[:, used]) if alive else (update.a, b)
        divided[name] = Update(a, own, update.scaling, None if magnitudes is None else magnitudes[name])
    return divided


def rescaled(update: Update, scaling: float) -> Update:
    """The same update under another scaling: the ratio goes into B.

    Raises:
        ConfigError: the new scaling is zero and the old one is not.
    """
    if update.scaling == scaling:
        return update
    if not scaling:
        raise ConfigError("an update that is not zero cannot have a scaling of zero; give it an alpha above 0")
    b = (update.b.double() * (update.scaling / scaling)).to(update.b.dtype)
    return replace(update, b=b, scaling=scaling)


def padded(update: Update, rank: int) -> Update:
    """The same update of a larger rank and of the same scaling: zeros in A and in B, which no gradient reaches."""
    more = rank - update.rank
    if more <= 0:
        return update
    a = torch.nn.functional.pad(update.a, (0, 0, 0, more))
    return replace(update, a=a, b=torch.nn.functional.pad(update.b, (0, more)))


def _before(parts: Mapping[Part, Update], name: Part) -> list[tuple[Part, Update]]:
    names = list(parts)
    return [(key, parts[key]) for key in names[: names.index(name)]]


def _magnitude(parts: Mapping[Part, Update], rows: Mapping[Part, int], heads: HeadShape | None) -> torch.Tensor | None:
    having = {name: update.magnitude for name, update in parts.items() if update.magnitude is not None}
    if not having:
        return None
    missing = [name for name in rows if name not in having]
    if missing:
        raise ConfigError(
            f"{' and '.join(having)} have DoRA magnitudes, but {' and '.join(missing)} of the same fused layer "
            "none, and those are norms of the base weight's rows; adapt all projections of the layer with DoRA"
        )
    return join_projections(having, heads)
