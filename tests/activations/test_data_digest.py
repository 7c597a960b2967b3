"""Which rows were read: the same samples give the same digest, however they are batched; any other sample another."""

from __future__ import annotations

import copy
import functools
import hashlib
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from smartinit.activations import rows
from smartinit.activations.data_digest import (
    RowDigests,
    RowLog,
    callable_key,
    global_orders,
)
from smartinit.activations.row_content import row_digests
from smartinit.errors import ConfigError

SEED = int(os.environ.get("SMARTINIT_TEST_SEED", "0"))


def samples(count: int = 11, seed: int = SEED) -> list[dict[str, list[int]]]:
    """Rows of 1 to 9 tokens, the first of them a prompt's where there are more than two, with gaps in the mask."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = draw.integers(1, 60, draw.integers(1, 10)).tolist()
        mask = [int(value) for value in draw.integers(0, 4, len(ids)) > 0]
        mask[-1] = 1
        labels = [-100, *ids[1:]] if len(ids) > 2 else ids
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def collate(some: list[dict[str, list[int]]], *, more: int = 0, pad: int = 0, left: int = 0) -> dict[str, torch.Tensor]:
    """Padded to the longest row and ``more``; ``left`` columns of padding in front."""
    longest = max(len(row["input_ids"]) for row in some) + more
    fills = {**PADDING, "input_ids": pad}
    return {
        name: torch.tensor(
            [[fill] * left + row[name] + [fill] * (longest - len(row[name])) for row in some], dtype=torch.int64
        )
        for name, fill in fills.items()
    }


def batches(data: list[dict[str, list[int]]], size: int, **options: int) -> list[dict[str, torch.Tensor]]:
    return [collate(data[start : start + size], **options) for start in range(0, len(data), size)]


def digest(stream) -> str:
    """Of all the rows."""
    log = RowLog()
    for batch in stream:
        log.add(batch)
    return log.at_rows(log.rows)


REFERENCE = digest(batches(samples(), 4))


# --- the same ------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(size=st.integers(1, 11), more=st.integers(0, 5), pad=st.integers(0, 9))
def test_batch_size_and_padding_at_the_end_do_not_matter(size, more, pad):
    assert digest(batches(samples(), size, more=more, pad=pad)) == REFERENCE


def test_other_fields_are_cut_where_they_hold_zeros():
    def stream(size, more):
        for start, batch in zip(range(0, 11, size), batches(samples(), size, more=more), strict=True):
            shape = batch["input_ids"].shape
            boxes = batch["input_ids"][..., None] * batch["attention_mask"][..., None] * torch.ones(4)
            index = torch.arange(start, start + shape[0])
            yield {**batch, "boxes": boxes, "index": index, "position_ids": torch.arange(shape[1]).expand(shape)}

    assert digest(stream(3, 0)) == digest(stream(11, 4)) == digest(stream(1, 2))


def test_what_only_looks_like_padding_is_content():
    batch = {"attention_mask": torch.tensor([[1, 1, 0, 0]]), "features": torch.tensor([[1.0, 2, 3, 4]])}
    other = {**batch, "features": torch.tensor([[1.0, 2, 3, 5]])}
    assert row_digests(batch, 0) != row_digests(other, 0)
    # 0 means "attended" in a mask that is added
    added = {"attention_mask": torch.tensor([[-1.0, 0, 0, 0]]), "input_ids": torch.tensor([[1, 2, 3, 4]])}
    other = {**added, "input_ids": torch.tensor([[1, 2, 3, 5]])}
    assert row_digests(added, 0) != row_digests(other, 0)
    # a label counts though its token is masked
    masked = {name: torch.tensor([values]) for name, values in
              {"attention_mask": [1, 0], "input_ids": [1, 2], "labels": [1, 2]}.items()}  # fmt: skip
    assert row_digests(masked, 0) != row_digests({**masked, "labels": torch.tensor([[1, 3]])}, 0)
    short = {name: value[:, :1] for name, value in masked.items()}
    assert row_digests(masked, 0, 2) == row_digests(short, 0, 2)
    assert row_digests(masked, 0) != row_digests(short, 0)


def test_the_running_digest_is_that_of_the_row_digests():
    log = RowLog()
    log.add(collate(samples()))
    assert log.at_rows(5) == hashlib.sha256(b"".join(log.digests[:5])).hexdigest()
    assert (log.rows, log.batches, log.batch_rows) == (11, 1, [11])


def test_the_batch_of_the_tokenizer_is_a_mapping(demo_model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = ["One day", "a fox saw the sun and", "was glad"]
    whole = tokenizer(texts, padding=True, return_tensors="pt", padding_side="right")
    single = [tokenizer([text], return_tensors="pt") for text in texts]
    assert digest([whole]) == digest(single)


# --- another -------------------------------------------------------------------------------------------------------


def change_token(data, row, at, _):
    data[row]["input_ids"][at] += 1


def change_mask(data, row, at, _):
    data[row]["attention_mask"][at] ^= 1


def change_label(data, row, at, _):
    data[row]["labels"][at] += 1


def swap(data, row, _, other):
    data[row], data[other] = data[other], data[row]


def drop(data, row, *_):
    del data[row]


def one_more(data, row, *_):
    data.insert(row, data[row])


def longer(data, row, *_):
    for values in data[row].values():
        values.append(1)


@settings(max_examples=60)
@given(data=st.data())
def test_any_change_of_content_is_another_digest(data):
    change = data.draw(st.sampled_from([change_token, change_mask, change_label, swap, drop, one_more, longer]))
    size = data.draw(st.integers(1, 11))
    one, two = samples(), copy.deepcopy(samples())
    row, other = data.draw(st.integers(0, 10)), data.draw(st.integers(0, 10))
    change(two, row, data.draw(st.integers(0, len(one[row]["input_ids"]) - 1)), other)
    if one == two:
        return
    assert digest(batches(two, size)) != REFERENCE


def test_padding_in_front_is_content():
    assert digest(batches(samples(), 4, left=1)) != REFERENCE
    plain = [{name: batch[name] for name in ("input_ids", "labels")} for batch in batches(samples(), 4)]
    assert digest(plain) != digest([{name: value[:, :-1] for name, value in batch.items()} for batch in plain])


CONTENTS = {
    "tensor": torch.tensor([[1, 2], [3, 4]]),
    "of another shape": torch.tensor([[1], [2], [3], [4]]),
    "of another dtype": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
    "array": np.array([[1, 2], [3, 4]]),
    "big-endian array": np.array([[1, 2], [3, 4]], dtype=">i8"),
    "list": [[1, 2], [3, 4]],
    "tuple": ([1, 2], [3, 4]),
    "flat list": [1, 2, 3, 4],
    "text": ["12", "34"],
    "other text": ["1", "234"],
    "one text": "1234",
    "number": 12,
    "true": True,
    "one": 1,
    "fraction": 1.0,
    "minus zero": -0.0,
    "none": None,
    "numpy's": np.int64(1),
    "nothing": [],
    "mapping": {"a": [1, 2]},
    "another name": {"b": [1, 2]},
    "empty mapping": {},
    "datetime": np.array(["2020-01-01"], dtype="datetime64[ns]"),
    "texts of numpy": np.array(["a", "b"]),
    "bfloat16": torch.ones(2, dtype=torch.bfloat16),
    "lone surrogate": "\ud800",
    "a tensor of the same bytes": torch.tensor([[1, 2], [3, 4]]).view(torch.float64),
    "an array of the same bytes": np.array([[1, 2], [3, 4]]).view("f8"),
    "text like two": ["1s2", "3"],
    "two like a text": ["1", "2s3"],
    "mappings": [{"a": 1}, {"b": 2}],
    "one mapping and none": [{"a": 1, "b": 2}, {}],
}


def test_every_kind_of_content_has_digests_of_its_own():
    whole = {name: digest([value]) for name, value in CONTENTS.items()}
    assert len(set(whole.values())) == len(CONTENTS)
    fields = {name: digest([{"x": value}]) for name, value in CONTENTS.items()}
    beside = {name: digest([{"x": value, "input_ids": torch.ones(2, 3)}]) for name, value in CONTENTS.items()}
    same = 2  # a list and a tuple of two rows
    assert len({*whole.values(), *fields.values(), *beside.values()}) == 3 * len(CONTENTS) - same
    assert fields["list"] == fields["tuple"]


def test_rows_and_batches():
    x = torch.arange(8).reshape(4, 2)
    by_rows = [{"x": x}, {"x": x, "use": True, "names": list("abcd"), "n": None}, {"x": list(x)}]
    assert [len(row_digests(batch, 0)) for batch in by_rows] == [4, 4, 4]
    whole = [x, (x, x), [x], {"x": x, "y": x[:3]}, {"x": x, "y": {"z": x}}, {"x": x[:0]}, {}, None, "text"]
    assert [len(row_digests(batch, 0)) for batch in whole] == [1] * len(whole)


class Odd:
    pass


@pytest.mark.parametrize(
    ("batch", "where"),
    [
        ({"x": Odd()}, "field 'x' of batch 3"),
        ({"x": torch.ones(2), "y": [Odd(), Odd()]}, "field 'y' of batch 3"),
        ({"x": {"y": [1, Odd()]}}, "field 'x.y[1]' of batch 3"),
        (Odd(), "batch 3"),
        ({1: torch.ones(2)}, "batch 3"),
        ({"x": np.array([Odd()])}, "field 'x' of batch 3"),
        ({"x": torch.ones(2, device="meta")}, "field 'x' of batch 3"),
        ({"x": torch.eye(2).to_sparse()}, "field 'x' of batch 3"),
        ({"x": b"bytes"}, "field 'x' of batch 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_digest_is_named(batch, where):
    log = RowLog()
    for _ in range(3):
        log.add(None)
    with pytest.raises(ConfigError) as caught:
        log.add(batch)
    assert str(caught.value).startswith(f"{where} (batches count from 0) is a ")
    assert type(caught.value) is ConfigError


def test_content_that_holds_itself_ends():
    loop: list = []
    loop.append(loop)
    with pytest.raises(ConfigError, match=r"field '(\[0\])+' of batch 0"):
        row_digests(loop, 0)


# --- reading -------------------------------------------------------------------------------------------------------


class Counted:
    """An iterable that says how far it was read."""

    def __init__(self, items):
        self.items, self.read, self.passes = items, 0, 0

    def __iter__(self):
        self.passes += 1
        for item in self.items:
            self.read += 1
            yield item


def test_no_more_is_read_than_was_asked_about():
    data = Counted(batches(samples(), 2))
    look = RowDigests(data)
    assert (data.read, data.passes) == (0, 0)
    assert look.at_rows(3) == RowDigests(batches(samples(), 3)).at_rows(3)
    assert data.read == 2
    assert look.at_batches(1) == look.at_rows(2)
    assert look.first(1) == look.at_rows(2)
    assert data.read == 2
    assert not look.ends_after(4)
    assert (data.read, look.rows) == (3, 6)
    assert look.ends_after(11)
    assert not look.ends_after(12)
    assert (look.at_rows(11), look.at_rows(12), look.at_batches(6), look.at_batches(7)) == (
        REFERENCE, None, REFERENCE, None,
    )  # fmt: skip
    assert look.first(99) == REFERENCE
    assert (look.at_rows(0), look.at_batches(0)) == (hashlib.sha256().hexdigest(),) * 2
    assert (data.read, data.passes) == (6, 1)


def test_max_batches_end_the_data():
    data = Counted(batches(samples(), 2))
    look = RowDigests(data, 2)
    assert look.ends_after(4)
    assert (look.at_rows(5), look.at_batches(3), data.read) == (None, None, 2)


def test_a_stream_without_end_is_read_as_far_as_asked():
    look = RowDigests({"x": torch.tensor([number])} for number in iter(int, 1))
    assert look.at_rows(20) is not None
    assert not look.ends_after(20)
    assert look.rows == 21


def test_closed_means_no_more():
    data = Counted(batches(samples(), 2))
    look = RowDigests(data)
    look.at_batches(1)
    look.close()
    assert (look.at_batches(2), look.at_batches(1) is not None, data.read) == (None, True, 1)


def test_one_shot_streams_are_told():
    items = batches(samples(), 2)
    assert [RowDigests(data).one_shot for data in (items, DataLoader(items), iter(items), (x for x in items))] == [
        False, False, True, True,
    ]  # fmt: skip


def test_workers_give_the_same():
    loader = DataLoader(samples(), batch_size=4, collate_fn=collate, num_workers=1)
    assert RowDigests(loader).at_rows(11) == REFERENCE


# --- ranks ---------------------------------------------------------------------------------------------------------


def shares(world: int, how: str) -> list[list[dict[str, torch.Tensor]]]:
    """Batches of each rank, of 24 rows."""
    data = samples(24)
    if how == "rows":
        return [
            list(DataLoader(data, 2, collate_fn=collate, sampler=DistributedSampler(data, world, rank, shuffle=False)))
            for rank in range(world)
        ]
    if how == "batches":
        from accelerate.data_loader import prepare_data_loader

        loader = DataLoader(data, 2, collate_fn=collate)
        return [
            list(prepare_data_loader(loader, torch.device("cpu"), world, rank, put_on_device=False))
            for rank in range(world)
        ]
    size = 24 // world
    return [batches(data[rank * size : (rank + 1) * size], 3) for rank in range(world)]


@pytest.mark.parametrize("how", ["rows", "batches", "blocks"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_another_number_of_ranks_finds_the_same_rows(world, how, monkeypatch):
    import accelerate.data_loader as accelerated

    monkeypatch.setattr(accelerated, "synchronize_rng_states", lambda *_: None)  # there are no real ranks to agree
    logs = []
    for share in shares(world, how):
        log = RowLog()
        for batch in share:
            log.add(batch)
        logs.append(log)
    orders = global_orders([log.digests for log in logs], [log.batch_rows for log in logs])
    whole = digest(batches(samples(24), 5))
    assert whole in orders
    assert len(orders) == (1 if world == 1 else 3)
    without = global_orders([log.digests for log in logs])
    assert (whole in without) == (how != "batches" or world == 1)


def test_ranks_of_unequal_length_keep_all_rows():
    a, b, c = (hashlib.sha256(name).digest() for name in (b"a", b"b", b"c"))
    expected = [hashlib.sha256(order).hexdigest() for order in (a + c + b, a + b + c)]
    assert global_orders([[a, b], [c]]) == expected
    assert global_orders([[a, b], [c]], [[2], [1]]) == expected
    assert global_orders([]) == [hashlib.sha256().hexdigest()]


# --- functions -----------------------------------------------------------------------------------------------------


def mine(model, batch):
    return model(batch)


def test_functions_are_known_by_name_or_by_what_their_author_says():
    name = "smartinit.activations.rows:prepare_layer_inputs_fn_language_modeling"
    assert callable_key(None) == "none"
    assert callable_key(rows.prepare_layer_inputs_fn_language_modeling) == name
    assert callable_key(mine) is callable_key(lambda x: x) is callable_key(Odd()) is callable_key(len) is None
    assert callable_key(functools.partial(rows.flatten_rows)) is None
    pretends = functools.wraps(rows.flatten_rows)(lambda tensor: tensor * 2)
    assert callable_key(pretends) is None
    pretends.store_key = "twice-1"
    assert callable_key(pretends) == "store_key:twice-1"
    pretends.store_key = 3
    assert callable_key(pretends) is None
