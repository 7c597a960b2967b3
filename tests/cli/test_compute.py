from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file


def test_the_main_job(compute, tmp_path):
    done = compute()
    assert done.code == 0, done.err
    assert "self_attn.q_proj" in done.out
    assert "ranks: 16 of 16 used" in done.out
    assert f"adapter: {tmp_path / 'adapter'}" in done.out
    assert "activations: 100%" in done.err, "the progress bar belongs to stderr"
    assert "sites settled" in done.err
    written = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "smartinit.json"} <= written


def test_json_is_one_document_with_the_contract(compute, tmp_path):
    done = compute("--json")
    assert done.code == 0
    document = done.document
    assert document["hit"] is None
    assert len(document["key"]) == 64
    assert document["out"] == str(tmp_path / "adapter")
    summary = document["summary"]
    assert (summary["ranks"], summary["budget"]) == (16, {"unit": "ranks", "value": 16})
    assert {row["type"] for row in summary["layers"]} == {"self_attn.q_proj", "self_attn.v_proj"}
    assert summary["sites"] == 2
    assert summary["tokens"] > 100
    record = json.loads((tmp_path / "adapter" / "smartinit.json").read_text())
    assert record["provenance"]["batches_of"]["max_length"] == 64, "cut to what the model can read"


def test_quiet_says_nothing_on_stderr(compute):
    done = compute("--quiet")
    assert (done.code, done.err) == (0, "")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_loads_the_folder_and_the_model_starts_where_it_was(compute, model_folder, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    assert compute("--quiet", "--target-modules", "all-linear").code == 0
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True).eval()
        assert torch.equal(before, adapted(ids).logits)


def test_two_runs_are_bitwise_equal(compute, tmp_path):
    for name in ("one", "two"):
        assert compute("--quiet", "--no-store", out=tmp_path / name).code == 0
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_force_replaces_an_adapter(compute, tmp_path):
    assert compute("--quiet").code == 0
    (tmp_path / "adapter" / "old").touch()
    refused = compute("--quiet")
    assert refused.code == 2
    assert "exists already" in refused.err
    assert (tmp_path / "adapter" / "old").exists()
    assert compute("--quiet", "--force", rank=2).code == 0
    assert not (tmp_path / "adapter" / "old").exists()


def test_prompts_do_not_count(compute, write_rows):
    rows = [{"prompt": "How many apples and pears are there? ", "completion": f"There are {i}."} for i in range(20)]
    data = write_rows("pairs.jsonl", rows)
    masked, whole = (
        compute("--json", "--quiet", *more, "--force", data=data).document["summary"]["tokens"]
        for more in ((), ("--no-label-mask",))
    )
    assert masked < whole


def test_encoders(compute, assets, write_rows, tmp_path):
    data = write_rows("pairs.jsonl", [{"sentence1": f"a cat {i}", "sentence2": "a dog"} for i in range(12)])
    done = compute("--json", model=assets / "all-minilm-l6-v2", data=data, target_modules="query", rank=2)
    assert done.code == 0, done.err
    assert [row["type"] for row in done.document["summary"]["layers"]] == ["attention.self.query"]


def test_the_folder_moves_with_its_parents(compute, tmp_path):
    assert compute("--quiet", out=tmp_path / "new" / "parents" / "adapter").code == 0
    assert (tmp_path / "new" / "parents" / "adapter" / "adapter_config.json").exists()


# -- bad input: one sentence, the right exit code, nothing left -------------------------------------------------------


def overflow(tensors):
    """Finite weights, but layer 0 gives infinities, of which the norm before layer 1 makes NaN."""
    tensors["model.layers.0.mlp.gate_proj.weight"].fill_(1e20)
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(1e20)


def not_a_number(tensors):
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")


class Case:
    """How to spoil the inputs (model, data, edit), and what must come of it."""

    def __init__(self, code, message, *arguments, spoil=None, **options):
        self.code, self.message, self.arguments, self.spoil, self.options = code, message, arguments, spoil, options


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


CASES = {
    "missing model": Case(2, "model folder .* does not exist", model="./missing"),
    "empty model": Case(6, "is empty", spoil=lambda given: empty(given.model)),
    "missing data": Case(2, "data file .* does not exist", data="./missing.jsonl"),
    "empty data": Case(6, "is empty", spoil=lambda given: given.data.write_text("")),
    "blank data": Case(6, "holds no rows", spoil=lambda given: given.data.write_text("\n\n")),
    "broken line": Case(
        6,
        r"line 3 of .*data\.jsonl is not valid JSON",
        spoil=lambda given: given.data.write_text('{"text": "a"}\n' * 2 + "{"),
    ),
    "not UTF-8": Case(
        6, r"line 1 of .*data\.jsonl is not UTF-8", spoil=lambda given: given.data.write_bytes(b'{"text": "\xff"}\n')
    ),
    "unsupported data": Case(6, "suffix that is not read", data=sys.executable),
    "no usable column": Case(
        6,
        "no usable column .* found body; understood are",
        spoil=lambda given: given.data.write_text('{"body": "a"}\n' * 9),
    ),
    "a column that is not there": Case(6, "no column 'body'; it has text", "--text-column", "body"),
    "all tokens masked": Case(
        6,
        "none of the 9 rows has a token that counts",
        spoil=lambda given: given.data.write_text('{"prompt": "a", "completion": ""}\n' * 9),
    ),
    "no chat template": Case(
        6,
        "no chat template",
        spoil=lambda given: given.data.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 9),
    ),
    "targets that match nothing": Case(2, "matched none of .* closest: 'q_proj'", "--target-modules", "q_porj"),
    "rank above min(in, out)": Case(2, r"rank 33 of .*is above min\(out, in\)", rank=33),
    "rank zero": Case(2, "--rank 0 cannot be", rank=0),
    "rho below 1": Case(2, "rho=0.9 cannot be", "--rho", "0.9"),
    "tau above 1": Case(2, r"tau=1\.1 cannot be", "--tau", "1.1"),
    "tau below 0": Case(2, r"tau=-0\.1 cannot be", "--tau", "-0.1"),
    "NaN weights": Case(
        6,
        r"'model\.layers\.0\.mlp\.down_proj\.weight' holds NaN",
        spoil=lambda given: given.edit(given.model, not_a_number),
    ),
    "NaN activations": Case(
        6,
        r"the input of layer 'model\.layers\.1\..*' holds NaN or Inf in batch 0",
        spoil=lambda given: given.edit(given.model, overflow),
    ),
    "NaN activations in every batch": Case(
        6, "batches hold NaN or Inf", "--skip-bad-batches", spoil=lambda given: given.edit(given.model, overflow)
    ),
    "too few tokens": Case(
        6, "too few tokens: layer", spoil=lambda given: given.data.write_text('{"text": "ab"}\n'), rank=8
    ),
    "unknown method": Case(2, "unknown method 'eav'.*closest: 'eva'", method="eav"),
    "an option that the method lacks": Case(2, "'eva' has no option 'bits'", "--option", "bits=4"),
    "an option without a value": Case(2, "--option 'bits' is no option of a method", "--option", "bits"),
    "a share above one": Case(2, "--captured 1.5 cannot be", "--captured", "1.5"),
    "an output that is a file": Case(2, "cannot be written|is a file", out=sys.executable),
    "an output below a file": Case(2, "cannot be written", out=os.path.join(sys.executable, "adapter")),  # noqa: PTH118
    "an existing output folder": Case(2, "exists already", out="."),
    "a device that is not there": Case(2, "--device cuda:99 is not here", "--device", "cuda:99"),
    "a plot of no format": Case(2, "no suffix of a figure", "--plot", "figure.txt"),
}


@pytest.mark.parametrize("arguments", [("--target-modules", "q_porj"), ("--rank", 33), ("--option", "bits=4")])
def test_what_the_configuration_rules_out_is_refused_before_weights_are_read(
    compute, model_folder, edit_weights, arguments
):
    edit_weights(model_folder, not_a_number)
    assert compute("--quiet", *arguments).code == 2


@pytest.fixture
def inputs(model_folder, data_file, edit_weights):
    """What a case may spoil."""
    return SimpleNamespace(model=model_folder, data=data_file, edit=edit_weights)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input(case, compute, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if case.spoil is not None:
        case.spoil(inputs)
    before = sorted(tmp_path.iterdir())
    done = compute("--quiet", "--json", *case.arguments, **case.options)
    assert done.code == case.code, done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("smartinit: error: ")
    assert done.document == {"error": done.err.removeprefix("smartinit: error: ").strip(), "exit_code": case.code}
    assert re.search(case.message, done.err), done.err
    assert sorted(tmp_path.iterdir()) == before, "nothing may be left"


def test_bad_batches_can_be_skipped(compute, model_folder, data_file, edit_weights):
    """Only batches with the one token that uses dimension 0 overflow."""
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(model_folder)("Q")["input_ids"]
    data_file.write_text(data_file.read_text() + '{"text": "Q and a half"}\n')

    def spoil(tensors):
        embeddings = tensors["model.embed_tokens.weight"]
        embeddings[:, 0] = 0
        embeddings[token] = torch.eye(embeddings.shape[1])[0]
        tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0
        tensors["model.layers.0.mlp.gate_proj.weight"][:, 0] = 1e20
        tensors["model.layers.0.mlp.up_proj.weight"][:, 0] = 1e20

    edit_weights(model_folder, spoil)
    assert compute("--quiet").code == 6
    done = compute("--quiet", "--json", "--skip-bad-batches")
    assert done.code == 0, done.err
    assert done.document["summary"]["bad_batches"] == 1


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["loading libraries", "activations:"])
def test_ctrl_c(saved_model, data_file, tmp_path, moment):
    """A real process: 130, one line, nothing partial, no temporary files."""
    data_file.write_text(data_file.read_text() * 500)
    scratch = tmp_path / "scratch"
    command = [sys.executable, "-m", "smartinit", "compute", "--model", saved_model, "--data", data_file]
    process = subprocess.Popen(
        [*map(str, command), "--tau", "1", "--rank", "4", "--batch-size", "2", "--out", str(tmp_path / "adapter")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    seen = b""
    while moment.encode() not in seen:
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, seen.decode()
        seen += piece
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    last = (seen + err).decode().strip().splitlines()[-1]
    assert process.returncode == 130, err.decode()
    assert last == "smartinit: error: interrupted; no partial output was left"
    assert out == b""
    assert "Traceback" not in (seen + err).decode()
    assert not (tmp_path / "adapter").exists()
    assert list(scratch.iterdir()) == []


def test_a_split_is_written_with_its_base_and_converts(compute, run_cli, tmp_path):
    done = compute("--method", "pissa", "--quiet")
    assert done.code == 0, done.err
    assert done.err == ""
    assert f"base:    {tmp_path / 'adapter-base'}" in done.out
    assert (tmp_path / "adapter-base" / "tokenizer.json").is_file()
    plain = tmp_path / "plain"
    assert run_cli("convert", tmp_path / "adapter", "--start", tmp_path / "adapter", "--out", plain).code == 0
    again = run_cli("convert", plain, "--start", tmp_path / "adapter", "--out", tmp_path / "twice")
    assert again.code == 2
    assert "was converted already" in again.err
    assert not (tmp_path / "twice").exists()


def test_a_doubled_adapter_is_not_converted_again(compute, run_cli, tmp_path):
    doubled = tmp_path / "doubled"
    assert compute("--method", "pissa", "--quiet").code == 0
    assert compute("--method", "pissa", "--quiet", "--base", "doubled", out=doubled).code == 0
    assert not (tmp_path / "doubled-base").exists()
    (doubled / "smartinit.json").unlink()  # a trainer's folder has none
    done = run_cli("convert", doubled, "--start", tmp_path / "adapter", "--out", tmp_path / "plain")
    assert done.code == 6
    assert "plain LoRA for the unmodified base already" in done.err


@pytest.mark.parametrize("place", ["model", "adapter", "model/inside"])
def test_the_base_model_never_goes_where_something_is(compute, model_folder, tmp_path, place):
    before = {path: path.read_bytes() for path in model_folder.rglob("*") if path.is_file()}
    done = compute("--method", "pissa", "--force", "--base-out", tmp_path / place)
    assert done.code == 2
    assert "the base model cannot go to" in done.err
    assert {path: path.read_bytes() for path in model_folder.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "adapter").exists()


def test_a_model_without_a_tokenizer_is_enough_for_methods_without_data(compute, model_folder, tmp_path):
    for file in (*model_folder.glob("tokenizer*"), *model_folder.glob("chat_template*")):
        file.unlink()
    done = compute("--method", "olora", "--quiet")
    assert done.code == 0, done.err
    assert (tmp_path / "adapter-base" / "config.json").is_file()


def test_a_method_that_looks_at_data_wants_some(run_cli, model_folder, tmp_path):
    done = run_cli("compute", "--model", model_folder, "--method", "corda", "--out", tmp_path / "adapter")
    assert done.code == 2
    assert "looks at data: pass --data" in done.err


def test_base_out_where_nothing_would_go_there(compute, tmp_path):
    done = compute("--base-out", tmp_path / "base")
    assert done.code == 2
    assert "leaves the base model as it is" in done.err
