from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from smartinit.artefact import Artefact
from smartinit.store import Key, Store


@pytest.fixture
def computed(compute):
    """What compute said."""
    return compute("--json", "--quiet").document


def test_only_the_path_is_printed(run_cli, computed, tmp_path):
    for name in (computed["key"], computed["key"][:6]):
        done = run_cli("get", name)
        assert (done.code, done.err) == (0, "")
        assert done.out.count("\n") == 1
        folder = Path(done.out.removesuffix("\n"))
        assert folder.is_relative_to(os.environ["SMARTINIT_CACHE"])
        assert Artefact.load(folder).plan.digest == Artefact.load(tmp_path / "adapter").plan.digest
        assert (folder / "adapter_config.json").is_file()


def test_json(run_cli, computed):
    done = run_cli("get", computed["key"], "--json")
    assert done.document == {
        "key": computed["key"],
        "path": run_cli("get", computed["key"]).out.strip(),
        "store": os.environ["SMARTINIT_CACHE"],
    }


def test_by_the_options_of_compute(run_cli, computed, model_folder, data_file):
    request = ("get", "--model", model_folder, "--data", data_file, "--rank")
    done = run_cli(*request, 4)
    assert done.code == 0
    assert done.out == run_cli("get", computed["key"]).out
    missed = run_cli(*request, 2)
    assert (missed.code, missed.out) == (3, "")
    assert "not in the store: the nearest request" in missed.err
    assert "differs in adapter.r (2, there 4)" in missed.err
    assert run_cli(*request, 2, "--json").document["exit_code"] == 3


def test_peft_loads_what_is_printed(run_cli, computed, model_folder):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = run_cli("get", computed["key"]).out.strip()
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder)
    ranks = json.loads((Path(folder) / "smartinit.json").read_text())["plan"]["ranks"]
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == sum(rank > 0 for rank in ranks.values())


def test_what_is_not_there(run_cli, tmp_path):
    for arguments in (("get", "abcdef12"), ("get", "ab" * 32), ("get", "abcdef12", "--store", tmp_path / "none")):
        done = run_cli(*arguments)
        assert (done.code, done.out) == (3, "")
        assert "the store has no entry" in done.err
    assert not (tmp_path / "none").exists(), "asking makes no store"


@pytest.mark.filterwarnings("always")
def test_a_broken_artefact_is_not_there(run_cli, computed):
    store = Store()
    manifest = store.peek(computed["key"])
    path = store.local.layout.blob(manifest.blobs["adapter_model.safetensors"].sha256)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    done = run_cli("get", computed["key"])
    assert (done.code, done.out) == (3, "")
    assert "quarantine" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "get needs a key, or a request"),
        (("abc",), "too short"),
        (("../x",), "is no key"),
        (("abcdef12", "--model", "x"), "not both"),
    ],
)
def test_what_cannot_be_asked(run_cli, arguments, message):
    done = run_cli("get", *arguments)
    assert done.code == 2
    assert message in done.err


def test_other_kinds_of_entries_are_no_folders(run_cli):
    store = Store()
    spectrum = Key("spectrum", {"model": "a"})
    store.put(spectrum)
    store.put("plainentry")
    for name, kind in ((spectrum.digest, "spectrum"), ("plainentry", "plain entry")):
        done = run_cli("get", name)
        assert done.code == 2
        assert f"is a {kind}; only artefacts are adapter folders" in done.err


@pytest.mark.filterwarnings("always")
def test_a_store_that_cannot_be_written_is_read(
    run_cli, computed, model_folder, data_file, tmp_path, monkeypatch, shut
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    place = Path(os.environ["SMARTINIT_CACHE"])
    shut(place)
    by_key = run_cli("get", computed["key"])
    assert (by_key.code, by_key.err) == (0, "")
    folder = Path(by_key.out.strip())
    assert folder == tmp_path / "home" / "smartinit" / "adapters" / computed["key"]
    assert Artefact.load(folder).plan.digest == Artefact.load(tmp_path / "adapter").plan.digest
    assert run_cli("get", "--model", model_folder, "--data", data_file, "--rank", 4).out == by_key.out
    own = tmp_path / "own"  # the first of two stores cannot be written, the second has it
    own.mkdir()
    shut(own)
    done = run_cli("get", computed["key"], "--json", "--store", own, "--store", place)
    assert (done.document["path"], done.document["store"]) == (str(folder), str(place))


def test_what_was_computed_again_is_no_change(run_cli, compute, computed, tmp_path):
    folder = run_cli("get", computed["key"]).out
    assert compute("--quiet", "--refresh", "--force").code == 0
    done = run_cli("get", computed["key"])
    assert (done.code, done.out, done.err) == (0, folder, "")


def test_a_model_that_is_nowhere(run_cli, compute, data_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_cli("get", "--model", "nomodel", "--data", data_file)
    assert (done.code, done.out) == (2, "")
    assert "'nomodel' is neither a folder here nor in the hub's cache" in done.err
