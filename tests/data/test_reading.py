from __future__ import annotations

import json

import pytest

from smartinit.data import Sampling, read_batches
from smartinit.data.columns import ColumnNames
from smartinit.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("no_network")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_from_a_file_to_batches(tmp_path, make_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"mr": f"{i} ", "ref": "apples", "n": i} for i in range(7)])
    sampling = Sampling(batch_size=3, max_samples=5, columns=ColumnNames(prompt="mr", completion="ref"))
    tokenizer = make_tokenizer()
    batches = read_batches(path, tokenizer, sampling, vocab_size=len(tokenizer))
    assert [len(batch["labels"]) for batch in batches] in ([3, 2], [2, 3])
    assert "apples<eos>" in tokenizer.decode(next(iter(batches))["input_ids"][0])


def test_all_tokens_masked(tmp_path, make_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    with pytest.raises(DataError, match="none of the 3 rows has a token that counts"):
        read_batches(path, make_tokenizer(), Sampling())


def test_the_pad_token_falls_back_to_the_end_token_then_zero(tmp_path, make_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "a long row of words"}])
    for tokens, pad in (({}, 0), ({"pad_token": None}, 2), ({"pad_token": None, "eos_token": None}, 0)):
        tokenizer = make_tokenizer(**tokens)
        (batch,) = read_batches(path, tokenizer, Sampling(batch_size=2))
        assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {pad}


def test_real_rows_on_a_real_tokenizer(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "stories260k")
    batches = read_batches(assets / "gsm8k" / "test.jsonl", tokenizer, Sampling(max_samples=8, max_length=512))
    for batch in batches:
        assert batch["input_ids"].shape[1] <= 512
        assert (batch["labels"] != -100).any(1).all()
        assert (batch["labels"] == -100).any(1).all()


def test_sampling_survives_json():
    sampling = Sampling(max_samples=3, columns=ColumnNames(text="body"))
    assert Sampling.from_dict(json.loads(json.dumps(sampling.as_dict()))) == sampling


@pytest.mark.parametrize("name", ["batch_size", "max_length", "max_samples"])
def test_sampling_refuses_zero(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1"):
        Sampling(**{name: 0})
