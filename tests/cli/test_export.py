"""``smartinit export``: the verb around `smartinit.export.export_adapter`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from smartinit.formats.megatron_folder import ShardedFolder

HEADS, GROUPS, SIZE, WIDTH = 4, 2, 8, 32
ROWS = {"q": 32, "k": 16, "v": 16}


@pytest.fixture
def peft_folder(tmp_path, seed):
    """Write an adapter of q, k and v as PEFT does."""

    def write(*, shared, name="adapter", **changes):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(2):
            a = torch.randn(3, WIDTH, generator=generator)
            for part, rows in ROWS.items():
                key = f"base_model.model.model.layers.{layer}.self_attn.{part}_proj"
                own = a.clone() if shared else torch.randn(3, WIDTH, generator=generator)
                tensors[f"{key}.lora_A.weight"] = own
                tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 3, generator=generator)
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return folder

    return write


def test_there_and_back(run_cli, peft_folder, saved_model, tmp_path):
    adapter = peft_folder(shared=True)
    result = run_cli("export", adapter, "--to", "megatron", "--model", saved_model, "--out", tmp_path / "megatron")
    assert result.code == 0
    assert result.err == ""
    assert "self_attention.linear_qkv" in result.out
    assert "equal" in result.out
    assert "for the unmodified base model" in result.out
    result = run_cli("export", tmp_path / "megatron", "--to", "peft", "--out", tmp_path / "back")
    assert result.code == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_one_document_in_json(run_cli, peft_folder, tmp_path):
    adapter = peft_folder(shared=False)
    shape = ("--heads", HEADS, "--groups", GROUPS, "--head-size", SIZE)
    arguments = ("export", adapter, "--to", "megatron", *shape, "--json")
    document = run_cli(*arguments, "--out", tmp_path / "auto").document
    assert [(row["type"], row["fused"]) for row in document["layers"]] == [
        (f"self_attention.linear_qkv.adapter_{part}", "canonical") for part in "qkv"
    ]
    assert "exported as canonical adapters" in document["notes"][0]
    document = run_cli(*arguments, "--out", tmp_path / "svd", "--fuse", "svd", "--rank", 4).document
    (row,) = document["layers"]
    assert (row["rank_max"], row["fused"]) == (4, "svd")
    assert 0 < row["error_max"] < 1
    assert set(document["errors"]) == {f"decoder.layers.{i}.self_attention.linear_qkv" for i in range(2)}
    assert row["error_max"] == max(document["errors"].values())
    document = run_cli(
        *arguments, "--out", tmp_path / "exact", "--fuse", "exact", "--one-rank", "--tensor-parallel", 2
    ).document
    assert document["layers"][0]["rank_max"] == 10, "nine, and a multiple of two"
    assert ShardedFolder.open(tmp_path / "exact").config["dim"] == 10
    assert sorted(path.name for path in (tmp_path / "exact").iterdir()) == [
        "megatron_adapter.json",
        "shard-00000-of-00002.safetensors",
        "shard-00001-of-00002.safetensors",
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_exit_codes_and_one_sentence(run_cli, peft_folder, saved_model, tmp_path, as_json):
    adapter, flags = peft_folder(shared=True), ["--json"] if as_json else []
    out = tmp_path / "out"
    for arguments, code, words in [
        ((adapter, "--to", "megatron", "--out", out), 2, "which are not known"),
        ((adapter, "--to", "peft", "--out", out), 2, "is in this format already"),
        ((adapter, "--to", "nemo", "--out", out), 2, "nemo"),
        ((adapter, "--to", "megatron"), 2, "--out"),
        ((adapter, "--out", out), 2, "--to"),
        ((tmp_path / "nowhere", "--to", "megatron", "--out", out), 2, "there is no folder"),
        ((adapter, "--to", "megatron", "--heads", 2, "--head-size", 8, "--out", out), 6, "for another model"),
        ((adapter, "--to", "megatron", "--model", tmp_path, "--out", out), 6, "has no config.json"),
        ((adapter, "--to", "megatron", "--model", saved_model, "--rank", 2, "--out", out), 2, "fuse='svd' cuts to"),
        ((adapter, "--to", "megatron", "--model", saved_model, "--out", saved_model), 2, "exists already"),
        ((adapter, "--to", "megatron", "--model", saved_model, "--out", saved_model, "--force"), 2, "is not replaced"),
        ((adapter, "--to", "megatron", "--model", saved_model, "--out", adapter / "in"), 2, "lies in the other"),
    ]:
        result = run_cli("export", *arguments, *flags)
        assert result.code == code, arguments
        assert words in result.err + result.out
        assert "Traceback" not in result.err
        assert not out.exists()


def test_a_trained_start_in_one_folder(run_cli, adapter, model_folder, tmp_path):
    """What compute writes goes to Megatron as it is; the model's name is in the folder."""
    result = run_cli("export", adapter, "--to", "megatron", "--out", tmp_path / "megatron", "--json")
    assert result.code == 0
    assert result.document["base"] == "unmodified"
    kinds = {row["type"]: row["fused"] for row in result.document["layers"]}
    assert kinds["self_attention.linear_qkv"] == "equal", "EVA's directions are of the input, which q, k and v share"
    assert kinds["mlp.linear_fc1"] == "equal"
    assert ShardedFolder.open(tmp_path / "megatron").config["base_model"] == str(model_folder)
    assert run_cli("export", tmp_path / "megatron", "--to", "peft", "--out", tmp_path / "back").code == 0
    assert run_cli("inspect", tmp_path / "back").code == 0
