"""Padded batches in a seeded order, tokenised as far as they are asked for."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from smartinit.data.labels import IGNORED
from smartinit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from smartinit.data.labels import TokenRow

_WINDOW = 32  # batches per window: enough for like lengths to meet, few enough to start at once


class Rows(Protocol):
    """What is asked of a `datasets.Dataset`."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, index: list[int]) -> Mapping[str, Sequence[Any]]:
        """Columns of the rows with these numbers."""


class Batches:
    """An iterable of ``dict[str, Tensor]``; every pass gives the same batches.

    Each tensor is ``(rows, tokens)`` int64, padded on the right to the longest row: ``input_ids``,
    ``attention_mask``, for a causal model ``labels`` (-100 where a token does not count), and
    ``token_type_ids`` where the tokenizer tells segments apart.

    Rows are tokenised window by window while the batches are read, and kept, so that a run that
    settles early has not paid for the rest. Rows without a token that counts are dropped.

    Args:
        rows: a `datasets.Dataset`.
        tokenise: columns of a few rows and their 1-based numbers -> one `TokenRow` each.
        batch_size: rows per batch.
        pad_token_id: of the tokenizer; its value cannot matter where the mask is 0.
        seed: of the shuffle.
        max_samples: usable rows at most.
        group_by_length: sort the rows of a window by length, and shuffle its batches.

    Raises:
        DataError: no row has a token that counts.
    """

    repeatable = True
    """Every iteration gives the same: what reads them to name them need not keep them."""

    def __init__(
        self,
        rows: Rows,
        tokenise: Callable[[Mapping[str, Sequence[Any]], Sequence[int]], list[TokenRow]],
        *,
        batch_size: int,
        pad_token_id: int = 0,
        seed: int = 0,
        max_samples: int | None = None,
        group_by_length: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self.dropped = 0
        self._rows = rows
        self._tokenise = tokenise
        self._pad = pad_token_id
        self._group = group_by_length
        self._generator = np.random.default_rng(seed)
        self._order = self._generator.permutation(len(rows))
        self._read = 0
        self._wanted = len(rows) if max_samples is None else min(max_samples, len(rows))
        self._usable = 0
        self._batches: list[list[TokenRow]] = []
        if not self._read_window():
            raise DataError(
                f"none of the {len(rows)} rows has a token that counts: every token is a prompt's or was cut off; "
                "check the completions, raise --max-length, or count prompts too with --no-label-mask"
            )

    def __len__(self) -> int:
        """Number of batches; until all rows were read, the number if no further row is dropped."""
        left = max(min(self._wanted - self._usable, len(self._order) - self._read), 0)
        return math.ceil((self._usable + left) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches in order."""
        number = 0
        while number < len(self._batches) or self._read_window():
            yield self._collate(self._batches[number])
            number += 1

    @property
    def digest(self) -> str:
        """Sha256 over ids, masks and labels of all batches in order. Cost: tokenises all rows."""
        return self.digest_of(None)

    def digest_of(self, count: int | None) -> str:
        """Sha256 over the first ``count`` batches."""
        whole = hashlib.sha256()
        for number, batch in enumerate(self):
            if count is not None and number >= count:
                break
            for name in sorted(batch):
                values = batch[name].numpy().astype("<i8")
                whole.update(f"{name}{values.shape}".encode() + values.tobytes())
        return whole.hexdigest()

    def _read_window(self) -> bool:
        """Tokenise rows until a window of batches is full; ``False`` when there is nothing more."""
        size = min(_WINDOW * self.batch_size, self._wanted - self._usable)
        window: list[TokenRow] = []
        while len(window) < size and self._read < len(self._order):
            chosen = self._order[self._read : self._read + size - len(window)].tolist()
            self._read += len(chosen)
            made = self._tokenise(self._rows[chosen], [number + 1 for number in chosen])
            window += [row for row in made if row.counts]
            self.dropped += sum(not row.counts for row in made)
        self._usable += len(window)
        if self._group:
            window.sort(key=len)
        batches = [window[start : start + self.batch_size] for start in range(0, len(window), self.batch_size)]
        if self._group:
            batches = [batches[i] for i in self._generator.permutation(len(batches))]
        self._batches += batches
        return bool(batches)

    def _collate(self, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
        shape = (len(rows), max(map(len, rows)))
        batch = {
            "input_ids": torch.full(shape, self._pad, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
        }
        if rows[0].labels is not None:
            batch["labels"] = torch.full(shape, IGNORED, dtype=torch.int64)
        if rows[0].token_type_ids is not None:
            batch["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
        for i, row in enumerate(rows):
            batch["input_ids"][i, : len(row)] = torch.from_numpy(row.input_ids)
            batch["attention_mask"][i, : len(row)] = 1
            for name in ("labels", "token_type_ids"):
                values = getattr(row, name)
                if values is not None:
                    batch[name][i, : len(row)] = torch.from_numpy(values)
        return batch
