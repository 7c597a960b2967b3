"""The base model's own biases, trained with an adapter."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smartinit.adapters import LoraModel
from smartinit.adapters.base_bias import trained_biases
from smartinit.config import LoraConfig
from smartinit.errors import ConfigError
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
    trained,
)

if TYPE_CHECKING:
    from pathlib import Path

Q = {"target_modules": ["query", "dense"], "r": 2}
# PEFT takes the biases of `lora_bias` for matrices of a wrong shape.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape")
# PEFT also saves the biases of a module that is trained whole as it was, and once more under another name.
DEBRIS = (".original_module.", ".modules_to_save.")

CASES: dict[str, dict[str, Any]] = {
    "all": {"bias": "all"},
    "lora_only": {"bias": "lora_only"},
    "all, with a head": {"bias": "all", "modules_to_save": ["classifier"]},
    "lora_only, with a head": {"bias": "lora_only", "modules_to_save": ["classifier"]},
    "all, with biases of LoRA": {"bias": "all", "lora_bias": True},
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options."""
    pytest.importorskip("peft")
    return Q | CASES[request.param]


def test_names_outputs_and_gradients_are_pefts(case: dict[str, Any]) -> None:
    ours, theirs = both(bert, **case)
    assert dtypes(ours) == dtypes(theirs)
    assert same_step(ours, theirs)
    saved = {key: t for key, t in pefts_others(theirs, ours).items() if not any(piece in key for piece in DEBRIS)}
    assert close(others_in_file(ours), saved, 0)


def test_folders_load_in_each_other(case: dict[str, Any], tmp_path: Path) -> None:
    import peft

    ours, theirs = both(bert, **case)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = LoraModel.from_pretrained(bert(), tmp_path / "theirs")
    assert close({"": output(loaded)}, {"": output(theirs)})
    assert close({"": output(peft.PeftModel.from_pretrained(bert(), tmp_path / "ours"))}, {"": output(ours)})
    with loaded.disable_adapter():
        assert torch.equal(output(loaded), output(bert()))


def test_a_bias_with_two_names_is_one() -> None:
    make = lambda: bert("BertForMaskedLM")  # noqa: E731
    ours, theirs = both(make, **Q, bias="all")
    predictions = ours.model.cls.predictions
    assert predictions.bias is predictions.decoder.bias
    assert same_step(ours, theirs)
    assert close(others_in_file(ours), pefts_others(theirs, ours), 0)
    ours.unload()
    assert predictions.bias is predictions.decoder.bias


@pytest.fixture(params=["all", "lora_only"])
def model(request: pytest.FixtureRequest) -> LoraModel:
    """A model with trained biases, not as they were."""
    made = LoraModel(bert(), LoraConfig(**Q, bias=request.param))
    scatter(made)
    return made


def test_without_the_adapter_the_model_has_its_own_biases(model: LoraModel) -> None:
    base, adapted, weights = output(bert()), output(model), trained(model)
    assert not torch.equal(base, adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns that this is not the base
        with model.disable_adapter():
            assert torch.equal(output(model), base)
    assert torch.equal(output(model), adapted)
    model.disable_adapter_layers()
    model.set_adapter("default")
    assert torch.equal(output(model), base)
    model.enable_adapter_layers()
    assert torch.equal(output(model), adapted)
    assert {name: id(p) for name, p in trained(model).items()} == {name: id(p) for name, p in weights.items()}


def test_a_pass_without_the_adapter_does_not_disturb_the_gradients_of_one_with_it(model: LoraModel) -> None:
    """As when a policy is compared with its reference."""

    def gradients(*, reference: bool) -> list[torch.Tensor]:
        model.zero_grad()
        loss = output(model).square().sum()
        if reference:
            with model.disable_adapter(), torch.no_grad():
                output(model)
        loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    assert all(map(torch.equal, gradients(reference=False), gradients(reference=True)))


def test_other_adapters_run_with_the_models_own_biases(model: LoraModel) -> None:
    adapted = output(model)
    model.add_adapter("two", LoraConfig(r=2, target_modules=["key"]))  # other layers
    model.set_adapter("two")
    assert torch.equal(output(model), output(bert()))
    assert not [name for name in trained(model) if "lora" not in name]
    held = trained_biases(model.model, model.config_of("default"), "default")
    assert held
    assert not [p for p in held.values() if p.requires_grad]
    assert torch.equal(output(model, adapter_names=["default"] * 3), adapted)
    assert torch.equal(output(model, adapter_names=["two"] * 3), output(bert()))
    with pytest.raises(ConfigError, match="all rows of a batch share: give it batches of its own"):
        output(model, adapter_names=["default", "two", "two"])
    assert torch.equal(output(model), output(bert()))
    model.set_adapter("default")
    assert torch.equal(output(model), adapted)
    with pytest.warns(UserWarning, match="'default', which was active, is deleted; 'two' is now"):
        model.delete_adapter("default")
    assert torch.equal(output(model), output(bert()))
    model.add_adapter("three", LoraConfig(**Q, bias="all"))  # the place is free again
    with pytest.raises(ConfigError, match="adapter 'three' trains the model's biases already"):
        model.add_adapter("four", LoraConfig(**Q, bias="lora_only"))
    assert list(model.peft_config) == ["two", "three"]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_unload_gives_the_very_model_back(bias: Any) -> None:
    base = bert()
    base.classifier.requires_grad_(False)
    before = picture(base)
    model = LoraModel(base, LoraConfig(**Q, bias=bias))
    assert picture(base) != before
    scatter(model)
    model.merge_adapter()
    assert model.unload() is base
    assert picture(base) == before


@pytest.mark.parametrize("lora_bias", [False, True])
def test_merging_keeps_the_biases(model: LoraModel, lora_bias: bool) -> None:
    model = LoraModel(bert(), LoraConfig(**Q, bias=model.config_of("default").bias, lora_bias=lora_bias))
    model.add_adapter("two", LoraConfig(**Q))
    scatter(model)
    base, adapted = output(bert()), output(model)
    model.set_adapter("two")
    model.merge_adapter(["default"])
    assert close({"": output(model)}, {"": adapted}, 1e-5)
    with model.disable_adapter():
        assert torch.equal(output(model), base)
    model.set_adapter("default")
    assert torch.equal(output(model), adapted)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(output(model), adapted)
    merged = model.merge_and_unload()
    assert close({"": output(merged)}, {"": adapted}, 1e-5)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_merging_another_adapter_for_good_leaves_the_models_own_biases(model: LoraModel) -> None:
    model.add_adapter("two", LoraConfig(**Q))
    assert torch.equal(output(model.merge_and_unload(adapter_names=["two"])), output(bert()))


def test_deep_copies_are_whole(model: LoraModel) -> None:
    adapted, base = output(model), output(bert())
    twin = copy.deepcopy(model)
    scatter(model)
    assert torch.equal(output(twin), adapted)
    twin.disable_adapter_layers()
    assert torch.equal(output(twin), base)
    twin.enable_adapter_layers()
    assert not torch.equal(output(model), adapted)


def test_biases_that_are_out_come_along_when_the_model_is_cast(model: LoraModel) -> None:
    with model.disable_adapter():
        model.double()
    assert output(model).dtype == torch.float64
    assert torch.equal(output(model.unload()), output(bert().double()))


@pytest.mark.parametrize(
    ("bias", "message"), [("all", "the model has no biases"), ("lora_only", "the layers with it have no biases")]
)
def test_a_model_without_biases_trains_none(bias: Any, message: str, tmp_path: Path) -> None:
    """As PEFT does, whose folders load."""
    pytest.importorskip("peft")
    with pytest.warns(UserWarning, match=message):
        model = LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj"], bias=bias))
    assert all("lora_" in name for name in trained(model))
    ours, theirs = both(llama, target_modules=["q_proj"], bias=bias)
    assert same_step(ours, theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=message):
        loaded = LoraModel.from_pretrained(llama(), tmp_path)
    assert close({"": output(loaded)}, {"": output(theirs)})
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    with loaded.disable_adapter():
        assert torch.equal(output(loaded), output(llama()))
    assert picture(loaded.unload())


def beside(model: LoraModel, *, layers: list[str], lora_bias: bool = False) -> tuple[torch.Tensor, ...]:
    """The model with another adapter `o`, and its outputs with `default`, with `o` and with both."""
    model.add_adapter("o", LoraConfig(r=2, target_modules=layers, lora_bias=lora_bias))
    outputs = []
    for names in ("o", ["default", "o"], "default"):
        model.set_adapter(names)
        if names == "o":
            scatter(model)
        outputs.append(output(model))
    alone, both_active, first = outputs
    assert not close({"": first}, {"": alone}, 1e-2)
    return first, alone, both_active


@pytest.mark.parametrize("lora_bias", [False, True])
def test_an_active_adapter_whose_layers_others_are_merged_into_takes_no_part(model: LoraModel, lora_bias: bool) -> None:
    first, alone, _ = beside(model, layers=["query", "dense"], lora_bias=lora_bias)
    before = picture(model)
    model.merge_adapter(["o"])
    assert close({"": output(model)}, {"": alone}, 1e-5)
    for name in ("o", "default"):  # a switch in between
        model.set_adapter(name)
        assert close({"": output(model)}, {"": alone}, 1e-5)
    twin = copy.deepcopy(model)
    model.unmerge_adapter()
    assert torch.equal(output(model), first)
    assert picture(model) == before
    assert close({"": output(twin.merge_and_unload(adapter_names=["o"]))}, {"": alone}, 1e-5)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_an_active_adapter_in_other_layers_keeps_its_biases(model: LoraModel, lora_bias: bool) -> None:
    first, alone, together = beside(model, layers=["key"], lora_bias=lora_bias)
    before = picture(model)
    model.merge_adapter(["o"])
    assert close({"": output(model)}, {"": together}, 1e-5)
    if lora_bias and model.config_of("default").bias == "all":
        # The biases of `o` are in those of `default`, which cannot leave now.
        merged = picture(model)
        for change in (
            lambda: model.set_adapter("o"),
            lambda: model.delete_adapter("default"),
            lambda: model.merge_and_unload(adapter_names=["o"]),
        ):
            with pytest.raises(ConfigError, match=r"biases of adapter 'default' .* 'o' .* unmerge_adapter\(\) first"):
                change()
        assert picture(model) == merged
        assert model.active_adapters == ["default"]
    else:
        model.set_adapter("o")
        assert close({"": output(model)}, {"": alone}, 1e-5)
        model.set_adapter("default")
        assert close({"": output(model)}, {"": together}, 1e-5)
    model.unmerge_adapter()
    assert picture(model) == before
    assert torch.equal(output(model), first)
    model.set_adapter("o")
    assert torch.equal(output(model), alone)


def test_biases_do_not_come_into_the_place_of_merged_ones() -> None:
    model = LoraModel(bert(), LoraConfig(**Q, bias="all"))
    scatter(model)
    first, alone, _ = beside(model, layers=["query"], lora_bias=True)
    model.set_adapter("o")
    before = picture(model)
    model.merge_adapter()
    merged = picture(model)
    for change in (lambda: model.set_adapter("default"), lambda: model.merge_adapter(["default"])):
        with pytest.raises(ConfigError, match=r"unmerge_adapter\(\) first"):
            change()
        assert picture(model) == merged
    assert close({"": output(model)}, {"": alone}, 1e-5)
    model.unmerge_adapter()
    assert picture(model) == before
    model.disable_adapter_layers()
    model.merge_adapter(["o", "default"])
    disabled = picture(model)
    with pytest.raises(ConfigError, match=r"unmerge_adapter\(\) first"):
        model.enable_adapter_layers()
    assert picture(model) == disabled
    assert all(part.disable_adapters for part in model.parts().values())
    model.unmerge_adapter()
    model.enable_adapter_layers()
    assert picture(model) == before
    model.merge_adapter(["o", "default"])
    assert all(part.merged_adapters for part in model.lora_layers().values())
    model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.equal(output(model), first)
