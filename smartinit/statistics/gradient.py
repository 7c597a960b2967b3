"""Two-sided sketch of a layer's weight gradient ``G = Σ δᵀ x``: its leading singular triplets without ``G`` itself.

While the data passes by, ``Y = G P = δᵀ(x P)`` and ``Z = L G = (δ Lᵀ)ᵀ x`` are added up; ``G`` is never formed. In the
first pass ``P`` and ``L`` are random and ``G ≈ Y (L Y)⁺ Z`` (Tropp, Yurtsever, Udell & Cevher, arXiv 1609.00048, alg.
4); exact when the rank of ``G`` is below the width. In later passes they are the singular directions found so far, and
``G ≈ Y Pᵀ + Lᵀ Z - Lᵀ (L Y) Pᵀ``, which leaves out nothing but ``(1 - LᵀL) G (1 - PPᵀ)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

import torch

from smartinit.errors import ConfigError
from smartinit.linalg.nystrom import random_basis
from smartinit.linalg.signs import with_largest_positive
from smartinit.spectrum import Certificate

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

_PROBES = 8
# Most entries of a float32 copy of rows: they come in the model's own precision.
_CHUNK_ENTRIES = 1 << 24
# Singular values of the core below this share of the largest are round-off of float32 sums.
_FLOOR = 1e-9

# One random matrix serves all layers of a width.
_RANDOM: WeakValueDictionary[tuple[object, ...], torch.Tensor] = WeakValueDictionary()


class Triplets(NamedTuple):
    """Leading singular triplets of a mean gradient, ``G ≈ u diag(s) v``.

    Attributes:
        u: ``(out, k)`` float32, orthonormal columns.
        s: ``(k,)`` float64, descending; zeros beyond the rank of ``G``.
        v: ``(k, in)`` float32, orthonormal rows.
        total: ``‖G‖²_F``: exact if the sketch is, else an unbiased estimate.
        certificate: of these triplets.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    total: float
    certificate: Certificate


class GradientSketch:
    """What is kept of one layer's gradient; updated, merged and stored like any statistic.

    Args:
        out_features: rows of ``G``.
        in_features: columns of ``G``.
        components: singular triplets that will be asked for, at most.
        seed: of the random matrices; equal for sketches that are to be merged.
        device: where sums are kept.
        bases: ``P (in, q)`` and ``Lᵀ (out, q)`` with orthonormal columns, from a pass before; None: random ones.

    Attributes:
        rows: activation rows that went in.
        batches: losses whose gradients were added up; the gradient is their mean.
        exact: whether ``G`` is kept as it is, because the sketch would take as much memory.

    Memory: ``4 (out·q + 2·in·q)`` bytes with ``q = 3·components``, at most ``4·out·in``; as much again for the bases
    after the first pass.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        components: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        bases: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.shape = (out_features, in_features)
        self.components = components
        self.seed = seed
        self.rows = 0
        self.batches = 0
        smaller = min(self.shape)
        width = min(smaller, 3 * max(components, 8))
        taller = min(out_features, 2 * width + 1)
        # With bases of an earlier pass the sketch was no exact one.
        self.exact = bases is None and (width + _PROBES) * out_features + taller * in_features >= (
            out_features * in_features
        )
        self.adapted = bases is not None
        self._triplets: tuple[Tensor, Tensor, Tensor, float, Tensor | None] | None = None
        shape = (out_features, in_features)
        if self.exact:
            self._sums = [torch.zeros(shape, dtype=torch.float32, device=device)]
            return
        probes = _random(in_features, _PROBES, seed + 2, device, gaussian=True)
        if bases is None:
            right = _random(in_features, width, seed, device)
            left = _random(out_features, taller, seed + 1, device)
        else:
            right, left = bases
        self._right, self._left, self._probes = right, left, probes
        self._sums = [
            torch.zeros(out_features, right.shape[1], dtype=torch.float32, device=device),
            torch.zeros(left.shape[1], in_features, dtype=torch.float32, device=device),
            torch.zeros(out_features, _PROBES, dtype=torch.float32, device=device),
        ]

    @torch.no_grad()
    def update(self, rows: Tensor, gradients: Tensor, *, scale: float = 1.0) -> None:
        """Add ``scale · δᵀ x``.

        Args:
            rows: ``(b, in)`` inputs of the layer, any float dtype; or ``(b,)`` indices, which stand for one-hot rows.
            gradients: ``(b, out)`` of the loss with respect to the layer's outputs.
            scale: a factor, such as the inverse of a loss scale.

        Raises:
            FloatingPointError: NaN or Inf in either; the sketch is unchanged then.

        Cost: ``2 b (out + in)(p + q)`` flops, ``p ≤ 2q + 1``.
        """
        if rows.shape[0] == 0:
            return
        if not _finite(rows, gradients):
            raise FloatingPointError
        self._triplets = None
        step = max(1, _CHUNK_ENTRIES // max(self.shape))
        for start in range(0, rows.shape[0], step):
            x, delta = rows[start : start + step], gradients[start : start + step].float()
            if x.is_floating_point():
                self._add(x.float(), delta, scale)
            else:
                self._add_one_hot(x, delta, scale)
        self.rows += rows.shape[0]

    def close_batch(self) -> None:
        """One loss has been differentiated, whether this layer took part or not."""
        self.batches += 1
        self._triplets = None

    def settle(self) -> None:
        """Nothing is ever pending."""

    @property
    def is_zero(self) -> bool:
        """Whether every gradient so far was zero."""
        return not any(bool(sums.any()) for sums in self._sums)

    def triplets(self, components: int) -> Triplets:
        """The leading ``components`` triplets of the mean gradient; fewer if the sketch has fewer.

        The certificate's ``captured`` is the share of ``‖G‖²`` on the triplets; ``residual`` is
        ``‖(G v - u M, Gᵀu - v Mᵀ)‖ / ‖(G v, Gᵀu)‖`` of the directions as they were before the last pass, None after
        the first one.

        Cost: ``O((out + in) q²)`` in float64, once.
        """
        if self._triplets is None:
            self._triplets = self._decompose()
        u, s, v, total, residuals = self._triplets
        k = min(components, int(s.numel()))
        rows = v[:k]
        signed = with_largest_positive(rows)
        flips = (signed * rows).sum(1).sign()
        values = s[:k].clone()
        captured = min(1.0, float(values.square().sum()) / total) if total > 0 else None
        residual = 0.0 if self.exact else None if residuals is None or not k else float(residuals[k - 1])
        certificate = Certificate(self.rows, residual=residual, captured=captured, components=k)
        return Triplets(u[:, :k] * flips, values, signed, total, certificate)

    def refined(self) -> GradientSketch:
        """An empty sketch for another pass over the same data, through the directions found so far.

        An exact one cannot be improved and comes back as it is.
        """
        if self.exact:
            return self
        if self._triplets is None:
            self._triplets = self._decompose()
        u, _, v, _, _ = self._triplets
        width = self._right.shape[1]
        bases = (v[:width].mT.contiguous(), u[:, :width].contiguous())
        return type(self)(*self.shape, self.components, seed=self.seed, device=self._sums[0].device, bases=bases)

    def copy(self) -> GradientSketch:
        """An independent copy of the sums; bases are shared, they never change."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._sums = [sums.clone() for sums in self._sums]
        return new

    def merge(self, other: GradientSketch) -> None:
        """Add the gradients of ``other``, which saw other data through the same matrices.

        Raises:
            ConfigError: they saw it through others.
        """
        same = (self.shape, self.components, self.seed, self.adapted) == (
            other.shape,
            other.components,
            other.seed,
            other.adapted,
        )
        if same and self.adapted:
            same = torch.equal(self._right, other._right.to(self._right)) and torch.equal(
                self._left, other._left.to(self._left)
            )
        if not same:
            raise ConfigError(
                f"two gradient sketches of shapes {self.shape} and {other.shape} cannot be merged: they must have one "
                "shape, seed and number of components, and start each pass from the same directions"
            )
        for mine, theirs in zip(self._sums, other._sums, strict=True):
            mine.add_(theirs.to(mine))
        self.rows += other.rows
        self.batches += other.batches
        self._triplets = None

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors; random matrices as their seed."""
        meta = [*self.shape, self.components, self.seed, self.rows, self.batches, int(self.adapted)]
        out = {"meta": torch.tensor(meta), **{f"sums.{i}": sums.clone() for i, sums in enumerate(self._sums)}}
        if self.adapted:
            out |= {"right": self._right.clone(), "left": self._left.clone()}
        return out

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`."""
        out, in_features, components, seed, rows, batches, adapted = (int(v) for v in state["meta"])
        bases = (state["right"], state["left"]) if adapted else None
        new = cls(out, in_features, components, seed=seed, device=state["sums.0"].device, bases=bases)
        new.rows, new.batches = rows, batches
        new._sums = [state[f"sums.{i}"].clone() for i in range(len(new._sums))]
        return new

    def _add(self, x: Tensor, delta: Tensor, scale: float) -> None:
        if self.exact:
            self._sums[0].addmm_(delta.mT, x, alpha=scale)
            return
        self._sums[0].addmm_(delta.mT, x @ self._right, alpha=scale)
        self._sums[1].addmm_((delta @ self._left).mT, x, alpha=scale)
        self._sums[2].addmm_(delta.mT, x @ self._probes, alpha=scale)

    def _add_one_hot(self, index: Tensor, delta: Tensor, scale: float) -> None:
        if self.exact:
            self._sums[0].index_add_(1, index, delta.mT, alpha=scale)
            return
        self._sums[0].addmm_(delta.mT, self._right[index], alpha=scale)
        self._sums[1].index_add_(1, index, (delta @ self._left).mT, alpha=scale)
        self._sums[2].addmm_(delta.mT, self._probes[index], alpha=scale)

    def _decompose(self) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
        """All triplets, computed in float64, ``‖G‖²``, and the residuals of the leading k directions for every k."""
        sums = [part.double() / max(self.batches, 1) for part in self._sums]
        if self.exact:
            u, s, v = torch.linalg.svd(sums[0], full_matrices=False)
            return u.float(), s, v.float(), float(sums[0].square().sum()), None
        y, z, probed = sums
        right, left = self._right.double(), self._left.double()
        residuals = None
        if self.adapted:
            u, s, v, residuals = _through_bases(y, z, right, left)
        else:
            u, s, v = _through_random(y, z, left)
        # Hutchinson's estimate of what the triplets leave out, their own part replaced by what it is exactly.
        seen = u @ (s.unsqueeze(1) * (v @ self._probes.double()))
        outside = float(probed.square().sum() - seen.square().sum()) / _PROBES
        own = float(s.square().sum())
        return u.float(), s, v.float(), max(own, own + outside), residuals


def _through_random(y: Tensor, z: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of ``Q (Lᵀ Q)⁺ Z`` with Q an orthonormal basis of Y's columns."""
    q = torch.linalg.qr(y).Q
    core = torch.linalg.pinv(left.mT @ q, rtol=_FLOOR) @ z
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    return q @ u, s, v


def _through_bases(y: Tensor, z: Tensor, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SVD of everything that is known of G when both bases are orthonormal: ``L``'s rows and ``P``'s columns of it."""
    small = left.mT @ y
    width = small.shape[0]
    # Householder, so that the basis is orthonormal even where Y adds nothing but round-off to L.
    q_left, r_left = torch.linalg.qr(torch.cat([left, y], 1))
    q_right, r_right = torch.linalg.qr(torch.cat([right, z.mT], 1))
    old_left, new_left = r_left[:, :width], r_left[:, width:]
    old_right, new_right = r_right[:, : right.shape[1]], r_right[:, right.shape[1] :]
    core = (new_left - old_left @ small) @ old_right.mT + old_left @ new_right.mT
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    return q_left @ u, s, v @ q_right.mT, _residuals(y, z, small)


def _residuals(y: Tensor, z: Tensor, small: Tensor) -> Tensor:
    """How far the first k columns of P and rows of L are from singular spaces, for every k."""
    # Both are orthonormal, so that what lies inside the other's span is a difference of sizes.
    inside = small.square().cumsum(0).cumsum(1).diagonal()
    size = y.square().sum(0).cumsum(0) + z.square().sum(1).cumsum(0)
    return ((size - 2 * inside).clamp_min(0) / size.clamp_min(1e-300)).sqrt().cpu()


def _finite(rows: Tensor, gradients: Tensor) -> bool:
    """Whether all entries are: one sum each, in float32 whatever the dtype."""
    total = gradients.sum(dtype=torch.float32)
    if rows.is_floating_point():
        total = total + rows.sum(dtype=torch.float32)
    return bool(torch.isfinite(total))


def _random(
    features: int, columns: int, seed: int, device: torch.device | str, *, gaussian: bool = False
) -> torch.Tensor:
    """``(features, columns)`` random matrix, one copy for everyone who holds it."""
    key = (features, columns, seed, str(device), gaussian)
    found = _RANDOM.get(key)
    if found is None:
        if gaussian:
            generator = torch.Generator("cpu").manual_seed(seed)
            found = torch.randn(features, columns, generator=generator, dtype=torch.float32, device="cpu").to(device)
        else:
            found = random_basis(features, columns, seed).to(device)
        _RANDOM[key] = found
    return found
