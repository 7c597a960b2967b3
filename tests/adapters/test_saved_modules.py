"""Modules that are trained whole."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from smartinit.adapters import LoraModel
from smartinit.adapters.saved_modules import SavedModule
from smartinit.config import LoraConfig
from smartinit.errors import ArgumentError, ArtefactError, ConfigError, TargetError
from tests.adapters.beside_peft import (
    bert,
    both,
    close,
    dtypes,
    llama,
    others_in_file,
    output,
    pefts_others,
    picture,
    same_step,
    scatter,
    tokens,
    trained,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "half": (lambda: llama(dtype=torch.bfloat16), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "end of a name": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["head"]}),
    "module of modules": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "saved and target": (llama, {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["up_proj"]}),
    "sequence classes": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "token classes": (
        lambda: bert("BertForTokenClassification"),
        {"target_modules": ["query"], "task_type": "TOKEN_CLS", "modules_to_save": ["LayerNorm"]},
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    """A model and options."""
    pytest.importorskip("peft")
    return CASES[request.param]


def test_names_outputs_and_gradients_are_pefts(case: tuple[Callable[[], nn.Module], dict[str, Any]]) -> None:
    make, options = case
    ours, theirs = both(make, **options)
    assert dtypes(ours) == dtypes(theirs)
    assert same_step(ours, theirs)
    assert close(others_in_file(ours), pefts_others(theirs, ours), 0)
    assert ours.config_of("default").modules_to_save == theirs.peft_config["default"].modules_to_save


def test_folders_load_in_each_other(case: tuple[Callable[[], nn.Module], dict[str, Any]], tmp_path: Path) -> None:
    import peft

    make, options = case
    ours, theirs = both(make, **options)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = LoraModel.from_pretrained(make(), tmp_path / "theirs")
    assert close({"": output(loaded)}, {"": output(theirs)})
    assert not [p for p in loaded.parameters() if p.requires_grad]
    if "task_type" in options:  # PEFT adds the heads to the list whenever it loads, and then trains them twice
        assert set(loaded.config_of("default").modules_to_save or ()) >= {"classifier", "score"}
    assert close({"": output(peft.PeftModel.from_pretrained(make(), tmp_path / "ours"))}, {"": output(ours)})
    lean = LoraModel.from_pretrained(make(), tmp_path / "ours", low_cpu_mem_usage=True)
    assert close({"": output(lean)}, {"": output(ours)})


def test_question_answering_trains_its_head() -> None:
    model = LoraModel(bert("BertForQuestionAnswering"), LoraConfig(target_modules=["query"], task_type="QUESTION_ANS"))
    assert model.config_of("default").modules_to_save == ["qa_outputs"]
    assert "qa_outputs.modules_to_save.default.weight" in trained(model)


def saved(**more: Any) -> LoraModel:
    """A Llama whose head is trained whole, from the start."""
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    return LoraModel(llama(), LoraConfig(**(options | more)))


def test_the_wrapper_answers_for_the_module_in_use() -> None:
    model = saved()
    part = model.model.lm_head
    assert isinstance(part, SavedModule)
    assert part.weight is part.modules_to_save["default"].weight
    assert (part.in_features, part.out_features, part.bias) == (16, 40, None)
    assert torch.equal(part.weight, part.base_layer.weight)
    assert part.weight.data_ptr() != part.base_layer.weight.data_ptr()
    with model.disable_adapter():
        assert part.weight is part.base_layer.weight
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = part.no_such_thing


def test_a_module_inside_another_one_is_trained_with_it() -> None:
    model = saved(modules_to_save=["up_proj", "mlp"])
    names = [name for name, part in model.parts().items() if isinstance(part, SavedModule)]
    assert names == ["model.layers.0.mlp"]


def test_without_the_adapter_the_original_runs() -> None:
    model = saved()
    base = output(llama())
    assert torch.equal(output(model), base)
    scatter(model)
    assert not torch.equal(output(model), base)
    with model.disable_adapter():
        assert torch.equal(output(model), base)


def test_each_adapter_has_a_copy_of_its_own() -> None:
    model = saved()
    scatter(model)
    one = output(model)
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"]))
    model.add_adapter("three", LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(output(model), one)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".two" in name or "base_layer" in name)
    model.set_adapter("two")
    assert {name for name in trained(model) if "lora" not in name} == {
        "lm_head.modules_to_save.two.weight",
        "model.norm.modules_to_save.two.weight",
    }
    scatter(model)
    two = output(model)
    model.set_adapter("three")
    assert torch.equal(output(model), output(llama()))
    model.set_adapter(["three", "two"])
    assert torch.equal(output(model), two)
    with pytest.raises(ConfigError, match="adapters 'default', 'two' each have a trained copy of the same Linear"):
        model.set_adapter(["default", "two"])
    assert model.active_adapters == ["three", "two"]
    assert torch.equal(output(model), two)
    model.delete_adapter("two")
    assert not isinstance(model.model.model.norm, SavedModule)
    model.set_adapter("default")
    assert torch.equal(output(model), one)


def test_rows_of_a_batch_with_different_adapters() -> None:
    model = saved(modules_to_save=["lm_head", "embed_tokens"])
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    batch = torch.cat([tokens(), tokens()[:1].flip(1)])
    alone = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        scatter(model)
        alone[name] = output(model, input_ids=batch)
    with model.disable_adapter():
        alone["__base__"] = output(model, input_ids=batch)
    names = ["two", "__base__", "default", "two"]
    rows = output(model, input_ids=batch, adapter_names=names)
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    assert close({"": rows}, {"": expected}, 1e-5)
    with pytest.raises(ArgumentError, match="4 entries for a batch of 3 rows"):
        output(model, adapter_names=names)


def test_rows_of_a_module_that_takes_several_tensors() -> None:
    model = saved(modules_to_save=["self_attn"], target_modules=["up_proj"])
    scatter(model)
    alone = output(model)
    assert torch.equal(output(model, adapter_names=["default"] * 3), alone)
    with pytest.raises(ConfigError, match="LlamaAttention takes or gives more than one tensor"):
        output(model, adapter_names=["default", "__base__", "default"])


@pytest.mark.parametrize("training", [True, False])
def test_unload_gives_the_very_model_back(training: bool) -> None:
    base = llama().train(training)
    base.lm_head.requires_grad_(False)
    before = picture(base)
    model = LoraModel(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "mlp"]))
    assert {module.training for module in base.modules()} == {training}
    scatter(model)
    assert model.unload() is base
    assert picture(base) == before


def test_merging_for_good_puts_the_copy_in_place() -> None:
    model = saved()
    scatter(model)
    expected = output(model)
    copied = model.model.lm_head.modules_to_save["default"]
    merged = model.merge_and_unload()
    assert merged.lm_head is copied
    assert close({"": output(merged)}, {"": expected}, 1e-5)
    assert copied.weight.requires_grad  # as the base's head was


def test_a_merged_adapter_still_has_its_copy() -> None:
    model = saved()
    scatter(model)
    expected, base = output(model), output(llama())
    model.merge_adapter()
    assert close({"": output(model)}, {"": expected}, 1e-5)
    with model.disable_adapter():
        assert torch.equal(output(model), base)


def test_a_copy_has_the_hooks_of_the_original() -> None:
    base = llama()
    calls = []
    base.lm_head.register_forward_hook(lambda *_: calls.append(1))
    output(LoraModel(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])))
    assert calls == [1]


def test_deep_copies_and_state_dicts_are_whole() -> None:
    model = saved()
    scatter(model)
    expected = output(model)
    twin = copy.deepcopy(model)
    fresh = saved()
    fresh.load_state_dict(model.state_dict())
    scatter(model)
    assert torch.equal(output(twin), expected)
    assert torch.equal(output(fresh), expected)
    assert not torch.equal(output(model), expected)


def test_meta_copies_take_no_memory_until_they_are_filled() -> None:
    model = LoraModel(
        bert(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]), low_cpu_mem_usage=True
    )
    part = model.model.classifier
    assert {p.is_meta for p in part.modules_to_save.parameters()} == {True}
    parameter = part.weight
    values = {"weight": torch.full((2, 16), 0.5), "bias": torch.ones(2, dtype=torch.bfloat16)}
    part.load_others("default", values)
    assert part.weight is parameter  # optimisers and ties have the same object
    assert torch.equal(part.weight, values["weight"])
    assert (part.bias.dtype, part.bias.device.type, part.bias.requires_grad) == (torch.float32, "cpu", True)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.ones(2, 16)}, "lacks bias of the Linear that adapter 'default' trains whole"),
        ({"weight": torch.ones(2, 16), "bias": torch.ones(3)}, r"'bias' .* has shape \(3,\) .* takes \(2,\)"),
        ({"weight": torch.ones(2, 16), "bias": torch.ones(2), "scale": torch.ones(1)}, "has no place for scale"),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(tensors: dict[str, torch.Tensor], message: str) -> None:
    model = LoraModel(bert(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    before = output(model)
    with pytest.raises(ArtefactError, match=message):
        model.model.classifier.load_others("default", tensors)
    assert torch.equal(output(model), before)


def quantised() -> nn.Module:
    """A Llama whose head holds integers."""
    model = llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.mul(100).to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (llama, {"modules_to_save": ["lm_hed"]}, TargetError, "matched none of .* closest: 'lm_head'"),
        (
            llama,
            {"modules_to_save": ["layers"], "target_modules": ["lm_head"]},
            ConfigError,
            "'model.layers', a ModuleList, which is never called",
        ),
        (quantised, {"modules_to_save": ["lm_head"]}, ConfigError, "'weight' holds int8: a quantised module"),
        (
            llama,
            {"target_modules": ["lm_head"], "modules_to_save": ["head"]},
            ConfigError,
            "cannot have a module trained whole .* at 'lm_head': there is a LoRA layer of adapter 'default'",
        ),
        (
            llama,
            {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [3]},
            ConfigError,
            "cannot have rows trained alone .* there is a module trained whole",
        ),
    ],
)
def test_what_cannot_be_leaves_the_model_as_it_was(
    make: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    base = make()
    before = picture(base)
    with pytest.raises(error, match=message):
        LoraModel(base, LoraConfig(**({"target_modules": ["q_proj"]} | options)))
    assert picture(base) == before


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"modules_to_save": ["mlp"]},
            {"target_modules": ["up_proj"]},
            "at 'model.layers.0.mlp.up_proj': there is a mo",
        ),
        (
            {"target_modules": ["up_proj"]},
            {"modules_to_save": ["mlp"]},
            "at 'model.layers.0.mlp': there is a LoRA layer",
        ),
        ({"modules_to_save": ["mlp"]}, {"modules_to_save": ["up_proj"]}, "adapter 'default' at 'model.layers.0.mlp'"),
        ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, "a LoRA layer of adapter 'default' at"),
        ({"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}, "cannot have a LoRA layer at 'lm_head'"),
    ],
)
def test_adapters_that_are_in_each_others_way(first: dict[str, Any], second: dict[str, Any], message: str) -> None:
    options = {"r": 2, "target_modules": ["q_proj"]}
    model = LoraModel(llama(), LoraConfig(**(options | first)))
    scatter(model)
    before, expected = picture(model), output(model)
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("two", LoraConfig(**(options | second)))
    assert picture(model) == before
    assert torch.equal(output(model), expected)


def test_idle_entries_and_headless_models_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="entry 'lm_heads' matched no module; closest: 'lm_head'"):
        saved(modules_to_save=["lm_head", "lm_heads"])
    with pytest.warns(UserWarning, match="task_type='SEQ_CLS' is for models with a head named 'classifier' or 'score'"):
        LoraModel(llama(), LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"))


def test_a_module_that_stands_twice_is_trained_in_both_places() -> None:
    shared = nn.Linear(4, 4)
    base = nn.Sequential(shared, nn.ReLU(), nn.Linear(4, 4), shared)
    before = picture(base)
    model = LoraModel(base, LoraConfig(r=2, target_modules=["2"], modules_to_save=["0", "3"]))
    assert set(trained(model)) >= {"0.modules_to_save.default.weight", "3.modules_to_save.default.weight"}
    scatter(model)
    model.unload()
    assert picture(base) == before


def test_training_moves_only_the_copy() -> None:
    model = saved()
    original = model.model.lm_head.base_layer.weight.clone()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimiser.step()
    assert torch.equal(model.model.lm_head.base_layer.weight, original)
    assert not torch.equal(model.model.lm_head.weight, original)
