"""The start of a run, written down by transformers' Trainer and TRL's, with models of PEFT's and ours."""

from __future__ import annotations

import json
import re
import sys
import types
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

import smartinit as si
from smartinit.errors import ArgumentError, ConfigError, MissingFileError, NotStoredError
from smartinit.store.adapters import adapter_folder, copy_adapter
from smartinit.training_record import RECORD_FILE, compare_start, tensors_digest

peft = pytest.importorskip("peft")

if TYPE_CHECKING:
    from pathlib import Path

# the name that all versions of transformers 5 know
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="session")
def start(lab: Any) -> si.Artefact:
    return si.compute(lab.base(), lab.config(init_lora_weights="eva"), lab.batches(3), show_progress_bar=False)


@pytest.fixture
def folder(start: si.Artefact, tmp_path: Path) -> Path:
    return start.save(tmp_path / "adapter")


def recorded(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD_FILE).read_text())


@pytest.fixture
def train(lab: Any, tmp_path: Path):
    """A few steps of transformers' Trainer with a recorder."""

    def run(model: torch.nn.Module, recorder: si.InitRecorder, *, resume: Path | None = None, **options: Any) -> Any:
        options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1} | options
        arguments = lab.arguments(transformers.TrainingArguments, tmp_path / "run", **options)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=lab.dataset, callbacks=[recorder])
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    return run


def test_the_run_its_checkpoints_and_its_history_name_the_start(lab, start, folder, train, tmp_path, recwarn):
    model = peft.PeftModel.from_pretrained(lab.base(), folder, is_trainable=True)
    trainer = train(model, si.InitRecorder(folder))
    written = recorded(tmp_path / "run")
    assert written == {
        "key": None,
        "recipe": start.recipe.digest,
        "plan": start.plan.digest,
        "tensors": tensors_digest(start.factors),
        "method": "eva",
        "ranks": start.plan.total,
        "adapter": "default",
        "begins_there": True,
        "smartinit": si.__version__,
    }
    for step in (1, 2):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        assert recorded(checkpoint) == written
        history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        assert history[0] == {"smartinit_init": written, "step": 0}
    assert trainer.state.log_history[0] == {"smartinit_init": written, "step": 0}
    assert [str(warning.message) for warning in recwarn if "start" in str(warning.message)] == []


def test_trl(lab, start, folder, tmp_path):
    trl = pytest.importorskip("trl")
    arguments = lab.arguments(trl.SFTConfig, tmp_path / "sft", max_steps=1, max_length=32)
    trainer = trl.SFTTrainer(
        model=lab.ours(start), args=arguments, train_dataset=lab.rows, processing_class=lab.tokenizer,
        callbacks=[si.InitRecorder(start)],
    )  # fmt: skip
    trainer.train()
    written = recorded(tmp_path / "sft")
    assert written["begins_there"] is True
    assert written["tensors"] == si.InitRecorder(folder).digests["tensors"]


def test_an_adapter_that_begins_elsewhere_is_told(lab, start, train, tmp_path):
    with pytest.warns(UserWarning, match="does not begin at the start that is recorded: A of layer .* differs by up"):
        train(lab.theirs(), si.InitRecorder(start), max_steps=1)
    assert recorded(tmp_path / "run")["begins_there"] is False


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda lab, _: lab.base(), "has no adapter 'default'"),
        (lambda lab, _: lab.theirs(r=9), r"A of layer '.*' is \(9, \d+\), not"),
        (lambda lab, start: _with_b(lab.ours(start)), "B of layer .* differs by up to 1"),
    ],
    ids=["no adapter", "another rank", "another B"],
)
def test_what_differs_is_named(lab, start, make, words):
    found = compare_start(make(lab, start), start.factors)
    assert re.search(words, str(found.differing)), found.differing


def _with_b(model: Any) -> Any:
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if "lora_B" in name).fill_(1.0)
    return model


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
def test_rounding_and_wrappers_are_no_difference(lab, start):
    model = lab.ours(start)
    for seen in (model, torch.nn.DataParallel(model), torch.compile(model), model.to(torch.bfloat16)):
        found = compare_start(seen, start.factors)
        assert found.differing is None
        assert found.compared >= 8
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_A" in name:
                value.mul_(1.1)
    assert "differs by up to" in compare_start(model, start.factors).differing


def test_a_split_that_was_doubled_begins_where_it_says(lab, train, tmp_path):
    split = si.compute(lab.base(), lab.config(init_lora_weights="pissa"), show_progress_bar=False)
    doubled = split.save(tmp_path / "doubled", base="doubled")
    model = peft.PeftModel.from_pretrained(lab.base(), doubled, is_trainable=True)
    assert compare_start(model, si.InitRecorder(doubled).artefact.factors).differing is None


def test_a_resumed_run_is_not_compared_but_its_start_is(lab, start, folder, train, tmp_path):
    def model() -> Any:
        return peft.PeftModel.from_pretrained(lab.base(), folder, is_trainable=True)

    train(model(), si.InitRecorder(start), max_steps=1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    train(model(), si.InitRecorder(start), resume=checkpoint)
    assert recorded(tmp_path / "run" / "checkpoint-2")["begins_there"] is True
    name, pair = next((name, pair) for name, pair in start.factors.items() if pair.rank)
    other = replace(start, factors={**start.factors, name: replace(pair, a=pair.a * 2)})
    with pytest.warns(UserWarning, match="began from another start than the one that is recorded now"):
        train(model(), si.InitRecorder(other), resume=checkpoint)


def test_a_record_that_cannot_be_written_does_not_end_the_run(lab, start, train, tmp_path):
    (tmp_path / "run" / RECORD_FILE).mkdir(parents=True)
    with pytest.warns(UserWarning, match="the start is not recorded in"):
        trainer = train(lab.ours(start), si.InitRecorder(start), max_steps=1, save_strategy="no")
    assert trainer.state.global_step == 1


def test_active_runs_of_trackers_get_it(lab, start, train, monkeypatch):
    """Neither tracker is a dependency: what is called is what their documentation shows."""
    said: dict[str, Any] = {}
    config = types.SimpleNamespace(update=lambda values, **options: said.update(wandb=(values, options)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=types.SimpleNamespace(config=config)))
    mlflow = types.SimpleNamespace(active_run=object, set_tags=lambda tags: said.update(mlflow=tags))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    recorder = si.InitRecorder(start)
    train(lab.ours(start), recorder, max_steps=1, save_strategy="no")
    assert said["wandb"] == ({"smartinit_init": recorder.record}, {"allow_val_change": True})
    assert said["mlflow"]["smartinit_init.recipe"] == start.recipe.digest


def test_by_its_key_in_the_store(lab, tmp_path):
    batches, store = lab.batches(2), si.Store(tmp_path / "cache")
    config = lab.config(init_lora_weights="eva")
    stored = si.compute(lab.base(), config, batches, store=store, show_progress_bar=False)
    key = stored.provenance["store"]["key"]
    for name, place in ((key, store), (key[:8], tmp_path / "cache")):
        recorder = si.InitRecorder(name, store=place)
        assert recorder.digests["tensors"] == tensors_digest(stored.factors)
        assert recorder.artefact.recipe.digest == stored.recipe.digest
    assert si.InitRecorder(stored).digests["key"] == key


def test_a_folder_of_a_store_has_its_key(lab, tmp_path):
    store = si.Store(tmp_path / "cache")
    key = si.compute(lab.base(), lab.config(init_lora_weights="orthogonal"), store=store).provenance["store"]["key"]
    assert si.InitRecorder(key, store=store).digests["key"] == key
    folder = adapter_folder(store.local, key)
    assert si.InitRecorder(folder).digests["key"] == key
    copy = copy_adapter(store.local, key, tmp_path / key)
    assert si.InitRecorder(copy).digests["key"] is None, "the store that has it is not named"
    assert si.InitRecorder(copy, store=store).digests["key"] == key
    other = si.compute(lab.base(), lab.config(init_lora_weights="gaussian"))
    other.save(copy, force=True)
    assert si.InitRecorder(copy, store=store).digests["key"] is None, "its name is that of another artefact"


def test_what_names_no_start(tmp_path):
    with pytest.raises(ArgumentError, match="not a int"):
        si.InitRecorder(3)
    with pytest.raises(MissingFileError):
        si.InitRecorder(tmp_path / "nothing")
    with pytest.raises(NotStoredError, match="no entry 'abcdef'"):
        si.InitRecorder("abcdef", store=tmp_path / "cache")
    with pytest.raises(MissingFileError):
        si.InitRecorder("no-key")
    with pytest.raises((ConfigError, MissingFileError)):
        si.InitRecorder("abc", store=tmp_path / "cache")
