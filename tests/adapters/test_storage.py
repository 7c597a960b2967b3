"""Folders: PEFT reads what is written, what PEFT writes is read, and what does not fit is named."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from smartinit.adapters import LoraModel
from smartinit.config import LoraConfig
from smartinit.errors import ArtefactError, MissingFileError, ModelError, OutputError
from smartinit.formats.peft import CONFIG_FILE, TENSOR_FILE
from tests.adapters.beside_peft import bare, bert, both, gpt2, llama, output, scatter

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


class Layers(nn.Module):
    """One layer of every kind, in a row."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.emb = nn.Embedding(40, 8)
            self.sound = nn.Conv1d(8, 6, 3, padding=1)
            self.image = nn.Conv2d(1, 4, (3, 2), padding=1)
            self.volume = nn.Conv3d(1, 3, (1, 2, 2))
            self.lin = nn.Linear(3, 5)
            self.norm = nn.LayerNorm(5)

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.image(self.sound(self.emb(input_ids).transpose(1, 2)).unsqueeze(1))
        x = self.volume(x.unsqueeze(1)).mean((2, 3, 4))
        return type("Output", (), {"logits": self.norm(self.lin(x))})()


def mixture() -> nn.Module:
    """A mixture of three experts with one block of width 16 and random weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MixtralConfig(**shape, num_attention_heads=2, num_key_value_heads=2, num_local_experts=3)
        return MixtralForCausalLM(config).eval()


def biased() -> nn.Module:
    """With biases that are not zero."""
    model = llama(attention_bias=True, mlp_bias=True)
    scatter(model)
    return model


def double() -> nn.Module:
    """In float64."""
    return llama(dtype=torch.float64)


def half() -> nn.Module:
    """In bfloat16."""
    return llama(dtype=torch.bfloat16)


QV = ["q_proj", "v_proj"]
EVERY = ["emb", "sound", "image", "volume", "lin"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "patterns": (llama, {"target_modules": QV, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 2}}),
    "rslora": (llama, {"target_modules": QV, "rank_pattern": {"v_proj": 3}, "use_rslora": True, "lora_dropout": 0.1}),
    "kinds": (Layers, {"target_modules": EVERY}),
    "kinds, dora": (Layers, {"target_modules": EVERY, "use_dora": True}),
    "dora": (llama, {"target_modules": QV, "use_dora": True}),
    "lora_bias": (biased, {"target_modules": ["q_proj"], "lora_bias": True}),
    "lora_only": (biased, {"target_modules": ["q_proj"], "bias": "lora_only", "lora_bias": True}),
    "all biases": (Layers, {"target_modules": ["lin"], "bias": "all"}),
    "whole modules": (biased, {"target_modules": ["q_proj"], "modules_to_save": ["o_proj", "lm_head"], "bias": "all"}),
    "task head": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
    "tied tokens": (gpt2, {"target_modules": ["c_attn"], "trainable_token_indices": [1], "fan_in_fan_out": True}),
    "experts": (
        mixture,
        {"target_modules": QV, "target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 3}},
    ),
    "experts only": (mixture, {"target_modules": [], "target_parameters": EXPERTS[:1]}),
    "replicated": (llama, {"target_modules": QV, "layer_replication": [(0, 1), (0, 1)]}),
    "an embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "float64": (double, {"target_modules": QV}),
    "bfloat16": (half, {"target_modules": QV}),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Those of an adapter folder."""
    return load_file(folder / TENSOR_FILE)


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Change tensors of an adapter folder by the ends of their keys, or add some; None removes one."""
    held = tensors(folder)
    for ending, value in changes.items():
        key = next((key for key in held if key.endswith(ending)), ending)
        if value is None:
            del held[key]
        else:
            held[key] = value
    save_file(held, folder / TENSOR_FILE)


def in_peft(model: nn.Module, folder: Path, **options: Any) -> Any:
    """With plain PEFT; its warnings are its own."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, str(folder), **options)


def picture(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that loading might change."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    return modules + [(name, id(p), p.requires_grad, p.double().sum().item()) for name, p in model.named_parameters()]


@pytest.mark.parametrize("case", CASES)
def test_folders_go_both_ways_bit_for_bit(case: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    make, options = CASES[case]
    ours, theirs = both(make, **options)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    held, expected = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    # What PEFT saves of the base, and twice: its biases inside of modules that are trained whole.
    spare = {key for key in expected if "original_module" in key or "modules_to_save" in key or ".base_layer.w" in key}
    assert held.keys() == expected.keys() - spare
    for key, tensor in held.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key

    ours.eval(), theirs.eval()
    wanted = output(ours)
    precision = 2e-2 if case == "bfloat16" else 1e-6
    assert torch.allclose(output(in_peft(make(), tmp_path / "ours")).double(), wanted.double(), 0, precision)
    assert torch.allclose(output(theirs).double(), wanted.double(), 0, precision)
    for folder, low in itertools.product(("ours", "theirs"), (False, True)):
        loaded = LoraModel.from_pretrained(make(), tmp_path / folder, is_trainable=True, low_cpu_mem_usage=low)
        assert torch.equal(output(loaded.eval()), wanted), (folder, low)
        assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
        kept = {bare(name): (p.requires_grad, p.dtype, p.device) for name, p in ours.named_parameters()}
        assert {bare(name): (p.requires_grad, p.dtype, p.device) for name, p in loaded.named_parameters()} == kept


def test_the_configuration_makes_peft_build_the_same_layers(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "exclude_modules": ["k_proj"],
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"up_proj": 5},
        "lora_dropout": 0.2,
        "use_rslora": True,
        "bias": "lora_only",
        "lora_bias": True,
        "task_type": "CAUSAL_LM",
        "modules_to_save": ["norm"],
        "trainable_token_indices": [2],
        "revision": "main",
    }
    make = biased
    model = LoraModel(make(), LoraConfig(**options))
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / CONFIG_FILE).read_text())
    kept = ("lora_dropout", "use_rslora", "bias", "lora_bias", "task_type", "modules_to_save", "revision")
    assert {name: said[name] for name in (*kept, "trainable_token_indices")} == {
        name: options[name] for name in (*kept, "trainable_token_indices")
    }
    theirs = in_peft(make(), tmp_path)
    layers = {name: module for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert layers.keys() == model.lora_layers().keys()
    for name, layer in model.lora_layers().items():
        assert layers[name].r == layer.r
        assert layers[name].scaling == layer.scaling
        assert layers[name].lora_dropout["default"].p == layer.lora_dropout["default"].p


def test_several_adapters_have_sub_folders(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.add_adapter("dora", LoraConfig(r=3, target_modules=QV, use_dora=True))
    model.set_adapter("dora")
    scatter(model)
    wanted = {"dora": output(model)}
    model.set_adapter("default")
    scatter(model)
    wanted["default"] = output(model)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, TENSOR_FILE, "dora"]

    loaded = LoraModel.from_pretrained(llama(), tmp_path)
    assert list(loaded.peft_config) == ["default"]
    theirs = in_peft(llama(), tmp_path)
    loaded.load_adapter(tmp_path / "dora", "dora", low_cpu_mem_usage=True)
    theirs.load_adapter(str(tmp_path / "dora"), "dora")
    for name in ("default", "dora"):
        loaded.set_adapter(name)
        theirs.set_adapter(name)
        assert torch.equal(output(loaded), wanted[name])
        assert torch.allclose(output(theirs), wanted[name], 0, 1e-6)
    model.save_pretrained(tmp_path / "one", selected_adapters=["dora"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["dora"]


@pytest.mark.parametrize("folder", ["ours", "theirs"])
def test_half_precision_files_are_read_in_full_on_half_precision_bases(folder: str, tmp_path: Path) -> None:
    """PEFT's low_cpu_mem_usage rounds a float32 adapter to the base's bfloat16 and keeps it in float32."""
    pytest.importorskip("peft")
    ours, theirs = both(half, target_modules=QV)
    (ours if folder == "ours" else theirs).save_pretrained(tmp_path)
    written = tensors(tmp_path)
    loaded = LoraModel.from_pretrained(half(), tmp_path, low_cpu_mem_usage=True)
    for name, layer in loaded.lora_layers().items():
        for matrix, part in zip(layer.matrices("default"), "AB", strict=True):
            assert matrix.dtype == torch.float32
            assert torch.equal(matrix, written[f"base_model.model.{name}.lora_{part}.weight"])


def test_nothing_of_the_base_is_written(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LoraModel(base, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    model.save_pretrained(tmp_path)
    assert all(".lora_" in key for key in tensors(tmp_path))
    before = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert before < 20_000


def test_embeddings_that_peft_saves_along_must_be_the_models(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _, theirs = both(llama, target_modules=["embed_tokens"])
    theirs.save_pretrained(tmp_path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    weight = tensors(tmp_path)[key]
    assert torch.equal(output(LoraModel.from_pretrained(llama(), tmp_path)), output(theirs))
    for changed, message in (
        (
            torch.cat([weight, weight[:2]]),
            r"'model.embed_tokens.base_layer.weight' in shape \(42, 16\).*\(40, 16\): its vo",
        ),
        (weight + 1, "'model.embed_tokens.base_layer.weight' with other values"),
    ):
        rewrite(tmp_path, {key: changed})
        base = llama()
        before = picture(base)
        with pytest.raises(ArtefactError, match=message):
            LoraModel.from_pretrained(base, tmp_path)
        assert picture(base) == before


FULL = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all", "trainable_token_indices": [3]}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("onto", ["plain", "adapted"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head.weight": None}, r"lacks 'base_model\.model\.lm_head\.weight', for which"),
        ({"k_proj.bias": None}, r"lacks 'base_model\.model\.model\.layers\.0\.self_attn\.k_proj\.bias'"),
        ({"token_adapter.trainable_tokens_delta": None}, r"lacks '.*token_adapter\.trainable_tokens_delta'"),
        ({"x": torch.zeros(3)}, r"holds 'x' of shape \(3,\), for which this model has no place"),
        ({f"{Q}.lora_B.bias": torch.zeros(16)}, r"holds '.*q_proj\.lora_B\.bias' of shape \(16,\)"),
        ({f"{Q}.lora_magnitude_vector": torch.zeros(16)}, r"holds '.*q_proj\.lora_magnitude_vector', for which"),
        ({"q_proj.lora_A.weight": None}, "only one of the two matrices"),
        (
            {"lm_head.weight": torch.zeros(40, 8)},
            r"\(40, 8\) for layer 'lm_head' \(weight\), where this model takes \(40, 16",
        ),
        ({"q_proj.lora_A.weight": torch.zeros(2, 8)}, r"\(2, 8\) for layer '.*q_proj' \(lora_A\).* takes \(2, 16\)"),
        ({"trainable_tokens_delta": torch.zeros(2, 16)}, r"shape \(2, 16\) for layer .*takes \(1, 16\)"),
        ({"k_proj.bias": torch.zeros(3)}, r"shape \(3,\) for layer '.*k_proj' \(bias\).*takes \(16,\)"),
    ],
)
def test_what_does_not_fit_is_named(
    onto: str, changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    model = LoraModel(biased(), LoraConfig(r=2, **FULL))
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, changes)
    base: Any = biased() if onto == "plain" else LoraModel(biased(), LoraConfig(r=2, target_modules=["v_proj"]))
    before, wanted = picture(base), output(base)
    with pytest.raises(ArtefactError, match=message):
        LoraModel.from_pretrained(base, tmp_path) if onto == "plain" else base.load_adapter(tmp_path, "two")
    assert picture(base) == before
    assert torch.equal(output(base), wanted)


@pytest.mark.parametrize("first", ["two", "default"])
def test_biases_are_those_of_one_adapter_whatever_others_are_there(first: str, tmp_path: Path) -> None:
    """A layer's bias has another name where a layer is around it; the name in the file must not depend on others."""
    pytest.importorskip("peft")
    options = {
        "default": LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
        "two": LoraConfig(r=2, target_modules=["v_proj"]),
    }
    model = LoraModel(biased(), options[first], first)
    second = next(name for name in options if name != first)
    model.add_adapter(second, options[second])
    model.set_adapter("default")
    scatter(model)
    wanted = output(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(LoraModel.from_pretrained(biased(), tmp_path)), wanted)
    assert torch.allclose(output(in_peft(biased(), tmp_path)), wanted, 0, 1e-6)

    import peft

    theirs = in_peft(biased(), tmp_path)  # PEFT's keys do depend on the others
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_adapter("two", peft.LoraConfig(r=2, target_modules=["v_proj"]))
        theirs.save_pretrained(tmp_path / "theirs", selected_adapters=["default"])
    assert any(key.endswith("v_proj.base_layer.bias") for key in tensors(tmp_path / "theirs"))
    assert torch.equal(output(LoraModel.from_pretrained(biased(), tmp_path / "theirs")), wanted)


def test_an_adapter_of_another_model_is_named_by_its_first_layer(tmp_path: Path) -> None:
    LoraModel(llama(), LoraConfig(r=2, target_modules=QV)).save_pretrained(tmp_path)
    base = llama(head_dim=16)
    before = picture(base)
    with pytest.raises(
        ArtefactError, match=r"shape \(16, 2\) for layer 'model.layers.0.self_attn.q_proj.*takes \(32, 2\)"
    ):
        LoraModel.from_pretrained(base, tmp_path)
    assert picture(base) == before
    with pytest.raises(
        ArtefactError, match=r"2 layers that this model does not have, .*'model\.layers\.0\.self_attn\.q_p"
    ):
        LoraModel.from_pretrained(Layers(), tmp_path)


def test_magnitudes_and_biases_that_a_start_does_not_have_are_the_models(tmp_path: Path) -> None:
    model = LoraModel(biased(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, bias="lora_only"))
    for layer in model.lora_layers().values():
        nn.init.normal_(layer.matrices("default")[1])
    layer.lora_magnitude_vector["default"].reset(layer, "default")  # as a start that shifts would have it
    wanted = output(model)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, {"lora_magnitude_vector": None, "q_proj.base_layer.bias": None})
    for low in (False, True):
        assert torch.equal(output(LoraModel.from_pretrained(biased(), tmp_path, low_cpu_mem_usage=low)), wanted)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _, theirs = both(llama, target_modules=QV)
    theirs.save_pretrained(tmp_path)
    torch.save(tensors(tmp_path), tmp_path / "adapter_model.bin")
    (tmp_path / TENSOR_FILE).unlink()
    base = llama()
    before = picture(base)
    with pytest.raises(ArtefactError, match=r"adapter_model\.bin' is a pickle.*save_pretrained"):
        LoraModel.from_pretrained(base, tmp_path)
    assert picture(base) == before
    with pytest.raises(MissingFileError, match="there is no folder"):
        LoraModel.from_pretrained(base, tmp_path / "nowhere")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = LoraModel(llama(), LoraConfig(r=2, target_modules=QV), low_cpu_mem_usage=True)
    with pytest.raises(ModelError, match=r"no values in layer '.*q_proj': it lies on the meta device"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = LoraModel(llama(), LoraConfig(r=2, target_modules=QV))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make folder"):
        model.save_pretrained(tmp_path / "file" / "x")


def test_a_folder_that_is_read_can_be_written_over(tmp_path: Path) -> None:
    """Nothing that was loaded may still be a window into the file."""
    model = LoraModel(biased(), LoraConfig(r=2, **FULL))
    scatter(model)
    model.save_pretrained(tmp_path)
    wanted = output(model)
    for low in (False, True):
        loaded = LoraModel.from_pretrained(biased(), tmp_path, low_cpu_mem_usage=low)
        content = (tmp_path / TENSOR_FILE).read_bytes()
        with (tmp_path / TENSOR_FILE).open("r+b") as file:  # in place, as no careful program does
            file.seek(len(content) // 2)
            file.write(b"\xff" * (len(content) // 2))
        assert torch.equal(output(loaded), wanted)
        (tmp_path / TENSOR_FILE).unlink()
        (tmp_path / TENSOR_FILE).write_bytes(content)


def test_a_start_beside_whole_modules_and_dora_comes_back(tmp_path: Path) -> None:
    """A base that is a residual: the start is kept in its own folder, without what only the adapter has."""
    from smartinit.adapters.attach import write_factors
    from smartinit.factors import Factors
    from smartinit.planning.plan import Plan

    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "lora_only", "use_dora": True}
    model = LoraModel(biased(), LoraConfig(r=2, lora_alpha=2, **options))
    wanted = output(model)
    name = next(iter(model.lora_layers()))
    pair = Factors(torch.randn(2, 16) / 8, torch.randn(16, 2) / 8, effect="splits")
    write_factors(model, {name: pair}, Plan({name: 2}, {name: 2}))
    base = {key: tensor.clone() for key, tensor in model.lora_layers()[name].get_base_layer().state_dict().items()}
    assert torch.allclose(output(model), wanted, 0, 1e-5)
    scatter(model)
    model.save_pretrained(tmp_path / "a")
    residual = biased()
    residual.get_submodule(name).load_state_dict(base)
    loaded = LoraModel.from_pretrained(residual, tmp_path / "a", low_cpu_mem_usage=True)
    assert torch.equal(output(loaded), output(model))
    loaded.save_pretrained(tmp_path / "b")
    for part in ("", "start/"):
        one, other = tensors(tmp_path / "a" / part), tensors(tmp_path / "b" / part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert len(tensors(tmp_path / "a" / "start")) == 2
    # On the unmodified base, as plain LoRA of twice the rank: the direction of DoRA is the same sum.
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    loaded.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "c"))
    assert torch.allclose(output(LoraModel.from_pretrained(biased(), tmp_path / "plain")), output(model), 0, 1e-5)


MEASURE = """
import sys, threading
import torch
from torch import nn
from smartinit.adapters import LoraModel, storage

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        for number in range(4):
            setattr(self, f"q{number}", nn.Linear(1 << 20, 1, bias=False))

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

peaks, done = [], threading.Event()
def watch():
    while not done.wait(0.0005):
        peaks.append(anonymous())
model, before = Wide(), anonymous()
threading.Thread(target=watch, daemon=True).start()
loaded = LoraModel.from_pretrained(model, sys.argv[1], low_cpu_mem_usage=sys.argv[2] == "low")
done.set()
print(max([*peaks, anonymous()]) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("low", ["low", "plain"])
def test_an_adapter_is_in_memory_once_while_it_is_loaded(low: str, tmp_path: Path) -> None:
    size, held = 0, {}
    for number in range(4):
        a, b = torch.randn(8, 1 << 20), torch.zeros(1, 8)
        held |= {f"base_model.model.q{number}.lora_A.weight": a, f"base_model.model.q{number}.lora_B.weight": b}
        size += 4 * (a.numel() + b.numel())
    save_file(held, tmp_path / TENSOR_FILE)
    config = LoraConfig(target_modules=["q0", "q1", "q2", "q3"]).to_dict() | {"peft_type": "LORA"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), low], capture_output=True, text=True, check=True
    )
    assert size <= int(run.stdout) < 1.3 * size
