from __future__ import annotations

import pytest

from smartinit.data.columns import ColumnNames, choose_columns
from smartinit.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("found", "kind", "first", "second"),
    [
        (["text", "label"], "text", ("text",), None),
        (["id", "prompt", "completion", "text"], "pair", ("prompt",), "completion"),
        (["question", "answer"], "pair", ("question",), "answer"),
        (["instruction", "input", "output", "text"], "pair", ("instruction", "input"), "output"),
        (["instruction", "output"], "pair", ("instruction",), "output"),
        (["prompt", "messages"], "messages", ("messages",), None),
        (["conversations", "id"], "messages", ("conversations",), None),
        (["prompt", "chosen", "rejected"], "pair", ("prompt",), "chosen"),
        (["input_ids", "text"], "tokens", ("input_ids",), None),
    ],
)
def test_table(found, kind, first, second):
    chosen = choose_columns(found)
    assert (chosen.kind, chosen.first, chosen.second) == (kind, first, second)


def test_an_encoder_reads_pairs_as_segments():
    assert choose_columns(["sentence1", "sentence2", "label"], causal=False).second == "sentence2"
    assert choose_columns(["question", "answer"], causal=False).kind == "text"


def test_names_of_the_user_outrank_the_table():
    found = ["text", "mr", "ref", "chat"]
    assert choose_columns(found, ColumnNames(text="ref")).first == ("ref",)
    assert choose_columns(found, ColumnNames(messages="chat")).kind == "messages"
    pair = choose_columns(found, ColumnNames(prompt="mr", completion="ref"))
    assert (pair.kind, pair.first, pair.second) == ("pair", ("mr",), "ref")
    assert pair.describe() == "mr + ref as prompt and completion"


def test_no_usable_column_lists_what_there_is_and_what_is_understood():
    with pytest.raises(DataError, match=r"found mr, ref; understood are text, messages.*--text-column"):
        choose_columns(["mr", "ref"])


def test_a_named_column_that_is_not_there():
    with pytest.raises(DataError, match="no column 'txet'; it has text, label"):
        choose_columns(["text", "label"], ColumnNames(text="txet"))


def test_names_that_contradict():
    with pytest.raises(ConfigError, match="give both"):
        ColumnNames(prompt="a")
    with pytest.raises(ConfigError, match="give one of"):
        ColumnNames(text="a", messages="b")
    with pytest.raises(ConfigError, match="reads texts, not messages"):
        choose_columns(["m"], ColumnNames(messages="m"), causal=False)
