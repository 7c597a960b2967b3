"""``smartinit convert``: the verb around `smartinit.convert.convert_adapter`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import smartinit as si
from smartinit.artefact import LayerSummary
from smartinit.megatron import LoRA, save_adapter

NAMES = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qv"]


@pytest.fixture
def start(tmp_path, seed):
    """The folder of a split, as an artefact."""
    generator = torch.Generator().manual_seed(seed)
    factors, layers = {}, {}
    for name in NAMES:
        out = 32 if "q_proj" in name else 16
        a, b = torch.randn(3, 32, generator=generator), torch.randn(out, 3, generator=generator)
        factors[name] = si.Factors(a, b, effect="splits")
        layers[name] = LayerSummary((out, 32), (), si.Certificate(rows=0))
    artefact = si.Artefact(
        recipe=si.Recipe("pissa", {}, {"name": "uniform"}, tuple(NAMES), {}, {}, 0, "0.1.0"),
        plan=si.Plan(dict.fromkeys(NAMES, 3), dict.fromkeys(NAMES, 6)),
        config=si.LoraConfig(r=3, lora_alpha=6),
        factors=factors,
        layers=layers,
        sites=(),
        provenance={},
        timings={},
    )
    artefact.save(tmp_path / "start")
    return artefact


@pytest.fixture
def trained(start, tmp_path, seed):
    """What a trainer left of it."""
    folder = tmp_path / "trained"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((tmp_path / "start" / name).read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed + 1)
    for tensor in tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def product(folder, name):
    """``s·B A`` of one layer in float64, by the folder's own words."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["alpha_pattern"]
    assert len(a) == config["r"]
    return b @ a * config["lora_alpha"] / len(a)


def test_it_writes_plain_lora_and_says_so(run_cli, start, trained, tmp_path):
    result = run_cli("convert", trained, "--start", tmp_path / "start", "--out", tmp_path / "plain")
    assert result.code == 0
    assert "relative error of the update: none" in result.out
    assert result.err == ""
    for name in NAMES:
        exact = product(trained, name) - product(tmp_path / "start", name)
        assert torch.allclose(product(tmp_path / "plain", name), exact, atol=1e-12)
    assert start.verify(tmp_path / "start") == []


def test_the_rank_and_its_error_in_json(run_cli, start, trained, tmp_path):
    result = run_cli(
        "convert", trained, "--start", tmp_path / "start", "--out", tmp_path / "plain", "--rank", 2, "--json"
    )
    assert result.code == 0
    document = result.document
    assert {row["type"]: (row["rank_min"], row["rank_max"]) for row in document["layers"]} == {
        "self_attn.q_proj": (2, 2),
        "self_attn.v_proj": (2, 2),
    }
    exact = torch.cat([(product(trained, n) - product(tmp_path / "start", n)).flatten() for n in NAMES])
    ours = torch.cat([product(tmp_path / "plain", n).flatten() for n in NAMES])
    assert document["error"] == pytest.approx(float((exact - ours).norm() / exact.norm()), rel=1e-4)
    assert document["error"] > 0.1, "the test says something"


def test_a_trainer_that_saved_over_the_start(run_cli, trained, tmp_path):
    """The start is kept in a sub-folder, so the folder alone is enough."""
    original = {name: product(tmp_path / "start", name) for name in NAMES}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "start" / name).write_bytes((trained / name).read_bytes())
    assert run_cli("convert", tmp_path / "start", "--out", tmp_path / "plain").code == 0
    for name in NAMES:
        exact = product(trained, name) - original[name]
        assert torch.allclose(product(tmp_path / "plain", name), exact, atol=1e-12)


@pytest.mark.parametrize("as_json", [False, True])
def test_exit_codes_and_one_sentence(run_cli, start, trained, tmp_path, as_json):
    other = replace(
        start,
        plan=si.Plan({NAMES[0]: 3}, {NAMES[0]: 6}),
        factors={NAMES[0]: start.factors[NAMES[0]]},
        layers={NAMES[0]: start.layers[NAMES[0]]},
    )
    other.save(tmp_path / "other")
    flags = ["--json"] if as_json else []
    out = tmp_path / "plain"
    for arguments, code, words in [
        ((trained, "--start", tmp_path / "other", "--out", out), 6, "was not trained from"),
        ((trained, "--start", tmp_path / "nowhere", "--out", out), 2, "there is no folder"),
        ((trained, "--out", out), 2, "keeps no start of its own"),
        ((trained, "--start", tmp_path / "start"), 2, "--out"),
        ((trained, "--start", tmp_path / "start", "--out", out, "--rank", 0), 2, "rank"),
        ((trained, "--start", tmp_path / "start", "--out", tmp_path / "other"), 2, "exists already"),
    ]:
        result = run_cli("convert", *arguments, *flags)
        assert result.code == code, arguments
        assert words in result.err + result.out
        assert "Traceback" not in result.err
    path = tmp_path / "start" / "start" / "adapter_config.json"
    path.write_text(path.read_text() + " ")
    result = run_cli("convert", trained, "--start", tmp_path / "start", "--out", out, *flags)
    assert result.code == 4
    assert not out.exists()


def test_force_replaces_an_adapter_and_nothing_else(run_cli, trained, tmp_path):
    arguments = ("convert", trained, "--start", tmp_path / "start", "--out")
    assert run_cli(*arguments, tmp_path / "plain").code == 0
    assert run_cli(*arguments, tmp_path / "plain").code == 2
    assert run_cli(*arguments, tmp_path / "plain", "--force").code == 0
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("")
    assert run_cli(*arguments, tmp_path / "diary", "--force").code == 2
    assert [path.name for path in (tmp_path / "diary").iterdir()] == ["monday.txt"]


def test_a_megatron_folder_and_the_heads_of_its_model(run_cli, adapter_of_megatron, tmp_path):
    failed = run_cli("convert", adapter_of_megatron, "--out", tmp_path / "plain")
    assert failed.code == 2
    for option in ("--heads", "--groups", "--head-size"):
        assert option in failed.err
    heads = ("--heads", 4, "--groups", 2, "--head-size", 4, "--gated", "--expert-count", 2)
    done = run_cli("convert", adapter_of_megatron, *heads, "--out", tmp_path / "plain")
    assert done.code == 0, done.err
    assert "plain LoRA for the unmodified base model" in done.out
    assert len(load_file(tmp_path / "plain" / "adapter_model.safetensors")) == 6


@pytest.fixture
def adapter_of_megatron(tmp_path):
    """A folder that keeps the start of a split layer of q, k and v."""
    layer = nn.ModuleDict({"linear_qkv": nn.Linear(12, 32, bias=False)})
    model = nn.ModuleDict(
        {"decoder": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attention": layer})])})}
    )
    LoRA(["linear_qkv"], dim=3, lora_A_init_method="pissa")(model)
    save_adapter(model, tmp_path / "trained")
    return tmp_path / "trained"
