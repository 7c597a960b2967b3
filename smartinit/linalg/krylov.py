"""Leading singular triplets by block Krylov iteration: two products with W a step, stopped by residuals.

Golub-Kahan block Lanczos on WᵀW with full reorthogonalisation and thick restarts (Musco & Musco, arXiv 1504.05477,
alg. 2; Golub, Luk & Overton, doi 10.1145/355945.355946). The basis Q (D×n, rows) lies on the shorter side of W; its
image ``P = Q Wᵀ`` is kept, so ``W`` restricted to the basis is known exactly and Rayleigh-Ritz is an eigenproblem of
``P Pᵀ`` (D×D, float64). The remainder of the last block tells every residual for free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from smartinit.linalg.threads import small_eigh
from smartinit.linalg.triplets import Triplets, dense_triplets, frobenius_norms, with_fixed_signs, working_copy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MAX_STEPS = 96
# A gap below this share of σ_k counts as this share: which mixture of (nearly) equal directions is found is a matter
# of chance, and their energy is right long before.
_GAP_FLOOR = 1e-2
# Ritz values closer than this may be copies of one singular value: a block sees only as many copies as it is wide.
_SAME_VALUE = 1e-3
# Below these sizes a dense eigenproblem is cheaper than the iteration.
_DENSE_SIDE, _DENSE_SHARE = 320, 6
_RESTART_AFTER = 24


def top_triplets(
    weight: Tensor,
    k: int,
    *,
    seeds: Sequence[int],
    tolerance: float = 3e-5,
    iterations: int | None = None,
    oversampling: int = 8,
    max_steps: int = MAX_STEPS,
) -> Triplets:
    """The k leading singular triplets of s matrices of one shape, descending.

    Iterates until the estimated relative error of ``U Σ Vᵀ`` (residuals over gaps: Davis & Kahan) is below
    ``tolerance``, checks that on the true residuals, and takes the dense routine where the check fails.
    A matrix that has settled leaves the stack, so its result does not depend on its companions.

    Args:
        weight: ``(s, out, in)``; float64 is worked on in float64, everything else in float32.
        k: at most ``min(out, in)``.
        seeds: one for every matrix.
        tolerance: estimated relative error of ``U Σ Vᵀ`` before the last product, which takes it down to round-off in
            most cases; where the gap below σ_k is less than 1 %, the error of what is well-determined.
        iterations: exactly so many steps, with a block of ``k + oversampling`` and without test or fall-back.
        oversampling: directions beyond k that are kept.
        max_steps: bound of the steps.

    Returns:
        See `Triplets`.

    Cost: two products of W with a block of b ≈ max(16, k/4) rows a step, ``4 s·out·in·b`` flops, usually 8-25 steps;
    memory ``8 D·max(out, in) + 4 D·min(out, in)`` bytes beyond W, ``D ≤ k + 24 b``.
    """
    side = min(weight.shape[1:])
    block = _whole_eights(k + oversampling) if iterations is not None else _whole_eights(min(max(16, k / 4), 64))
    needed = block * (iterations + 1) if iterations is not None else max(_DENSE_SIDE, _DENSE_SHARE * k)
    if k == 0 or needed >= side or k + oversampling + 4 * block >= side:
        return dense_triplets(weight, k)
    wide = weight.shape[1] < weight.shape[2]
    stack = working_copy(weight)
    # In units of the root-mean-square singular value nothing over- or underflows. (Taken before the transposition:
    # norms across the grain are slow.)
    norms = frobenius_norms(stack) / side**0.5
    scales = torch.where(norms > 0, norms, 1).to(stack.dtype).reshape(-1, 1, 1)
    stack = stack.mT if wide else stack
    options = _Options(k, tolerance, oversampling, iterations, max_steps)
    found = _iterate(stack, scales, options, block, list(seeds))
    unsound = [i for i, ok in enumerate(found.settled.tolist()) if not ok]
    if unsound and iterations is None:
        # Perhaps more copies of one singular value than the block is wide; a block wider than k sees them all.
        wider = _whole_eights(k + oversampling)
        repair = _iterate(stack[unsound], scales[unsound], options, wider, [seeds[i] for i in unsound])
        for place, i in enumerate(unsound):
            one = Triplets(*(part[place : place + 1] for part in repair))
            if not bool(one.settled):
                one = dense_triplets(stack[i : i + 1], k)
            for whole, part in zip(found, one, strict=True):
                whole[i] = part[0]
    return found._replace(left=found.right.mT, right=found.left.mT) if wide else found


@dataclass(frozen=True)
class _Options:
    k: int
    tolerance: float
    oversampling: int
    iterations: int | None
    max_steps: int


def _whole_eights(width: float) -> int:
    """The next multiple of 8: products with other widths take up to two and a half times as long on CPUs."""
    return -(-int(width) // 8) * 8


def _iterate(weight: Tensor, scale: Tensor, options: _Options, block: int, seeds: list[int]) -> Triplets:
    """Block Krylov on ``(s, m, n)``, m ≥ n; every matrix leaves as soon as it has settled."""
    count, _, features = weight.shape
    results: list[Triplets | None] = [None] * count
    places = list(range(count))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    exact, k = options.iterations, options.k
    last = (exact if exact is not None else options.max_steps - 1) + 1
    # Never the whole space: there would be no room for the waiting block.
    largest = min(k + options.oversampling + _RESTART_AFTER * block, features - block, last * block)
    state = _State(weight, scale, _noise(generators, block, weight), largest)
    due = max(k + 3 * block, 5 * block)
    for step in range(1, last + 1):
        state.grow(generators)
        size = state.size
        if step < last and size < due and size + block <= largest:
            continue
        # So often that the small eigenproblems take about as long as the products at most.
        due = size + block * min(8, max(1, round(50 * size**3 / (4 * weight[0].numel() * block))))
        squared, vectors = state.rayleigh_ritz()
        accurate = state.accurate(squared, vectors, options, block)
        copies = _may_miss_copies(squared[:, :k].sqrt(), block)
        done = [i for i in range(len(places)) if step == last or (exact is None and bool(accurate[i]))]
        for i in done:
            settled = bool(accurate[i] & ~copies[i])
            results[places[i]] = state.extract(i, squared[i], vectors[i], options, settled=settled)
        keep = [i for i in range(len(places)) if i not in done]
        if not keep:
            break
        if done:
            places = [places[i] for i in keep]
            generators = [generators[i] for i in keep]
            state.select(keep)
            vectors = vectors[keep]
        if size + block > largest:
            state.restart(vectors[..., : k + options.oversampling])
            due = size
    found = [result for result in results if result is not None]
    return Triplets(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class _State:
    """The bases of the matrices that have not settled yet; everything is in units of ``scale``."""

    def __init__(self, weight: Tensor, scale: Tensor, start: Tensor, largest: int) -> None:
        self.weight, self.scale, self.size = weight, scale, 0
        count, images, features = weight.shape
        # Room for the largest basis: growing by concatenation would copy everything in every step.
        self.basis_room = weight.new_empty(count, largest, features)
        self.images_room = weight.new_empty(count, largest, images, dtype=torch.float64)
        self.gram_room = weight.new_empty(count, largest, largest, dtype=torch.float64)
        self.next = torch.linalg.qr(start.mT).Q.mT
        self.remainder = torch.zeros(count, 0, 0, dtype=torch.float64, device=weight.device)

    @property
    def basis(self) -> Tensor:
        """``(s, D, n)`` orthonormal rows."""
        return self.basis_room[:, : self.size]

    @property
    def images(self) -> Tensor:
        """``(s, D, m)`` float64, the basis times Wᵀ."""
        return self.images_room[:, : self.size]

    @property
    def gram(self) -> Tensor:
        """``(s, D, D)`` float64, the inner products of the images."""
        return self.gram_room[:, : self.size, : self.size]

    def grow(self, generators: list[torch.Generator]) -> None:
        """Add the waiting block to the basis and find the next."""
        image = self.next @ self.weight.mT / self.scale
        product = image @ self.weight / self.scale
        added = slice(self.size, self.size + self.next.shape[1])
        self.size = added.stop
        self.basis[:, added], self.images[:, added] = self.next, image.double()
        column = self.images @ self.images[:, added].mT
        self.gram[:, :, added], self.gram[:, added, :] = column, column.mT
        round_off = torch.finfo(product.dtype).eps * torch.linalg.vector_norm(product, dim=(1, 2), keepdim=True)
        product = self._beside_the_basis(product)
        # Noise the size of round-off takes the place of directions that have run out (zero or rank-deficient W, many
        # equal singular values): the iteration goes on from there instead of dividing by zero.
        fill = torch.where(round_off > 0, round_off, 1.0) / product.shape[-1] ** 0.5
        noisy = product + fill * _noise(generators, product.shape[1], product)
        # Beside the basis once more as unit vectors: twice is enough (Kahan).
        self.next = torch.linalg.qr(self._beside_the_basis(torch.linalg.qr(noisy.mT).Q.mT).mT).Q.mT
        self.remainder = (product @ self.next.mT).double()

    def _beside_the_basis(self, rows: Tensor) -> Tensor:
        return rows - (rows @ self.basis.mT) @ self.basis

    def rayleigh_ritz(self) -> tuple[Tensor, Tensor]:
        """Squared Ritz values ``(s, D)``, descending, and their vectors ``(s, D, D)`` in terms of the basis."""
        squared, vectors = small_eigh((self.gram + self.gram.mT) / 2)
        return squared.flip(-1).clamp_min(0), vectors.flip(-1)

    def accurate(self, squared: Tensor, vectors: Tensor, options: _Options, block: int) -> Tensor:
        """``(s,)`` bool: whether the estimated error of ``U Σ Vᵀ`` is below the tolerance."""
        k = options.k
        sigma = squared.sqrt()
        top, following = sigma[:, :k], sigma[:, k : k + 1]
        gap = torch.maximum(top - following, _GAP_FLOOR * top).clamp_min(1e-30)
        # ‖WᵀW v - σ² v‖ is what the last block's share of v leaves in the remainder; over σ: ‖Wᵀu - σ v‖.
        residual = torch.linalg.vector_norm(self.remainder.mT @ vectors[:, -block:, :k], dim=1)
        # (residual / σ) / gap · σ; what is no longer visible beside σ₁ does no harm whichever way it points
        error = torch.linalg.vector_norm(torch.minimum(residual / gap, 2 * top), dim=1)
        enough: Tensor = error <= options.tolerance * torch.linalg.vector_norm(top, dim=1)
        return enough

    def extract(self, i: int, squared: Tensor, vectors: Tensor, options: _Options, *, settled: bool) -> Triplets:
        """The triplets of the i-th matrix: one more product with W, which measures and improves them."""
        k, scale = options.k, float(self.scale[i])
        sigma, chosen = squared[:k].sqrt(), vectors[:, :k]
        alive = sigma > torch.finfo(torch.float64).eps * sigma[:1]
        left = (chosen.mT @ self.images[i]) * (torch.where(alive, sigma, 1).reciprocal() * alive).unsqueeze(1)
        left = left.to(self.weight.dtype)
        image = (left @ self.weight[i]).double() / scale
        ritz = (chosen.to(self.basis.dtype).mT @ self.basis[i]).double()
        residual = torch.linalg.vector_norm(image - sigma.unsqueeze(1) * ritz, dim=1)
        energy = float(torch.linalg.vector_norm(sigma))
        # What the products themselves leave behind in the working precision.
        noise = 64 * torch.finfo(self.weight.dtype).eps * float(sigma[0])
        settled = settled and bool((residual <= options.tolerance * energy + noise).all())
        squares, rotation = small_eigh(image @ image.mT)
        squares, rotation = squares.flip(0).clamp_min(0), rotation.flip(1)
        sigma = squares.sqrt()
        alive = sigma > torch.finfo(torch.float64).eps * sigma[:1]
        right = (rotation.mT @ image) * (torch.where(alive, sigma, 1).reciprocal() * alive).unsqueeze(1)
        left = (rotation.to(left.dtype).mT @ left).mT
        left, right = with_fixed_signs(left.unsqueeze(0), right.to(left.dtype).unsqueeze(0))
        relative = float(torch.linalg.vector_norm(residual)) / energy if energy > 0 else 0.0
        return Triplets(
            left,
            sigma.unsqueeze(0) * scale,
            right,
            torch.tensor([relative], dtype=torch.float64, device=left.device),
            torch.tensor([settled], device=left.device),
        )

    def select(self, kept: list[int]) -> None:
        """Go on with some of the matrices."""
        self.weight, self.scale = self.weight[kept], self.scale[kept]
        self.basis_room, self.images_room, self.gram_room = (
            room[kept] for room in (self.basis_room, self.images_room, self.gram_room)
        )
        self.next, self.remainder = self.next[kept], self.remainder[kept]

    def restart(self, vectors: Tensor) -> None:
        """Shrink the basis to its best Ritz vectors; their residuals all lie in the waiting block."""
        basis, images = vectors.mT.to(self.basis.dtype) @ self.basis, vectors.mT @ self.images
        self.size = vectors.shape[-1]
        self.basis.copy_(basis)
        self.images.copy_(images)
        self.gram.copy_(images @ images.mT)


def _may_miss_copies(sigma: Tensor, block: int) -> Tensor:
    """``(s,)`` bool: whether as many of the k values are equal as the block is wide, so that there may be more."""
    if block >= sigma.shape[1]:
        return torch.zeros(sigma.shape[0], dtype=torch.bool, device=sigma.device)
    first, last = sigma[:, : 1 - block], sigma[:, block - 1 :]
    equal = (first - last <= _SAME_VALUE * first) & (first > _SAME_VALUE * sigma[:, :1])
    return equal.any(1)


def _noise(generators: list[torch.Generator], rows: int, like: Tensor) -> Tensor:
    """``(s, rows, n)`` standard normal numbers, each matrix's from its own generator, equal on every device."""
    columns = like.shape[-1]
    noise = [torch.randn(rows, columns, generator=g, dtype=torch.float32, device="cpu") for g in generators]
    return torch.stack(noise).to(like)
