"""The content of a batch as one sha256 per row."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from smartinit.errors import ConfigError, ModelError
from smartinit.targets.tensor_digest import dtype_name, tensor_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MASK, _LABELS = "attention_mask", "labels"
# What these say of a token that is padding cannot matter. What other fields of the same length hold there is left out
# only where it is zero: they may be no tokens at all.
_OF_TOKENS = frozenset((_MASK, _LABELS, "input_ids", "token_type_ids", "position_ids", "special_tokens_mask"))
_DEEPEST = 32


class _Hash(Protocol):
    def update(self, data: bytes | memoryview[int], /) -> None: ...


@dataclass(frozen=True)
class _Column:
    """A tensor or array of one field.

    Attributes:
        kind: which of the two, and the dtype.
        shape: of the whole.
        data: ``(rows, bytes of a row)``; of no rows, or without dimensions, ``(1, bytes)``.
    """

    kind: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def feed(self, into: _Hash, row: int | None = None, length: int | None = None) -> None:
        """Hash it all, or one row of it, cut to a length."""
        if row is None:
            shape, data = self.shape, self.data.reshape(-1)
        else:
            shape, data = self.shape[1:], self.data[row]
        if length is not None and length < shape[0]:
            shape, data = (length, *shape[1:]), data[: length * (len(data) // shape[0])]
        into.update(f"{self.kind}{list(shape)};".encode())
        into.update(data.data)

    def ends_in_zeros(self, row: int, length: int) -> bool:
        """Whether a row holds nothing but zero bytes behind a length."""
        data = self.data[row]
        return not data[length * (len(data) // self.shape[1]) :].any()


def row_digests(batch: Any, number: int, label_mask_value: int = -100) -> list[bytes]:  # noqa: ANN401 - any batch
    """One sha256 per row of a batch.

    A mapping of fields which all have the batch as leading dimension has rows: per row, each field's name, dtype, shape
    and bytes in the order of the names; values without dimensions (None, text, numbers) belong to every row. Where an
    integer ``attention_mask (rows, tokens)`` is zero up to the end, and labels of that shape are masked, the row ends
    before: in `_OF_TOKENS`, and in other fields of that length which hold zeros there. Padding in front, and gaps in
    the mask, are content. Any other batch is one row.

    Args:
        batch: of None, bool, int, float, text, tensors, arrays, and lists, tuples and mappings of these.
        number: of the batch, for messages.
        label_mask_value: of labels that do not count.

    Raises:
        ConfigError: something else is in it.
    """
    rows = _rows_of(batch)
    if rows is None:
        return [batch_digest(batch, number)]
    fields = {name: _column(batch[name], name, number) for name in sorted(batch)}
    ends = _ends(batch, fields, rows, label_mask_value)
    made = []
    for row in range(rows):
        sha = hashlib.sha256(b"row")
        for name, value in fields.items():
            _feed(sha, name, name, number, 0)
            if isinstance(value, _Column) and value.shape:
                value.feed(sha, row, _cut(name, value, row, ends))
            else:
                _feed(sha, value[row] if isinstance(value, (list, tuple)) else value, name, number, 0)
        made.append(sha.digest())
    return made


def batch_digest(batch: Any, number: int) -> bytes:  # noqa: ANN401 - any batch
    """One sha256 of a batch as it is, padding included.

    Raises:
        ConfigError: see `row_digests`.
    """
    whole = hashlib.sha256(b"batch")
    _feed(whole, batch, "", number, 0)
    return whole.digest()


def _rows_of(batch: object) -> int | None:
    """Rows of a batch whose fields all have the same; None of any other."""
    if not isinstance(batch, Mapping) or not all(isinstance(name, str) for name in batch):
        return None
    if any(isinstance(value, Mapping) for value in batch.values()):
        return None
    shaped = [value for value in batch.values() if isinstance(value, (torch.Tensor, np.ndarray))]
    sizes = {value.shape[0] for value in shaped if value.ndim}
    sizes |= {len(value) for value in batch.values() if isinstance(value, (list, tuple))}
    return sizes.pop() if len(sizes) == 1 and 0 not in sizes else None


def _ends(
    batch: Mapping[str, Any], fields: Mapping[str, object], rows: int, label_mask_value: int
) -> tuple[int, list[int]] | None:
    """Tokens of the batch, and where each row ends; None if nothing says it."""
    if not isinstance(fields.get(_MASK), _Column) or batch[_MASK].ndim != 2:  # noqa: PLR2004 - (rows, tokens)
        return None
    mask = _numbers(batch[_MASK])
    if mask.dtype.kind not in "biu":  # a mask to be added has its zeros where tokens count
        return None
    counts = mask != 0
    labels = batch.get(_LABELS)
    if isinstance(fields.get(_LABELS), _Column) and labels is not None and labels.shape == batch[_MASK].shape:
        counts = counts | (_numbers(labels) != label_mask_value)
    tokens = counts.shape[1]
    behind = np.argmax(counts[:, ::-1], axis=1) if tokens else np.zeros(rows, int)
    return tokens, np.where(counts.any(axis=1), tokens - behind, 0).tolist()


def _cut(name: str, column: _Column, row: int, ends: tuple[int, list[int]] | None) -> int | None:
    if ends is None or len(column.shape) < 2 or column.shape[1] != ends[0] or not ends[0]:  # noqa: PLR2004
        return None
    end = ends[1][row]
    return end if name in _OF_TOKENS or column.ends_in_zeros(row, end) else None


def _column(value: Any, path: str, number: int) -> Any:  # noqa: ANN401 - of a batch
    """The `_Column` of a tensor or array; anything else itself."""
    if isinstance(value, torch.Tensor):
        try:
            data = tensor_bytes(value)
        except (ModelError, RuntimeError) as error:
            raise _no_digest(value, path, number) from error
        return _Column(f"t{dtype_name(value.dtype)}", tuple(value.shape), _by_rows(data, value.shape))
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise _no_digest(value, path, number)
        data = np.frombuffer(array.tobytes(), np.uint8)
        return _Column(f"a{array.dtype.descr}", array.shape, _by_rows(data, array.shape))
    return value


def _by_rows(data: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    rows = shape[0] if shape and shape[0] else 1
    return data.reshape(rows, len(data) // rows)


def _numbers(value: torch.Tensor | NDArray[Any]) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value


def _feed(into: _Hash, value: Any, path: str, number: int, depth: int) -> None:  # noqa: ANN401 - of a batch
    """Hash one value so that no two different ones give the same bytes."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = _column(value, path, number)
    if isinstance(value, _Column):
        value.feed(into)
    elif (scalar := _scalar(value)) is not None:
        into.update(scalar)
    elif depth < _DEEPEST and isinstance(value, (list, tuple)):
        into.update(f"{'l' if isinstance(value, list) else 'u'}{len(value)};".encode())
        for index, item in enumerate(value):
            _feed(into, item, f"{path}[{index}]", number, depth + 1)
    elif depth < _DEEPEST and isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        into.update(f"m{len(value)};".encode())
        for name in sorted(value):
            _feed(into, name, path, number, depth + 1)
            _feed(into, value[name], f"{path}.{name}" if path else name, number, depth + 1)
    else:
        raise _no_digest(value, path, number)


def _scalar(value: object) -> bytes | None:
    if value is None:
        return b"n"
    if isinstance(value, int):
        return f"{'b' if isinstance(value, bool) else 'i'}{int(value)};".encode()
    if isinstance(value, float):
        return b"f" + struct.pack("<d", value)
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return f"s{len(text)};".encode() + text
    return None


def _no_digest(value: object, path: str, number: int) -> ConfigError:
    where = f"field '{path}' of batch {number}" if path else f"batch {number}"
    return ConfigError(
        f"{where} (batches count from 0) is a {type(value).__name__}, of which no digest can be taken, so what is "
        "computed from it could not be found again: give tensors, arrays, numbers or text (and lists, tuples and "
        "mappings of these, with names that are text), or compute without a store"
    )
