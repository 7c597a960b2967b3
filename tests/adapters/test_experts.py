"""Adapters on bare parameters, the fused weights of experts above all, against PEFT's and against float64."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from smartinit import LoraConfig, LoraModel
from smartinit.adapters.checkpoints import restore_adapters
from smartinit.adapters.experts import ParameterLora, parameter_names
from smartinit.errors import ConfigError, ModelError, TargetError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def mixtral(**options: object) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
    return _seeded(MixtralForCausalLM, MixtralConfig(**(SHAPE | sizes | options)))


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
    return _seeded(Qwen3MoeForCausalLM, Qwen3MoeConfig(**SHAPE, **sizes, decoder_sparse_step=1))


def gpt_oss() -> nn.Module:
    """Its experts store (in, out), and have biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
    return _seeded(GptOssForCausalLM, GptOssConfig(**SHAPE, **sizes))


def _seeded(kind: Callable[[Any], nn.Module], config: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():  # the routers of some start at zero
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) / 4)
    return model


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


class Stack(nn.Module):
    """Three experts of 4 -> 5, all asked, whose answers are added up."""

    def __init__(self, *, experts: int = 3, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.randn(experts, *((4, 5) if transposed else (5, 4))))
        self.scale = nn.Parameter(torch.randn(5))
        self.fails = False

    def forward(self, x: torch.Tensor, *, times: int = 1) -> torch.Tensor:
        if self.fails:
            raise RuntimeError("no")
        weight = self.weight if self.is_transposed else self.weight.mT
        return (x @ weight).sum(dim=0) * self.scale * times


class Holder(nn.Module):
    """A model around one stack."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.randn(3, 3))
        self.experts = Stack(**options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, times=2)


def config_of(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_parameters": ["experts.weight"]} | options)


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.detach().abs().max()))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name.removeprefix("base_model."): p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mixtral", {}),
        ("mixtral", {"target_parameters": ["layers.1.mlp.experts.down_proj"], "use_rslora": True}),
        ("mixtral", {"target_parameters": ["mlp.gate.weight", *EXPERTS], "target_modules": ["q_proj"]}),
        ("mixtral", {"rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {r".*layers\.0\..*down_proj": 3}}),
        ("qwen3_moe", {"target_modules": []}),
        ("gpt_oss", {"target_modules": ["v_proj"]}),
    ],
)
def test_outputs_gradients_and_keys_are_pefts(
    kind: str, options: dict[str, Any], tokens: torch.Tensor, randomise: Callable[[nn.Module], None]
) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 3, "lora_alpha": 5, "target_parameters": EXPERTS} | options
    ours = LoraModel(MODELS[kind](), LoraConfig(**options))
    if "rank_pattern" in options:  # PEFT warns that they match no module
        with pytest.warns(RuntimeWarning, match="pattern"):
            theirs = peft.get_peft_model(MODELS[kind](), peft.LoraConfig(**options))
    else:
        theirs = peft.get_peft_model(MODELS[kind](), peft.LoraConfig(**options))
    randomise(theirs)
    expected = {name.removeprefix("base_model."): tensor for name, tensor in theirs.state_dict().items()}
    assert ours.state_dict().keys() == expected.keys()
    ours.load_state_dict(expected)

    base = MODELS[kind]()(tokens).logits
    outputs = [model(tokens, labels=tokens) for model in (ours, theirs)]
    assert_close(outputs[0].logits, outputs[1].logits)
    assert not torch.allclose(outputs[0].logits, base, atol=1e-3)
    for output in outputs:
        output.loss.backward()
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys()
    assert found
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=2e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_starts_are_pefts(start: bool | str) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 3, "target_parameters": EXPERTS, "init_lora_weights": start}
    torch.manual_seed(5)
    theirs = peft.get_peft_model(mixtral(), peft.LoraConfig(**options)).state_dict()
    torch.manual_seed(5)
    ours = LoraModel(mixtral(), LoraConfig(**options)).state_dict()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[f"base_model.{name}"]), name


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_training_is_pefts_and_leaves_the_base_alone(
    kind: str, tokens: torch.Tensor, randomise: Callable[[nn.Module], None]
) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 2, "target_parameters": EXPERTS}
    before = states(MODELS[kind]())
    ours = LoraModel(MODELS[kind](), LoraConfig(**options))
    theirs = peft.get_peft_model(MODELS[kind](), peft.LoraConfig(**options))
    randomise(ours)
    randomise(theirs)
    losses: dict[nn.Module, list[float]] = {ours: [], theirs: []}
    for model, found in losses.items():
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(20):
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            found.append(loss.item())
    assert losses[ours] == pytest.approx(losses[theirs], rel=1e-4)
    assert losses[ours][-1] < losses[ours][0] - 0.1
    assert_same(ours.unload(), before)


@pytest.mark.parametrize("kind", MODELS)
def test_folders_load_in_each_other(
    kind: str, tokens: torch.Tensor, tmp_path: Path, randomise: Callable[[nn.Module], None]
) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
    patterns = {"rank_pattern": {"mlp.experts.down_proj": 2}, "alpha_pattern": {"layers.0.mlp.experts.down_proj": 7}}
    ours = LoraModel(MODELS[kind](), LoraConfig(**options, **patterns))
    randomise(ours)
    ours.save_pretrained(tmp_path / "ours")
    with pytest.warns(RuntimeWarning, match="_pattern keys did not match any targeted module"):
        loaded = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / "ours")
    assert_close(loaded(tokens).logits, ours(tokens).logits)

    theirs = peft.get_peft_model(MODELS[kind](), peft.LoraConfig(**options))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    back = LoraModel.from_pretrained(MODELS[kind](), tmp_path / "theirs")
    assert_close(back(tokens).logits, theirs(tokens).logits)
    back.save_pretrained(tmp_path / "again")
    files = [(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again")]
    from safetensors.torch import load_file

    one, two = (load_file(file) for file in files)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_several_adapters_are_pefts(tokens: torch.Tensor, randomise: Callable[[nn.Module], None]) -> None:
    peft = pytest.importorskip("peft")
    first, second = ({"r": rank, "target_parameters": EXPERTS} for rank in (3, 2))
    ours = LoraModel(mixtral(), LoraConfig(**first))
    ours.add_adapter("other", LoraConfig(**second))
    theirs = peft.get_peft_model(mixtral(), peft.LoraConfig(**first))
    theirs.add_adapter("other", peft.LoraConfig(**second))
    for model in (ours, theirs):
        randomise(model)
    for names in (["other"], ["default", "other"]):
        ours.set_adapter(names)
        theirs.base_model.set_adapter(names)
        assert_close(ours(tokens).logits, theirs(tokens).logits)
    both = ours(tokens).logits
    ours.delete_adapter("other")
    theirs.delete_adapter("other")
    assert ours.state_dict().keys() == {name.removeprefix("base_model.") for name in theirs.state_dict()}
    assert not torch.allclose(ours(tokens).logits, both, atol=1e-3)
    with ours.disable_adapter():
        assert torch.equal(ours(tokens).logits, mixtral()(tokens).logits)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("experts", [1, 3])
def test_every_expert_has_its_own_directions(experts: int, transposed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = LoraModel(Holder(experts=experts, transposed=transposed), config_of(init_lora_weights=False))
    layer = model.lora_layers()["experts"]
    a, b = (matrix.detach().double() for matrix in layer.matrices("default"))
    assert a.shape == (2 * experts, 4)
    assert b.shape == (5, 2 * experts)
    x = torch.randn(6, 4)
    stack = layer.get_base_layer()
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for expert in range(experts):
        weight = stack.weight[expert].double()
        rows, columns = [2 * expert, 2 * expert + 1], [expert, experts + expert]
        weight = (weight.T if transposed else weight) + 3.0 * b[:, columns] @ a[rows]
        expected += x.double() @ weight.T
    torch.testing.assert_close(model(x).double(), expected * stack.scale.double() * 2, rtol=1e-5, atol=1e-5)
    delta = layer.get_delta_weight("default")
    assert delta.shape == stack.weight.shape
    stack.weight.data += delta
    with model.disable_adapter():
        torch.testing.assert_close(model(x).double(), expected * stack.scale.double() * 2, rtol=1e-5, atol=1e-5)


def test_half_precision_is_pefts(tokens: torch.Tensor, randomise: Callable[[nn.Module], None]) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 2, "target_parameters": EXPERTS}
    ours = LoraModel(mixtral().to(torch.bfloat16), LoraConfig(**options))
    theirs = peft.get_peft_model(mixtral().to(torch.bfloat16), peft.LoraConfig(**options))
    for model in (ours, theirs):
        randomise(model)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_autocast_is_pefts(tokens: torch.Tensor, randomise: Callable[[nn.Module], None]) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 2, "target_parameters": EXPERTS}
    ours = LoraModel(mixtral(), LoraConfig(**options))
    theirs = peft.get_peft_model(mixtral(), peft.LoraConfig(**options))
    for model in (ours, theirs):
        randomise(model)
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens, labels=tokens).loss.backward()
    wanted = gradients(theirs)
    for name, gradient in gradients(ours).items():
        assert_close(gradient, wanted[name])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # transformers 5 renamed it
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    reentrant: bool, tokens: torch.Tensor, randomise: Callable[[nn.Module], None]
) -> None:
    found = []
    for checkpointing in (False, True):
        model = LoraModel(mixtral(), LoraConfig(r=2, target_parameters=EXPERTS)).train()
        randomise(model)
        before = states(model)
        if checkpointing:
            model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.model.enable_input_require_grads()
        model(tokens, labels=tokens).loss.backward()
        assert_same(model, before)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient)


def test_an_error_in_the_module_leaves_the_parameter(randomise: Callable[[nn.Module], None]) -> None:
    model = LoraModel(Holder(), config_of())
    randomise(model)
    stack = model.lora_layers()["experts"].get_base_layer()
    weight, before = stack.weight, states(model)
    stack.fails = True
    with pytest.raises(RuntimeError, match="no"):
        model(torch.randn(2, 4))
    assert stack.weight is weight
    assert list(stack._parameters) == ["weight", "scale"]
    assert_same(model, before)


def test_an_offloaded_parameter_is_refused() -> None:
    model = LoraModel(Holder(), config_of())
    model.model.experts.get_base_layer().to("meta")
    with pytest.raises(ModelError, match="'weight' of a Stack is offloaded"):
        model(torch.randn(2, 4))


def test_copies_and_compiled_models_compute_the_same(seed: int, randomise: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(seed)
    model = LoraModel(Holder(), config_of())
    randomise(model)
    x = torch.randn(3, 4)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    stack = model.lora_layers()["experts"].get_base_layer()
    assert isinstance(stack.weight, nn.Parameter)


class Allocations(TorchDispatchMode):
    """Remembers every tensor of one size that an operation makes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.made: dict[int, torch.Tensor] = {}  # kept, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() == self.size:
            self.made[result.untyped_storage().data_ptr()] = result
        return result


def test_the_sum_is_the_only_tensor_of_the_parameters_size(randomise: Callable[[nn.Module], None]) -> None:
    model = LoraModel(Holder(), config_of())
    model.add_adapter("other", config_of())
    model.set_adapter(["default", "other"])
    randomise(model)
    layer = model.lora_layers()["experts"]
    assert isinstance(layer, ParameterLora)
    storage = layer.weight.untyped_storage()
    with Allocations(storage.nbytes()) as allocations:
        layer.adapted_weight(["default", "other"])
    assert len(allocations.made.keys() - {storage.data_ptr()}) == 1


def test_rows_with_adapters_of_their_own(tokens: torch.Tensor, randomise: Callable[[nn.Module], None]) -> None:
    model = LoraModel(mixtral(), LoraConfig(r=2, target_parameters=EXPERTS))
    model.add_adapter("other", LoraConfig(r=2, target_parameters=EXPERTS))
    model.add_adapter("layers", LoraConfig(r=2, target_modules=["q_proj"]))
    model.eval()
    randomise(model)
    model.set_adapter("other")
    expected = model(tokens).logits
    model.set_adapter("default")
    assert torch.equal(model(tokens, adapter_names=["other", "other"]).logits, expected)
    with pytest.raises(ConfigError, match=r"different adapters.*default, other.*one batch per adapter"):
        model(tokens, adapter_names=["default", "other"])
    with pytest.raises(ConfigError, match="different adapters"):
        model(tokens, adapter_names=["default", "__base__"])
    rows = model(tokens, adapter_names=["layers", "__base__"]).logits  # neither has anything here
    assert_close(rows[1], mixtral()(tokens).logits[1])


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"target_parameters": ["mlp.experts.gate_up"]},
            TargetError,
            "matched none of.*closest: 'mlp.experts.gate_up_",
        ),
        ({"lora_dropout": 0.1}, ConfigError, "lora_dropout=0.1"),
        ({"use_dora": True}, ConfigError, "use_dora"),
        ({"lora_bias": True}, ConfigError, "lora_bias"),
        ({"fan_in_fan_out": True}, ConfigError, "fan_in_fan_out"),
        ({"target_parameters": ["input_layernorm.weight"]}, TargetError, r"shape \(16,\).*matrices"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, TargetError, "already has an adapter"),
        ({"target_parameters": EXPERTS, "target_modules": ["no_proj"]}, TargetError, "no_proj"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_stays(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = mixtral()
    before, modules = states(model), dict(model.named_modules())
    with pytest.raises(error, match=said):
        LoraModel(model, LoraConfig(**{"target_parameters": EXPERTS} | options))
    assert_same(model, before)
    assert dict(model.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parameters_without_a_place_for_a_part_are_refused() -> None:
    with pytest.raises(TargetError, match="'top' belongs to the model itself"):
        LoraModel(Holder(), config_of(target_parameters=["top"]))
    model = Holder()
    model.experts.weight = nn.Parameter(torch.ones(3, 5, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"torch\.int8"):
        LoraModel(model, config_of())
    model = Holder()
    model.experts.inner = nn.Linear(2, 2)
    with pytest.raises(TargetError, match="layers in it, such as 'inner'"):
        LoraModel(model, config_of())


def test_an_entry_that_matches_nothing_beside_others_is_named() -> None:
    with pytest.warns(UserWarning, match="'experts.wieght' matched no parameter; closest: 'experts.weight'"):
        LoraModel(Holder(), config_of(target_parameters=["experts.weight", "experts.wieght"]))


def test_all_adapters_have_the_same_parameters() -> None:
    model = LoraModel(mixtral(), LoraConfig(r=2, target_parameters=EXPERTS))
    before = states(model)
    with pytest.raises(ConfigError, match=r"'model\.layers\.0\.mlp\.experts\.down_proj' is only in the others"):
        model.add_adapter("other", LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"]))
    with pytest.raises(ConfigError, match=r"gate.weight' is only in the new one"):
        model.add_adapter("other", LoraConfig(r=2, target_parameters=[*EXPERTS, "gate.weight"]))
    assert list(model.peft_config) == ["default"]
    assert_same(model, before)


def test_a_parameter_of_a_layer_and_the_layer_are_not_both_adapted() -> None:
    model = LoraModel(mixtral(), LoraConfig(r=2, target_parameters=["q_proj.weight"]))
    with pytest.raises(TargetError, match="q_proj' has an adapter on its parameter 'weight': use target_parameters"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))


def test_names_of_parameters_and_parts() -> None:
    model = LoraModel(mixtral(num_hidden_layers=1), LoraConfig(r=2, target_parameters=EXPERTS))
    assert parameter_names(model.model) == {
        "model.layers.0.mlp.experts": "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.experts.base_layer": "model.layers.0.mlp.experts.gate_up_proj",
    }
    part = model.lora_layers()["model.layers.0.mlp.experts"]
    assert isinstance(part, ParameterLora)
    assert "parameter_name='down_proj'" in repr(part)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_checkpoints_and_meta_weights(
    low_cpu_mem_usage: bool, tokens: torch.Tensor, tmp_path: Path, randomise: Callable[[nn.Module], None]
) -> None:
    patterns = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {r"layers\.0\.mlp\.experts\.down_proj": 7}}
    model = LoraModel(mixtral(), LoraConfig(r=2, target_parameters=EXPERTS, **patterns))
    randomise(model)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(mixtral(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(tokens).logits, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    restore_adapters(model, tmp_path)
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_merging(kind: str, tokens: torch.Tensor, randomise: Callable[[nn.Module], None]) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 2, "target_parameters": EXPERTS}
    model = LoraModel(MODELS[kind](), LoraConfig(**options))
    theirs = peft.get_peft_model(MODELS[kind](), peft.LoraConfig(**options))
    for one in (model, theirs):
        randomise(one)
    deltas = {name: layer.get_delta_weight("default") for name, layer in model.lora_layers().items()}
    for name, delta in deltas.items():
        assert_close(delta, theirs.base_model.model.get_submodule(name).get_delta_weight("default"))
    before, expected = states(model), model(tokens).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_same(model, before)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, ParameterLora) for module in merged.modules())
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    other = theirs.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)
