"""PEFT's two EVA functions, on its models and on ours; only what PEFT gets wrong differs."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import smartinit as si
from smartinit.errors import ArgumentError, ArtefactError, ConfigError, ModelError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

peft = pytest.importorskip("peft")

pytestmark = [
    # PEFT asks every transformers model for a property that transformers has renamed,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # and advises to keep adapters on the meta device until they are written (which is tested with the adapters).
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False"),
]

HOSTS = ("native", "peft")
PREFIX = "base_model.model."


def names(layers: int = 2) -> list[str]:
    """Target names in model order."""
    return [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(layers) for kind in "qkv"]


def wrapped(host: str, base: nn.Module, **options: Any) -> nn.Module:
    """A Llama that waits for EVA's weights."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"], **options}
    if host == "native":
        return si.LoraModel(
            base, si.LoraConfig(**{"init_lora_weights": "eva", "eva_config": si.EvaConfig(), **options})
        )
    options.setdefault("init_lora_weights", "eva")
    options["eva_config"] = peft.EvaConfig(**options.get("eva_config", {}))
    return peft.get_peft_model(base, peft.LoraConfig(**options))


def state_dict(ranks: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Orthonormal rows of width 32, layers of one input being views of one tensor, as PEFT returns them."""
    generator = torch.Generator().manual_seed(seed)
    bases = [torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q.T for _ in range(len(ranks) // 3)]
    return {name: bases[i // 3][:rank] for i, (name, rank) in enumerate(ranks.items())}


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Target name -> LoRA layer."""
    return {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")}


RANKS = dict(zip(names(), [4, 2, 0, 7, 8, 3], strict=True))


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    """Four batches with padding."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(4):
        ids = torch.randint(3, 64, (4, 24), generator=generator)
        mask = (torch.arange(24) < torch.tensor([[24], [20], [16], [24]])).long()
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("adjust", [False, True])
def test_it_loads_what_peft_loads(use_rslora: bool, adjust: bool, seed: int, tiny_llama: Callable) -> None:
    options = {"use_rslora": use_rslora, "eva_config": {"adjust_scaling_factors": adjust}}
    theirs, *ours = wrapped("peft", tiny_llama(), **options), *(wrapped(h, tiny_llama(), **options) for h in HOSTS)
    values = state_dict(RANKS, seed)
    peft.initialize_lora_eva_weights(theirs, eva_state_dict={f"{PREFIX}{k}": v for k, v in values.items()})
    expected = layers_of(theirs)
    for model in ours:
        si.initialize_lora_eva_weights(model, eva_state_dict=values)
        assert layers_of(model).keys() == expected.keys()
        for name, layer in layers_of(model).items():
            other = expected[name]
            assert layer.r["default"] == other.r["default"] == RANKS[name]
            assert torch.equal(layer.lora_A["default"].weight, other.lora_A["default"].weight)
            assert layer.lora_B["default"].weight.count_nonzero() == 0
            if not use_rslora:
                assert layer.scaling["default"] == other.scaling["default"]
            elif adjust:  # PEFT's alpha·new/r gives rank-stabilised LoRA another scaling
                assert layer.scaling["default"] == pytest.approx(8 / 4**0.5)


def test_defect_02_layers_of_one_input_share_no_memory(
    seed: int, tiny_llama: Callable, tmp_path: Path, batches: list[Any]
) -> None:
    computed = si.get_eva_state_dict(wrapped("peft", tiny_llama()), batches, show_progress_bar=False)
    save_file(computed, tmp_path / "eva.safetensors")
    assert load_file(tmp_path / "eva.safetensors").keys() == computed.keys()
    assert len({value.untyped_storage().data_ptr() for value in computed.values() if len(value)}) == len(
        [value for value in computed.values() if len(value)]
    )
    model = si.initialize_lora_eva_weights(wrapped("peft", tiny_llama()), eva_state_dict=state_dict(RANKS, seed))
    weights = [layer.lora_A["default"].weight for layer in layers_of(model).values()]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == len(weights)


@pytest.mark.parametrize("host", HOSTS)
def test_defect_03_the_dictionary_is_kept_and_the_model_returned(host: str, seed: int, tiny_llama: Callable) -> None:
    values = state_dict(RANKS, seed)
    before = {name: value.clone() for name, value in values.items()}
    model = wrapped(host, tiny_llama())
    assert si.initialize_lora_eva_weights(model, eva_state_dict=values) is model
    assert list(values) == list(before)
    assert all(torch.equal(values[name], before[name]) for name in before)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.lora_A["default"].weight.add_(1)
    assert all(torch.equal(values[name], before[name]) for name in before)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("source", ["plain", *HOSTS])
def test_defect_05_state_dicts_of_base_and_wrapped_models_load_into_each_other(
    host: str, source: str, tiny_llama: Callable, batches: list[Any]
) -> None:
    config = si.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights="eva")
    origin = tiny_llama() if source == "plain" else wrapped(source, tiny_llama())
    computed = si.get_eva_state_dict(origin, batches, config if source == "plain" else None, show_progress_bar=False)
    assert [name.startswith(PREFIX) for name in computed] == [source == "peft"] * 6
    assert [name.removeprefix(PREFIX) for name in computed] == names()
    model = wrapped(host, tiny_llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no layer starts by default
        si.initialize_lora_eva_weights(model, eva_state_dict=computed)
    for name, layer in layers_of(model).items():
        value = computed.get(name, computed.get(f"{PREFIX}{name}"))
        assert torch.equal(layer.lora_A["default"].weight, value)


def test_defect_06_anchored_patterns_give_their_ranks(seed: int, tiny_llama: Callable) -> None:
    """PEFT's EVA compares ``^model...`` with ``base_model.model.model...``, and scales alphas from another r."""
    options = {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}, "lora_alpha": 8}
    values = state_dict(RANKS, seed)
    for host in HOSTS:
        model = si.initialize_lora_eva_weights(wrapped(host, tiny_llama(), **options), eva_state_dict=values)
        scaling = {name: layer.scaling["default"] for name, layer in layers_of(model).items()}
        assert scaling == {name: 4.0 if name == names()[0] else 2.0 for name, rank in RANKS.items() if rank}


def test_defect_07_one_dtype_after_redistribution(seed: int, tiny_llama: Callable) -> None:
    for host in HOSTS:
        model = wrapped(host, tiny_llama(dtype=torch.bfloat16))
        si.initialize_lora_eva_weights(model, eva_state_dict=state_dict(RANKS, seed))
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("layers", [3, 8])
def test_defect_08_rank_zero_layers_stay_away_on_reload(
    host: str, layers: int, seed: int, tiny_llama: Callable, tmp_path: Path
) -> None:
    """From 20 targets on PEFT shortens the list to endings, which match the layers without adapter too."""
    ranks = {name: (i * 5 + 3) % 8 for i, name in enumerate(names(layers))}
    kept = {name: rank for name, rank in ranks.items() if rank}
    assert len(kept) < len(ranks)
    assert (len(kept) >= 20) is (layers == 8)
    model = wrapped(host, tiny_llama(num_hidden_layers=layers))
    si.initialize_lora_eva_weights(model, eva_state_dict=state_dict(ranks, seed))
    model.save_pretrained(tmp_path)
    for again in (
        peft.PeftModel.from_pretrained(tiny_llama(num_hidden_layers=layers), tmp_path, is_trainable=True),
        si.LoraModel.from_pretrained(tiny_llama(num_hidden_layers=layers), tmp_path, is_trainable=True),
    ):
        assert {name: layer.r["default"] for name, layer in layers_of(again).items()} == kept
        for name, layer in layers_of(again).items():
            assert layer.scaling["default"] == 2.0
            assert torch.equal(layer.lora_A["default"].weight, layers_of(model)[name].lora_A["default"].weight)


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_defect_09_adapters_can_be_merged_after_redistribution(
    combination: str, seed: int, tiny_llama: Callable
) -> None:
    model = wrapped("peft", tiny_llama())
    si.initialize_lora_eva_weights(model, eva_state_dict=state_dict(RANKS, seed))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "merged", combination_type=combination)
    assert "merged" in model.peft_config


@pytest.mark.parametrize("host", HOSTS)
def test_layers_that_are_not_named_start_by_default(host: str, seed: int, tiny_llama: Callable) -> None:
    model = wrapped(host, tiny_llama())
    values = {name: value for name, value in state_dict(RANKS, seed).items() if "layers.1" in name}
    with pytest.warns(UserWarning, match="3 layers .*start by default") as caught:
        si.initialize_lora_eva_weights(model, eva_state_dict=values)
    assert len(caught) == 1
    assert caught[0].filename == __file__


# --- computing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_computing_and_loading_in_one_call(host: str, tiny_llama: Callable, batches: list[Any]) -> None:
    base = tiny_llama()
    with torch.no_grad():
        before = base(**batches[0]).logits
    model = si.initialize_lora_eva_weights(wrapped(host, base), batches, show_progress_bar=False)
    computed = si.get_eva_state_dict(wrapped(host, tiny_llama()), batches, show_progress_bar=False)
    assert sum(len(value) for value in computed.values()) == 6 * 4
    for name, layer in layers_of(model).items():
        weight = layer.lora_A["default"].weight
        assert torch.equal(weight, computed.get(name, computed.get(f"{PREFIX}{name}")))
        torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), rtol=0, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, before)


def test_a_plain_model_needs_a_config_whose_start_does_not_matter(tiny_llama: Callable, batches: list[Any]) -> None:
    with pytest.raises(ConfigError, match="peft_config is required"):
        si.get_eva_state_dict(tiny_llama(), batches)
    for config in (si.LoraConfig(r=2, target_modules=["q_proj"]), peft.LoraConfig(r=2, target_modules=["q_proj"])):
        computed = si.get_eva_state_dict(tiny_llama(), batches, config, show_progress_bar=False)
        assert list(computed) == [name for name in names() if "q_proj" in name]


def test_without_targets_every_linear_layer_is_meant(tiny_llama: Callable, batches: list[Any]) -> None:
    model = tiny_llama()
    computed = si.get_eva_state_dict(model, batches, si.LoraConfig(r=2), show_progress_bar=False)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert set(linear) <= set(computed)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({"init_lora_weights": True, "eva_config": None}, {}, ConfigError, "needs .* init_lora_weights='eva'"),
        ({}, {}, ConfigError, "pass a dataloader .* or an eva_state_dict"),
        ({}, {"adapter_name": "other", "eva_state_dict": {}}, UnknownNameError, "no adapter 'other'; it has: default"),
        ({}, {"eva_state_dict": {}}, UnknownNameError, "none of the 0 names"),
        ({}, {"eva_state_dict": {"transformer.h.0": torch.zeros(1, 32)}}, UnknownNameError, "for another model"),
        ({}, {"eva_state_dict": {names()[0]: torch.zeros(32)}}, ArgumentError, r"of shape \(32,\); expected"),
        ({}, {"eva_state_dict": {names()[0]: [[0.0]]}}, ArgumentError, "q_proj'] is a list"),
        ({}, {"eva_state_dict": {names()[0]: torch.zeros(2, 48)}}, ArtefactError, r"\(2, 48\), but \(2, 32\)"),
    ],
)
def test_errors_leave_the_model_alone(
    host: str,
    options: dict[str, Any],
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    tiny_llama: Callable,
) -> None:
    if options and host == "peft":
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    else:
        model = wrapped(host, tiny_llama(), **options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        si.initialize_lora_eva_weights(model, **arguments)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()


def test_a_model_without_adapter_and_one_with_too_many(tiny_llama: Callable) -> None:
    with pytest.raises(ModelError, match="wrap it first"):
        si.initialize_lora_eva_weights(tiny_llama(), [])
    model = wrapped("native", tiny_llama())
    model.add_adapter("other", si.LoraConfig(target_modules=["q_proj"]))
    model.set_adapter(["default", "other"])
    with pytest.raises(ModelError, match="single active adapter, but 2 are: default, other"):
        si.initialize_lora_eva_weights(model, [])
    assert issubclass(ModelError, ValueError), "as in PEFT"
