"""Wrapping a model, and leaving it as it was."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smartinit.adapters import LoraModel
from smartinit.adapters.layer import LoraLayer
from smartinit.config import LoraConfig
from smartinit.errors import ArtefactError, ConfigError, ModelError, SmartinitError, TargetError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

# PEFT asks every transformers model for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Of a causal language model."""
    with torch.no_grad():
        return model(input_ids=tokens).logits


def picture(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that wrapping might change: modules by identity, their mode, parameters and what they train."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    return modules + [(name, id(p), p.requires_grad, p.sum().item()) for name, p in model.named_parameters()]


def test_a_new_adapter_changes_no_output(tiny_llama: Callable, tokens: torch.Tensor) -> None:
    base = tiny_llama()
    before = logits(base, tokens)
    model = LoraModel(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model, tokens), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_outputs_and_gradients_are_pefts(
    kind: str, dtype: torch.dtype, request: pytest.FixtureRequest, tokens: torch.Tensor, randomise: Callable
) -> None:
    peft = pytest.importorskip("peft")
    make = request.getfixturevalue(f"tiny_{kind}")
    options = {
        "r": 4,
        "lora_alpha": 8,  # powers of two as scalings: where the product is scaled then makes no difference at all
        "target_modules": ["q_proj", "v_proj", "up_proj"] if kind == "llama" else ["c_attn", "c_fc"],
        "rank_pattern": {"v_proj": 2, "^transformer.h.1.mlp.c_fc": 2},
        "alpha_pattern": {"up_proj": 16, "c_fc": 16},
        "fan_in_fan_out": kind == "gpt2",
    }
    if kind == "gpt2":
        del options["rank_pattern"]["v_proj"], options["alpha_pattern"]["up_proj"]
    else:
        del options["rank_pattern"]["^transformer.h.1.mlp.c_fc"], options["alpha_pattern"]["c_fc"]
    ours = LoraModel(make(dtype=dtype), LoraConfig(**options))
    theirs = peft.get_peft_model(make(dtype=dtype), peft.LoraConfig(**options))
    gradients = []
    for model in (ours, theirs):
        randomise(model)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        gradients.append(
            {name[name.index("lora_") - 20 :]: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    assert torch.equal(logits(ours, tokens), logits(theirs, tokens))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("training", [False, True])
def test_new_layers_take_the_models_mode(training: bool, tiny_llama: Callable) -> None:
    model = LoraModel(tiny_llama().train(training), LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    assert {module.training for module in model.model.modules()} == {training}


def test_what_is_missing_is_the_wrapped_models(tiny_llama: Callable, tokens: torch.Tensor) -> None:
    base = tiny_llama()
    model = LoraModel(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.config is base.config
    assert model.get_base_model() is base
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape == (2, 11)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing
    assert torch.equal(logits(copy.deepcopy(model), tokens), logits(model, tokens))


def test_disabling_is_undone_whatever_happens(tiny_llama: Callable, tokens: torch.Tensor, randomise: Callable) -> None:
    base = tiny_llama()
    plain = logits(base, tokens)
    model = LoraModel(base, LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(model)
    adapted = logits(model, tokens)
    assert not torch.equal(adapted, plain)
    with pytest.raises(RuntimeError), model.disable_adapter():  # noqa: PT012  (what happens inside is the test)
        assert torch.equal(logits(model, tokens), plain)
        raise RuntimeError
    assert torch.equal(logits(model, tokens), adapted)
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model, tokens), plain), "it was disabled before the block, and still is"
    model.enable_adapter_layers()
    assert torch.equal(logits(model, tokens), adapted)


def test_unload_gives_the_model_back(tiny_llama: Callable) -> None:
    base = tiny_llama()
    base.lm_head.requires_grad_(False)
    before = picture(base)
    model = LoraModel(base, LoraConfig(r=2, target_modules="all-linear"))
    assert picture(base) != before
    assert model.unload() is base
    assert picture(base) == before


def test_several_adapters(tiny_llama: Callable, tokens: torch.Tensor, randomise: Callable) -> None:
    model = LoraModel(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    assert model.active_adapters == ["one"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".two." in name)
    layers = model.lora_layers()
    assert len(layers) == 4
    assert [set(layer.lora_A) for layer in layers.values()] == [{"one", "two"}, {"two"}] * 2
    randomise(model)
    one = logits(model, tokens)
    model.set_adapter("two")
    assert not torch.equal(logits(model, tokens), one)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"two"}
    model.set_adapter("one")
    assert torch.equal(logits(model, tokens), one)
    with pytest.raises(ConfigError, match="already has an adapter 'two'"):
        model.add_adapter("two", LoraConfig())
    with pytest.raises(UnknownNameError, match="no adapter 'three'; it has: one, two"):
        model.set_adapter("three")
    assert model.active_adapters == ["one"]


def test_a_failing_second_adapter_leaves_the_first(tiny_llama: Callable, tokens: torch.Tensor) -> None:
    model = LoraModel(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    before = picture(model)
    with pytest.raises(TargetError):
        model.add_adapter("two", LoraConfig(target_modules=["no_such_layer"]))
    assert picture(model) == before
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["nothing"]}, TargetError, "nothing"),
        ({"target_modules": ["norm"]}, SmartinitError, "'model.norm' is a LlamaRMSNorm"),
        ({"target_modules": ["embed_tokens"], "lora_bias": True}, ConfigError, "cannot be used with an embedding"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [999]}, ConfigError, "row 999"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]}, TargetError, "closest: 'lm_head'"),
    ],
)
def test_after_an_error_the_model_is_as_it_was(
    options: dict[str, Any], error: type[Exception], message: str, tiny_llama: Callable
) -> None:
    base = tiny_llama()
    before = picture(base)
    with pytest.raises(error, match=message):
        LoraModel(base, LoraConfig(**options))
    assert picture(base) == before


def test_an_error_in_the_middle_of_wrapping(tiny_llama: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama()
    before = picture(base)
    calls = []

    def out_of_memory(self: LoraLayer, *_: object, **__: object) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError

    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", out_of_memory)
    with pytest.raises(MemoryError):
        LoraModel(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert len(calls) == 3
    assert picture(base) == before


def test_a_wrapped_model_is_not_wrapped_again(tiny_llama: Callable) -> None:
    model = LoraModel(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="already carries adapters"):
        LoraModel(model, LoraConfig(target_modules=["q_proj"]))


def test_the_callers_config_is_only_read(tiny_llama: Callable) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = LoraModel(tiny_llama(), config)
    model.peft_config["default"].r = 77
    assert config.r == 2
    peft = pytest.importorskip("peft")
    LoraModel(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def test_weights_on_the_meta_device_wait_to_be_filled(tiny_llama: Callable) -> None:
    model = LoraModel(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), low_cpu_mem_usage=True)
    assert all(matrix.is_meta for layer in model.lora_layers().values() for matrix in layer.matrices("default"))


# --- files ---------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_bit_for_bit(
    tiny_llama: Callable, tokens: torch.Tensor, randomise: Callable, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, use_rslora=True)
    model = LoraModel(tiny_llama(), config)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
    randomise(model)
    model.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert not any(p.requires_grad for p in again.parameters())
    again.load_adapter(tmp_path / "other", "other", is_trainable=True)
    assert again.active_adapters == ["default"]
    model.set_adapter("other")
    again.set_adapter("other")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert any(p.requires_grad for p in again.parameters())


def test_peft_loads_it_and_it_loads_pefts(
    tiny_llama: Callable, tokens: torch.Tensor, randomise: Callable, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "lora_alpha": 8}
    model = LoraModel(tiny_llama(), LoraConfig(**options))
    randomise(model)
    model.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))

    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = LoraModel.from_pretrained(tiny_llama(), tmp_path / "theirs", is_trainable=True)
    assert torch.equal(logits(again, tokens), logits(theirs, tokens))
    assert any(p.requires_grad for p in again.parameters())


def test_an_adapter_for_another_model_is_refused(tiny_llama: Callable, tiny_gpt2: Callable, tmp_path: Path) -> None:
    LoraModel(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    for base in (tiny_llama(num_hidden_layers=1), tiny_llama(hidden_size=64), tiny_gpt2()):
        before = picture(base)
        with pytest.raises(ArtefactError, match="was it made for another model"):
            LoraModel.from_pretrained(base, tmp_path)
        assert picture(base) == before
    model = LoraModel(tiny_llama(hidden_size=64), LoraConfig(r=2, target_modules=["v_proj"]))
    before = picture(model)
    with pytest.raises(ArtefactError, match=r"shape \(2, 32\) for layer .*layers\.0.*q_proj.* takes \(2, 64\)"):
        model.load_adapter(tmp_path, "two")
    assert picture(model) == before
    assert list(model.peft_config) == ["default"]
