from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def peft_folder(tmp_path, tiny_llama):
    """Factory of a folder that PEFT itself has written."""
    peft = pytest.importorskip("peft")

    def make(**config):
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**config))
        model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", model

    return make


def test_a_folder_of_peft(run_cli, peft_folder):
    folder, model = peft_folder(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 2},
        alpha_pattern={"v_proj": 2},
    )
    found = run_cli("inspect", folder, "--json").document
    rows = {row["type"]: row for row in found["layers"]}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for kind, row in rows.items():
        modules = [module for name, module in layers.items() if name.endswith(kind)]
        assert sorted({module.scaling["default"] for module in modules}) == row["scaling"]
        assert (min(m.r["default"] for m in modules), max(m.r["default"] for m in modules)) == (
            row["rank_min"],
            row["rank_max"],
        )
    assert found["parameters"] == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert found["record"] is None


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_other_kinds_of_lora(run_cli, peft_folder, config):
    folder, model = peft_folder(r=4, target_modules=["q_proj"], **config)
    found = run_cli("inspect", folder, "--json")
    assert found.code == 0, found.err
    scaling = next(m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A"))
    assert found.document["layers"][0]["scaling"] == [pytest.approx(scaling)]
    extra = len(found.document["other_tensors"])
    assert extra == {"use_rslora": 0, "use_dora": 2, "modules_to_save": 1}[next(iter(config))]


def test_a_trained_adapter_from_the_field(run_cli, assets):
    found = run_cli("inspect", assets / "roberta-base-lora-mnli", "--json").document
    assert (found["base_model"], found["ranks"], len(found["other_tensors"])) == ("roberta-base", 192, 4)


def test_an_adapter_of_smartinit(run_cli, adapter):
    found = run_cli("inspect", adapter, "--json").document
    record = json.loads((adapter / "smartinit.json").read_text())
    assert found["record"]["key"] == record["recipe_digest"]
    assert set(found["record"]["certificates"]) == set(record["targets"])
    assert found["ranks"] == 14 * 4
    assert 0 < found["layers"][0]["captured"] <= 1
    assert found["record"]["gain"]["layers"] == 14
    assert found["layers"][0]["gain"] > 0
    shown = run_cli("inspect", adapter).out
    assert "computed: eva on" in shown
    assert "gain: Adam's first step goes" in shown
    assert "variance" in shown


def test_an_adapter_that_was_trained_since(run_cli, adapter):
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    shown = run_cli("inspect", adapter)
    assert shown.code == 0
    assert "remark:" in shown.out
    assert "sha256 differs" in shown.out


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), 6, "has no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), 6, "cannot be read as JSON"),
        (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "IA3"}'), 6, "of type IA3; expected LORA"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), 6, "expected LORA"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), 6, "pickled and never loaded"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), 6, "no safetensors file"),
    ],
)
def test_folders_that_are_no_adapters(run_cli, adapter, spoil, code, message):
    spoil(adapter)
    shown = run_cli("inspect", adapter, "--json")
    assert shown.code == code
    assert message in shown.document["error"]
    assert shown.err.count("\n") == 1


def test_a_missing_folder_and_one_whose_adapters_are_below(run_cli, adapter, tmp_path):
    assert run_cli("inspect", tmp_path / "missing").code == 2
    shown = run_cli("inspect", tmp_path)
    assert shown.code == 6
    assert "its sub-folders adapter have one" in shown.err


def test_half_a_layer(run_cli, adapter):
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, path)
    assert "only one of the two matrices" in run_cli("inspect", adapter).err
