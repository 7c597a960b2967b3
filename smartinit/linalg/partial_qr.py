"""The first r columns of Q and rows of R, without the rest of the decomposition; in the given or a pivoted order.

``Q_r`` spans the first r columns of W whatever follows them, and ``R_r = Q_rᵀ W``: identical, signs included, to the
first r columns and rows of a full Householder QR, for ``2 out·r (r + in)`` flops in place of ``2 out·in²``
(Golub & Van Loan, Matrix Computations, sec. 5.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from smartinit.linalg.triplets import working_copy

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 256
# Squared residual norms are downdated; when the largest has fallen to this share, all are computed afresh.
_TRUSTED_SHARE = 0.03


class PartialQR(NamedTuple):
    """``W ≈ Q R`` of rank r, exact on the chosen columns.

    Attributes:
        basis: ``(out, r)`` orthonormal columns, Q.
        rows: ``(r, in)``, ``Qᵀ W``; rows of zeros where the rank of W ended.
        columns: ``(≤ r,)`` int64, the columns of W which Q was built from, in order.
    """

    basis: Tensor
    rows: Tensor
    columns: Tensor


def leading_qr(weight: Tensor, r: int) -> PartialQR:
    """QR of the first r independent columns, in their order.

    Where the first r columns are independent, these are they and the result is that of a full Householder QR. A column
    that depends on those before it (a copy, a constant multiple, zeros) has no direction of its own: the full QR
    divides round-off by round-off there. It is skipped and the next independent one takes its place.

    Args:
        weight: ``(out, in)``.
        r: at most ``min(out, in)``.

    Cost: ``2 out·r²`` flops in float64 and one product, ``2 out·in·r``.
    """
    matrix = working_copy(weight)
    columns = torch.arange(r, device=weight.device)
    basis, corner = torch.linalg.qr(matrix[:, :r].double())
    floor = _floor(matrix)
    norms = torch.linalg.vector_norm(matrix[:, :r], dim=0, dtype=torch.float64)
    if bool((corner.diagonal().abs() <= floor * norms).any()):
        columns = _independent_columns(matrix, r, floor)
        padded = matrix.new_zeros(matrix.shape[0], r, dtype=torch.float64)
        padded[:, : columns.numel()] = matrix[:, columns].double()
        basis, corner = torch.linalg.qr(padded)
    rank = columns.numel()
    rows = basis.to(matrix.dtype).mT @ matrix
    rows[:, columns] = corner[:, :rank].to(rows.dtype)  # exact zeros below the diagonal
    rows[rank:] = 0
    return PartialQR(basis.to(matrix.dtype), rows, columns)


def pivoted_qr(weight: Tensor, r: int) -> PartialQR:
    """QR whose next column is the one with the most energy left: it does not depend on the order of the features.

    The choice for r holds the choice for every smaller rank (Businger & Golub, doi 10.1007/BF01436084). Of columns with
    equal energy the first is taken; the diagonal of R is positive.

    Args:
        weight: ``(out, in)``.
        r: at most ``min(out, in)``.

    Cost: ``2 out·in·r`` flops in r passes over W; a few more where the energies decay steeply.
    """
    matrix = working_copy(weight)
    out, features = matrix.shape
    floor = _floor(matrix)
    basis = matrix.new_zeros(out, r, dtype=torch.float64)
    rows = matrix.new_zeros(r, features)
    before = torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float64) ** 2
    left, trusted = before.clone(), _TRUSTED_SHARE * float(before.max())
    columns: list[int] = []
    while len(columns) < r:
        if columns and float(left.max()) < trusted:
            left = _energies_left(matrix, basis[:, : len(columns)])
            left[columns] = 0
            trusted = _TRUSTED_SHARE * float(left.max())
        column, direction = _most_energetic(matrix, basis[:, : len(columns)], before, left, floor)
        if direction is None:
            break
        step = len(columns)
        basis[:, step] = direction
        rows[step] = direction.to(matrix.dtype) @ matrix
        rows[step, columns] = 0  # these are spent
        left -= rows[step].double() ** 2
        left[column] = 0
        columns.append(column)
    if len(columns) < r:
        basis = _completed(basis, len(columns))
    return PartialQR(basis.to(matrix.dtype), rows, torch.tensor(columns, dtype=torch.int64, device=weight.device))


def _floor(matrix: Tensor) -> float:
    """Share of a column's norm below which what is left of it is round-off."""
    return float(16 * torch.finfo(matrix.dtype).eps)


def _most_energetic(
    matrix: Tensor, basis: Tensor, before: Tensor, left: Tensor, floor: float
) -> tuple[int, Tensor | None]:
    """The column with the largest squared residual and its normalised residual; None when only round-off is left.

    ``left`` is set to 0, in place, for columns of which only round-off is left.
    """
    for _ in range(matrix.shape[1]):
        column = int(left.argmax())
        if float(left[column]) <= 0:
            break
        residual = _residual(matrix[:, column].double(), basis)
        energy = float(residual @ residual)
        if energy <= floor**2 * float(before[column]):
            left[column] = 0
            continue
        return column, residual / energy**0.5
    return -1, None


def _energies_left(matrix: Tensor, basis: Tensor) -> Tensor:
    """``(in,)`` squared norms of the columns beside the span of ``basis``, in float64, some columns at a time."""
    chunks = (_residual(chunk.double(), basis) for chunk in matrix.split(_CHUNK, 1))
    return torch.cat([torch.linalg.vector_norm(chunk, dim=0) ** 2 for chunk in chunks])


def _residual(columns: Tensor, basis: Tensor) -> Tensor:
    """What is left of ``columns`` beside the span of ``basis``; twice, so that it is orthogonal to round-off."""
    for _ in range(2):
        columns = columns - basis @ (basis.mT @ columns)
    return columns


def _independent_columns(matrix: Tensor, r: int, floor: float) -> Tensor:
    """Indices of the first r columns that do not depend on the columns before them; fewer if the rank is lower."""
    basis = matrix.new_zeros(matrix.shape[0], r, dtype=torch.float64)
    chosen: list[int] = []
    for start in range(0, matrix.shape[1], _CHUNK):
        chunk = matrix[:, start : start + _CHUNK].double()
        norms = torch.linalg.vector_norm(chunk, dim=0)
        left = torch.linalg.vector_norm(_residual(chunk, basis[:, : len(chosen)]), dim=0)
        for offset in (left > floor * norms).nonzero().flatten().tolist():
            residual = _residual(chunk[:, offset], basis[:, : len(chosen)])
            size = torch.linalg.vector_norm(residual)
            if bool(size > floor * norms[offset]):
                basis[:, len(chosen)] = residual / size
                chosen.append(start + offset)
                if len(chosen) == r:
                    return torch.tensor(chosen, device=matrix.device)
    return torch.tensor(chosen, dtype=torch.int64, device=matrix.device)


def _completed(basis: Tensor, rank: int) -> Tensor:
    """The columns from ``rank`` on replaced by others, orthonormal to those before."""
    whole, corner = torch.linalg.qr(basis)
    signs = torch.where(corner.diagonal() < 0, -1.0, 1.0).to(basis.dtype)
    completed: Tensor = whole * signs
    completed[:, :rank] = basis[:, :rank]
    return completed
