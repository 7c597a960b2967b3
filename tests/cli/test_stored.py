"""compute with a store: what is there is not computed again, and what differs is not taken for the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smartinit.artefact import Artefact
from smartinit.cli import precision
from smartinit.cli.compute import command
from smartinit.cli.request import read_request
from smartinit.cli.stored import StoreMayFail, request_leaves
from smartinit.errors import OutputError, StoreError
from smartinit.store import Store
from smartinit.store import requests as stored_requests

HEAVY = ("torch", "transformers", "datasets", "numpy", "sklearn")


@pytest.fixture
def work(monkeypatch):
    """How often weights were loaded, and batches run through a model."""
    from transformers.models.llama import modeling_llama

    from smartinit.cli import load_model

    counts = {"loaded": 0, "passes": 0}
    load, mask = load_model.load_weights, modeling_llama.create_causal_mask

    def loading(*arguments, **options):
        counts["loaded"] += 1
        return load(*arguments, **options)

    def passing(*arguments, **options):
        counts["passes"] += 1
        return mask(*arguments, **options)

    monkeypatch.setattr(load_model, "load_weights", loading)
    # not the class's forward: who replaces that has another model
    monkeypatch.setattr(modeling_llama, "create_causal_mask", passing)
    return counts


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_same_request_is_a_hit_that_loads_no_library(compute, model_folder, data_file, tmp_path):
    first = compute("--json", "--quiet").document
    assert (first["hit"], first["store"]) == (None, os.environ["SMARTINIT_CACHE"])
    code = (
        "import sys\nfrom smartinit.cli import main\ncode = main(sys.argv[1:])\n"
        f"print(*set({HEAVY}) & set(sys.modules), file=sys.stderr)\nsys.exit(code)"
    )
    arguments = ["compute", "--json", "--rank", "4", "--model", model_folder, "--data", data_file]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), "--out", str(tmp_path / "again")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "", "nothing heavy was imported, nothing was said"
    again = json.loads(done.stdout)
    assert (again["hit"], again["key"]) == ("artefact", first["key"])
    assert {**again["summary"], "seconds": 0} == {**first["summary"], "seconds": 0}
    assert same(tensors(tmp_path / "adapter"), tensors(tmp_path / "again"))
    loaded = Artefact.load(tmp_path / "again")
    assert loaded.provenance["model"] == str(model_folder)
    (tmp_path / "again" / "README.md").write_text("mine")  # the copy is the user's own
    assert compute("--json", "--quiet", out=tmp_path / "third").document["hit"] == "artefact"


def test_the_text_is_that_of_the_computation_but_for_the_time(compute, tmp_path):
    def shown(name):
        done = compute("--quiet", out=tmp_path / name)
        assert done.code == 0
        return [line for line in done.out.splitlines() if not line.startswith(("seconds:", "adapter:"))]

    first, again = shown("one"), shown("two")
    place = re.escape(os.environ["SMARTINIT_CACHE"])
    assert re.fullmatch(rf"store:   kept in {place} \([0-9a-f]{{12}}\)", first.pop())
    assert re.fullmatch(rf"store:   a hit in {place}: nothing was computed \([0-9a-f]{{12}}\)", again.pop())
    assert first == again


def test_other_names_are_a_hit_and_stand_in_the_folder(compute, model_folder, data_file, tmp_path, work):
    assert compute("--quiet").code == 0
    work.update(loaded=0, passes=0)
    data = data_file.rename(tmp_path / "other.jsonl")
    assert compute("--json", data=data, out=tmp_path / "data").document["hit"] == "artefact"
    assert Artefact.load(tmp_path / "data").provenance["data"] == str(data)
    model = model_folder.rename(tmp_path / "renamed")
    done = compute("--json", model=model, data=data, out=tmp_path / "again")
    assert done.document["hit"] == "artefact"
    assert work == {"loaded": 0, "passes": 0}
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    again = Artefact.load(tmp_path / "again")
    assert (again.provenance["model"], again.provenance["data"]) == (str(model), str(data))
    assert same(tensors(tmp_path / "adapter"), tensors(tmp_path / "again"))


def test_other_ranks_and_methods_of_the_same_statistics_run_nothing(compute, tmp_path, work):
    assert compute("--quiet", rank=8).code == 0
    assert work["passes"] > 0
    work.update(loaded=0, passes=0)
    for name, options in {"half": {"rank": 4}, "rho": {"rank": 8, "rho": 1}, "tau": {"rank": 8, "tau": 0.9}}.items():
        done = compute("--json", out=tmp_path / name, **options)
        assert (done.document["hit"], work["passes"]) == ("spectra", 0), name
    assert work["loaded"] == 0, "EVA needs no weights"
    assert compute("--quiet", "--no-store", rank=8, rho=1, out=tmp_path / "fresh").code == 0
    assert tensors(tmp_path / "fresh").keys() == tensors(tmp_path / "rho").keys()


def test_no_compute(compute, tmp_path, work):
    refused = compute("--no-compute", "--json", "--quiet")
    assert refused.code == 3
    assert refused.document["exit_code"] == 3
    assert "not in the store, and --no-compute forbids to compute it" in refused.err
    assert work["passes"] == 0
    assert not (tmp_path / "adapter").exists()
    assert compute("--quiet").code == 0
    assert compute("--quiet", "--no-compute", out=tmp_path / "again").code == 0
    assert compute("--quiet", "--no-compute", out=tmp_path / "smaller", rank=2).code == 0, "its spectra are there"
    other = compute("--quiet", "--no-compute", out=tmp_path / "other", seed=1)
    assert other.code == 3
    assert "differs in sampling.seed (1, there 0)" in other.err


def test_the_same_rows_in_other_files_need_neither_weights_nor_passes(compute, data_file, tmp_path, work):
    assert compute("--quiet").code == 0
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    data = tmp_path / "data.csv"
    data.write_text("text\n" + "".join(f'"{row["text"]}"\n' for row in rows))
    work.update(loaded=0, passes=0)
    done = compute("--json", "--no-compute", data=data, out=tmp_path / "again")
    assert (done.code, done.document["hit"]) == (0, "artefact"), done.err
    assert work == {"loaded": 0, "passes": 0}


def test_refresh_computes_and_replaces(compute, tmp_path, work):
    first = compute("--json", "--quiet").document
    work["passes"] = 0
    again = compute("--json", "--quiet", "--refresh", out=tmp_path / "again").document
    assert (again["hit"], again["key"]) == (None, first["key"])
    assert work["passes"] > 0


def test_without_a_store_nothing_is_kept(compute, tmp_path):
    for name in ("one", "two"):
        document = compute("--json", "--quiet", "--no-store", out=tmp_path / name).document
        assert (document["hit"], document["store"]) == (None, None)
        assert document["key"] == Artefact.load(tmp_path / name).recipe.digest
    assert not Path(os.environ["SMARTINIT_CACHE"]).exists()


def test_named_stores(compute, tmp_path):
    team, own = tmp_path / "team", tmp_path / "own"
    assert compute("--quiet", store=team).code == 0
    assert not Path(os.environ["SMARTINIT_CACHE"]).exists()
    done = compute("--json", "--quiet", "--store", own, "--store", team, out=tmp_path / "again")
    assert done.document["hit"] == "artefact"
    assert done.document["store"] == str(own)
    assert done.document["key"] in Store(own), "what the team has is copied"
    fresh = tmp_path / "fresh"
    shown = compute("--quiet", "--store", fresh, "--store", team, out=tmp_path / "third").out
    assert f"store:   a hit in {team}: nothing was computed" in shown
    shown = compute("--quiet", "--store", fresh, "--store", team, out=tmp_path / "fourth").out
    assert f"store:   a hit in {fresh}: nothing was computed" in shown


@pytest.mark.parametrize(
    "arguments", [("--no-store", "--store", "x"), ("--no-store", "--no-compute"), ("--no-compute", "--refresh")]
)
def test_options_that_contradict_each_other(compute, arguments):
    done = compute(*arguments)
    assert done.code == 2
    assert "contradict each other" in done.err


def test_a_miss_says_in_what_it_differs(compute, data_file, tmp_path):
    assert "store: a miss; the store remembers no request" in compute().err
    data_file.write_text(data_file.read_text().replace("Paris", "Parma"))
    done = compute(out=tmp_path / "again")
    assert re.search(
        r'store: a miss; the nearest request \(artefact \w{12}\) differs in data.files\[0\] \("?\w', done.err
    )


# -- what is the same request, and what is not ------------------------------------------------------------------------


@pytest.fixture
def leaves(model_folder, data_file, tmp_path):
    """A request's leaves, as compute would read them from these arguments."""

    def read(*arguments, model=model_folder, data=data_file):
        given = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), *map(str, arguments)]
        options = command.make_context("compute", given).params
        return request_leaves(read_request(options), options, tmp_path / "memo")

    return read


def test_places_and_looks_are_no_part_of_a_request(leaves, model_folder, data_file, tmp_path):
    before = leaves()
    assert before is not None
    assert leaves("--force", "--quiet", "--json", "--plot", "x.png", "--store", "y", "--device", "cpu") == before
    model = shutil.copytree(model_folder, tmp_path / "elsewhere")
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=7))
    assert leaves(model=model, data=shutil.copy(data_file, tmp_path / "elsewhere.jsonl")) == before


def replace_in(name, old, new):
    """Change a file of the model folder; what is replaced must be there."""

    def change(model, _):
        text = (model / name).read_text()
        assert old in text
        (model / name).write_text(text.replace(old, new, 1))

    return change


def flip_a_bit(model, _):
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def sort_rows(_, data):
    data.write_text("".join(sorted(data.read_text().splitlines(keepends=True))))


CHANGES = {
    "a bit of a weight": flip_a_bit,
    "a byte of the data": lambda _, data: data.write_text(data.read_text().replace("Lima", "Rima", 1)),
    "the order of rows": sort_rows,
    "a chat template": lambda model, _: (model / "chat_template.jinja").write_text("{{ messages }}"),
    "the tokenizer": replace_in("tokenizer.json", '"<eos>"', '"<end>"'),
    "the configuration": replace_in("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_a_result_changes_the_request(leaves, model_folder, data_file, change):
    before = leaves()
    change(model_folder, data_file)
    assert leaves() != before


OPTIONS = {
    "method": "olora", "rank": 3, "alpha": 7, "rslora": None, "target-modules": "q_proj", "exclude-modules": "v_proj",
    "layers-to-transform": 0, "rho": 1.5, "tau": 0.5, "whiten": None, "no-adjust-scaling": None, "planner": "uniform",
    "budget": 9, "captured": 0.5, "frozen-a": None, "match-gain": "kaiming", "params": 999, "rank-multiple-of": 2,
    "min-rank": 1, "max-rank": 9, "split": "test", "data-config": "x", "text-column": "x", "prompt-column": "x",
    "completion-column": "x", "messages-column": "x", "no-label-mask": None, "batch-size": 2, "max-length": 9,
    "max-samples": 9, "max-batches": 2, "seed": 1, "skip-bad-batches": None, "dtype": "bfloat16",
    "option": "whiten=true", "trust-remote-code": None,
}  # fmt: skip
NEUTRAL = {
    "model", "data", "out", "force", "plot", "base", "base-out", "json", "quiet", "store", "no-store", "no-compute",
    "refresh", "device", "label-mask", "no-whiten", "adjust-scaling",
}  # fmt: skip


def test_every_option_is_in_one_of_the_tables():
    names = {name[2:] for option in command.params for name in (*option.opts, *option.secondary_opts)}
    assert names == set(OPTIONS) | NEUTRAL


@pytest.mark.parametrize(("name", "value"), OPTIONS.items(), ids=OPTIONS)
def test_every_option_that_matters_changes_the_request(leaves, name, value):
    both = {"prompt-column", "completion-column"}
    pair = [f"--{column}=a" for column in both] if name in both else []  # one is refused without the other
    more = [f"--{name}"] if value is None else [f"--{name}", value]
    assert leaves(*pair, *more) != leaves(*pair)


@pytest.fixture
def devices(monkeypatch, tmp_path):
    """A machine whose /dev is empty, with a torch that says nothing of its build."""
    monkeypatch.setattr(precision, "_DEVICES", tmp_path / "dev")
    monkeypatch.setattr(precision, "_build", lambda: "")
    monkeypatch.setattr(precision.sys, "platform", "linux")
    (tmp_path / "dev").mkdir()
    return tmp_path / "dev"


def half(model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))


@pytest.mark.parametrize("node", ["nvidia0", "kfd", "dri/renderD128", "dxg", "accel0"])
def test_half_precision_hangs_on_the_device(leaves, model_folder, devices, node):
    half(model_folder)
    (devices / "nvme0").touch()
    assert leaves()["precision"] == "float32", "no accelerator is here: it can only be the CPU"
    (devices / node).parent.mkdir(exist_ok=True)
    (devices / node).touch()
    assert leaves() is None, "a CPU takes float32 then: which of the two is not known before torch is"
    assert leaves("--device", "cpu")["precision"] == "float32"
    assert leaves("--dtype", "float16")["precision"] == "float16"


def test_a_torch_for_cpus_finds_no_accelerator(leaves, model_folder, devices, monkeypatch):
    half(model_folder)
    (devices / "nvidia0").touch()
    monkeypatch.setattr(precision, "_build", lambda: "cpu")
    assert leaves()["precision"] == "float32"
    monkeypatch.setattr(precision.sys, "platform", "darwin")
    assert leaves() is None
    monkeypatch.setattr(precision, "_build", lambda: "")
    assert leaves() is None


def test_get_says_that_the_device_decides(run_cli, model_folder, data_file, devices):
    half(model_folder)
    (devices / "nvidia0").touch()
    done = run_cli("get", "--model", model_folder, "--data", data_file)
    assert done.code == 3
    assert "name --device or --dtype" in done.err


def test_what_files_do_not_say_has_no_leaves(leaves, model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    assert leaves() is None
    assert leaves(model="some-org/some-model-that-is-not-here") is None


def test_other_libraries_are_confirmed_by_the_first_batches(compute, tmp_path, monkeypatch, work):
    assert compute("--quiet").code == 0
    monkeypatch.setattr(stored_requests, "library_versions", lambda: {"torch": "0.0"})
    work.update(loaded=0, passes=0)
    done = compute("--json", out=tmp_path / "again")
    assert done.document["hit"] == "artefact"
    assert "comparing the first batches" in done.err
    assert work == {"loaded": 0, "passes": 0}

    def lie(*arguments):
        return "0" * 64

    monkeypatch.setattr("smartinit.cli.stored.first_batches", lie)
    done = compute("--json", out=tmp_path / "third")
    assert "loading libraries" in done.err, "the first batches are others: not taken on trust"
    assert done.document["hit"] == "artefact", "but the batches themselves say the same"


# -- a store that fails is no failure of the computation --------------------------------------------------------------


@pytest.mark.filterwarnings("always")
def test_a_store_that_cannot_be_opened(compute, tmp_path):
    (tmp_path / "file").write_text("")
    done = compute(store=tmp_path / "file")
    assert done.code == 0
    assert "is a file; a store is a folder" in done.err
    assert "going on without a store" in done.err
    refused = compute("--no-compute", store=tmp_path / "file", out=tmp_path / "again")
    assert refused.code == 1
    assert refused.last.startswith("smartinit: error: ")


@pytest.mark.filterwarnings("always")
def test_a_store_that_cannot_be_written(compute, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "entries").write_text("in the way")
    done = compute("--json", store=tmp_path / "store")
    assert done.code == 0, done.err
    assert "smartinit: warning: " in done.err
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


@pytest.mark.filterwarnings("always")
def test_what_was_not_kept_is_not_said_to_be(compute, tmp_path, shut):
    assert compute("--json", "--quiet").document["kept"] is True
    shut(Path(os.environ["SMARTINIT_CACHE"]))
    done = compute("--refresh", out=tmp_path / "again")
    assert done.code == 0
    assert "smartinit: warning: " in done.err
    assert "store:   not kept (see the warning)" in done.out
    document = compute("--refresh", "--json", out=tmp_path / "third").document
    assert (document["hit"], document["kept"]) == (None, False)
    half = compute("--rank", 2, out=tmp_path / "half")
    assert "only ranks and factors were computed; not kept (see the warning)" in half.out
    again = compute("--json", out=tmp_path / "fourth").document
    assert (again["hit"], again["kept"]) == ("artefact", True)


def test_only_the_stores_failures_are_survived():
    with (
        pytest.warns(UserWarning, match="nothing was kept: full; going on without it"),
        StoreMayFail("nothing was kept"),
    ):
        raise StoreError("full")
    with pytest.raises(StoreError), StoreMayFail("nothing was kept", strict=True):
        raise StoreError("full")
    for error in (OutputError("the output exists"), KeyboardInterrupt(), ValueError("a defect")):
        with pytest.raises(type(error)), StoreMayFail("nothing was kept"):
            raise error


def blobs(folder):
    found = [path for path in (folder / "blobs").rglob("*") if path.is_file()]
    assert found
    return found


@pytest.mark.filterwarnings("always")
def test_what_is_broken_is_computed_again(compute, tmp_path):
    assert compute("--quiet").code == 0
    for path in blobs(Path(os.environ["SMARTINIT_CACHE"])):
        path.chmod(0o644)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    done = compute("--json", out=tmp_path / "again")
    assert done.code == 0, done.err
    assert done.document["hit"] is None
    assert "quarantine" in done.err
    assert same(tensors(tmp_path / "adapter"), tensors(tmp_path / "again"))
    assert compute("--json", out=tmp_path / "third").document["hit"] == "artefact"


def test_a_request_whose_artefact_is_gone(compute, tmp_path):
    key = compute("--json", "--quiet").document["key"]
    Store().local.remove(key)
    done = compute("--json", out=tmp_path / "again")
    assert "the same request was made before, but its artefact is gone" in done.err
    assert done.document == {**done.document, "hit": "spectra", "key": key}


# -- methods that change the base -------------------------------------------------------------------------------------


def test_data_that_is_not_read_has_no_name(compute, data_file, tmp_path):
    assert compute("--quiet", method="gaussian").code == 0
    done = compute("--json", "--quiet", method="gaussian", out=tmp_path / "again")
    assert done.document["hit"] == "artefact"
    assert list(done.document["summary"]["seconds"]) == ["store"]
    assert (tmp_path / "again" / "smartinit.json").read_bytes().count(str(data_file).encode()) == 0


def test_a_split_is_a_hit_with_its_base(compute, tmp_path, work):
    assert compute("--quiet", method="pissa").code == 0
    done = compute("--json", "--quiet", method="pissa", out=tmp_path / "again")
    assert done.document["hit"] == "artefact"
    assert done.document["base_out"] == str(tmp_path / "again-base")
    assert same(tensors(tmp_path / "adapter"), tensors(tmp_path / "again"))
    one, two = (load_file(tmp_path / f"{name}-base" / "model.safetensors") for name in ("adapter", "again"))
    assert same(one, two)
    work["loaded"] = 0
    doubled = compute("--json", "--quiet", "--base", "doubled", method="pissa", out=tmp_path / "doubled")
    assert (doubled.document["hit"], work["loaded"]) == ("artefact", 0)
    assert json.loads((tmp_path / "doubled" / "adapter_config.json").read_text())["r"] == 8
