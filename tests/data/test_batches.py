from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from smartinit.data.batches import Batches
from smartinit.data.labels import TokenRow
from smartinit.errors import DataError


def rows_of(lengths):
    """A dataset whose rows have these lengths; length 0 is a row that does not count."""
    return Dataset.from_dict({"length": list(lengths), "id": list(range(len(lengths)))})


def tokenise(rows, numbers):
    """Row ``i`` becomes ``length`` copies of token ``i + 1``, the first of them masked."""
    made = []
    for length, number in zip(rows["length"], numbers, strict=True):
        ids = np.full(length, number, np.int32)
        labels = ids.copy()
        labels[:1] = -100
        made.append(TokenRow(ids, labels))
    return made


def batches_of(lengths, **options):
    return Batches(rows_of(lengths), tokenise, **({"batch_size": 2} | options))


def row_numbers(batches):
    return [row[0].item() for batch in batches for row in batch["input_ids"]]


def test_padding_is_on_the_right_and_masked():
    (batch,) = batches_of([2, 4], pad_token_id=9)
    short = int(batch["attention_mask"].sum(1).argmin())
    assert batch["input_ids"].shape == (2, 4)
    assert batch["input_ids"][short].tolist() == [1, 1, 9, 9]
    assert batch["attention_mask"][short].tolist() == [1, 1, 0, 0]
    assert batch["labels"][short].tolist() == [-100, 1, -100, -100]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_encoders_get_no_labels_but_segments():
    def segments(rows, numbers):
        return [TokenRow(row.input_ids, None, row.input_ids * 0 + 1) for row in tokenise(rows, numbers)]

    (batch,) = Batches(rows_of([2, 3]), segments, batch_size=2)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    assert torch.equal(batch["token_type_ids"], batch["attention_mask"])


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=90),
    batch_size=st.integers(1, 3),
    max_samples=st.none() | st.integers(1, 100),
    grouped=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_usable_row_once_in_full_batches(lengths, batch_size, max_samples, grouped, seed):
    usable = sum(length > 1 for length in lengths)
    options = {"batch_size": batch_size, "max_samples": max_samples, "group_by_length": grouped, "seed": seed}
    if usable == 0:
        with pytest.raises(DataError, match=f"none of the {len(lengths)} rows"):
            batches_of(lengths, **options)
        return
    batches = batches_of(lengths, **options)
    first, second = list(batches), list(batches)
    numbers = row_numbers(first)
    wanted = usable if max_samples is None else min(usable, max_samples)
    assert len(numbers) == len(set(numbers)) == wanted
    assert all(lengths[number - 1] > 1 for number in numbers)
    assert len(batches) == len(first)
    assert sorted(len(batch["input_ids"]) for batch in first)[1:] == [batch_size] * (len(first) - 1)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert batches.digest == batches_of(lengths, **options).digest
    if max_samples is None:
        assert batches.dropped == len(lengths) - usable


def test_the_seed_decides_the_order():
    lengths = [2] * 40
    assert row_numbers(batches_of(lengths, seed=1)) == row_numbers(batches_of(lengths, seed=1))
    assert row_numbers(batches_of(lengths, seed=1)) != row_numbers(batches_of(lengths, seed=2))
    assert batches_of(lengths, seed=1).digest != batches_of(lengths, seed=2).digest


def test_a_sample_is_the_start_of_the_whole_order():
    lengths = [2] * 100
    whole = row_numbers(batches_of(lengths))
    assert row_numbers(batches_of(lengths, max_samples=30)) == whole[:30]


def test_grouping_saves_padding_and_keeps_the_rows():
    lengths = np.random.default_rng(0).integers(2, 100, 400).tolist()

    def size(batches):
        return sum(batch["input_ids"].numel() for batch in batches)

    plain, grouped = batches_of(lengths, batch_size=8), batches_of(lengths, batch_size=8, group_by_length=True)
    assert sorted(row_numbers(plain)) == sorted(row_numbers(grouped))
    assert size(grouped) < 0.75 * size(plain)
    widths = [batch["input_ids"].shape[1] for batch in grouped]
    assert widths != sorted(widths), "batches of a window must not come in order of length"


def test_rows_are_tokenised_as_far_as_they_are_read():
    seen = []

    def counting(rows, numbers):
        seen.extend(numbers)
        return tokenise(rows, numbers)

    batches = Batches(rows_of([2] * 1000), counting, batch_size=2)
    next(iter(batches))
    assert len(seen) < 100
    assert len(batches) == 500
    list(batches)
    list(batches)
    assert sorted(seen) == list(range(1, 1001))


def test_the_digest_sees_ids_masks_and_labels():
    def changed(rows, numbers):
        return [TokenRow(row.input_ids, row.input_ids) for row in tokenise(rows, numbers)]

    digests = {
        batches_of([2, 3, 4]).digest,
        batches_of([2, 3, 5]).digest,
        Batches(rows_of([2, 3, 4]), changed, batch_size=2).digest,
        batches_of([2, 3, 4], batch_size=3).digest,
    }
    assert len(digests) == 4
    assert batches_of([2, 3, 4, 5]).digest_of(1) != batches_of([2, 3, 4, 5]).digest
