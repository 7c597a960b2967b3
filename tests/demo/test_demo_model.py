from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from smartinit import demo
from smartinit.errors import MissingFileError

if TYPE_CHECKING:
    from types import ModuleType

CONTEXT = 256


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.model_folder())


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((demo.model_folder() / "training.json").read_text("utf-8"))


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in demo.data_file(name).read_text("utf-8").splitlines()]


def test_the_module_imports_neither_torch_nor_transformers():
    code = "import sys, smartinit.demo as d; d.model_folder(); print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_package_data_stays_small():
    folder = Path(demo.__file__).parent
    files = [f for part in ("model", "data") for f in (folder / part).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 6_000_000
    assert demo.data_file().stat().st_size <= 400_000


def test_unknown_data_file_names_the_known_ones():
    with pytest.raises(MissingFileError, match="messages, text, train"):
        demo.data_file("validation")


def test_model_and_tokenizer_load_without_a_warning():
    heard: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda entry: heard.append(entry.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(listener)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(demo.model_folder(), output_loading_info=True)
        AutoTokenizer.from_pretrained(demo.model_folder())
    finally:
        logger.removeHandler(listener)
    assert not heard
    assert not any(info.values()), info
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_record_shows_learning(record: dict[str, Any]):
    held_out = record["held_out"]
    assert held_out["random_init"] == pytest.approx(math.log(record["recipe"]["vocabulary"]), abs=0.4)
    assert held_out["loss"] < held_out["unigram"] - 2.0
    assert record["rows"]["loss"] < record["rows"]["random_init"] / 5
    curve = [point["held_out"] for point in record["curve"]]
    assert curve[0] == held_out["random_init"]
    assert curve[-1] == pytest.approx(held_out["loss"], abs=1e-5)
    assert curve[0] - curve[len(curve) // 2] > curve[len(curve) // 2] - curve[-1] > 0


def test_check_reproduces_the_recorded_losses_and_notices_other_weights(
    maker: ModuleType, record: dict[str, Any], tmp_path: Path
):
    out = Path(demo.__file__).parent
    assert maker.check(out)

    shutil.copytree(out / "model", tmp_path / "model")
    shutil.copytree(out / "data", tmp_path / "data")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        weights.model.layers[2].mlp.down_proj.weight.mul_(0.5)
    weights.save_pretrained(tmp_path / "model")
    assert not maker.check(tmp_path)


def test_an_untrained_model_is_far_worse(maker: ModuleType, tokenizer: Any, record: dict[str, Any]):
    trained = AutoModelForCausalLM.from_pretrained(demo.model_folder())
    torch.manual_seed(0)
    untrained = LlamaForCausalLM(trained.config)
    known, unknown = (maker.rows_loss(m, tokenizer, demo.data_file(), count=40) for m in (trained, untrained))
    assert known < 0.2 * unknown
    assert known == pytest.approx(record["rows"]["loss"], rel=0.25)


def test_chat_template_marks_the_assistants_words(tokenizer: Any):
    for row in read("messages"):
        talk = row["messages"]
        whole = tokenizer.apply_chat_template(talk, tokenize=False)
        asked = tokenizer.apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True)
        assert whole == asked + talk[-1]["content"] + tokenizer.eos_token

        encoded = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        spoken = [i for i, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
        answers = [m["content"] + tokenizer.eos_token for m in talk if m["role"] == "assistant"]
        assert tokenizer.decode(spoken) == "".join(answers)


def test_every_text_encodes_and_decodes(tokenizer: Any):
    text = "def f(x):\n\treturn x  # 1234 naïve Łódź 漢字 🙂\r\n\x00"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


@pytest.mark.parametrize(
    ("name", "keys", "least"),
    [("train", {"prompt", "completion"}, 600), ("messages", {"messages"}, 40), ("text", {"text"}, 40)],
)
def test_rows_have_their_columns_and_fit_the_context(tokenizer: Any, name: str, keys: set[str], least: int):
    rows = read(name)
    assert len(rows) >= least
    for row in rows:
        assert row.keys() == keys
        talk = row.get("messages") or [
            {"role": role, "content": row[key]}
            for role, key in (("user", "prompt"), ("assistant", "completion"), ("user", "text"))
            if key in row
        ]
        assert all(m["content"].strip() == m["content"] != "" for m in talk)
        if "messages" in row:
            roles = [m["role"] for m in talk if m["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
        else:
            assert len(tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]) <= CONTEXT
    assert len({json.dumps(row) for row in rows}) == len(rows)


def test_data_files_come_from_the_script_byte_for_byte(maker: ModuleType, tmp_path: Path):
    maker.write_data(tmp_path, maker.Recipe())
    for name in ("train", "messages", "text"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == demo.data_file(name).read_bytes()


def test_two_trainings_give_the_same_bytes_and_another_seed_others(maker: ModuleType, tmp_path: Path):
    def made(folder: str, seed: int) -> tuple[bytes, ...]:
        recipe = maker.Recipe(
            steps=3,
            warmup=2,
            context=32,
            vocabulary=400,
            hidden=32,
            intermediate=48,
            layers=1,
            evaluation_windows=2,
            train_modules=("bisect", "heapq"),
            held_out_modules=("sched",),
            seed=seed,
        )
        maker.train(tmp_path / folder, recipe)
        model = tmp_path / folder / "model"
        return tuple((model / f).read_bytes() for f in ("model.safetensors", "tokenizer.json", "training.json"))

    first = made("first", 1)
    assert made("second", 1) == first
    assert made("third", 2)[0] != first[0]
