"""Merging: PEFT's numbers, the originals' bits, and nothing half done."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import smartinit as si
from smartinit.adapters import merging
from smartinit.adapters.attach import write_factors
from smartinit.adapters.fake_quant import FakeQuantLinear
from smartinit.adapters.host import factor_parameters
from smartinit.adapters.part import AdapterPart
from smartinit.config import LoraConfig
from smartinit.errors import ArgumentError, ConfigError, ModelError, UnknownNameError
from smartinit.factors import Factors
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EVERY_KIND = ["embed", "linear", "conv1d", "line", "plane", "space", "head"]
WITH_BIAS = ["linear", "conv1d", "line", "plane", "space"]
SHARED = r"ignore:.*share a weight with others:UserWarning"
TIED = r"ignore:an adapter trains a layer whose weight is tied:UserWarning"


class EveryKind(nn.Module):
    """One layer of each kind, ``(batch, 16)`` ids -> ``(batch, 5)``."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(20, 8)
            self.linear = nn.Linear(8, 8)
            self.conv1d = Conv1D(8, 8)
            self.line = nn.Conv1d(8, 8, 3, padding=1)
            self.plane = nn.Conv2d(8, 8, 3, padding=1)
            self.space = nn.Conv3d(8, 8, (3, 1, 3), padding=(1, 0, 1))
            self.head = nn.Linear(128, 5, bias=False)
            nn.init.normal_(self.conv1d.weight, std=0.3)
            nn.init.normal_(self.conv1d.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.conv1d(torch.tanh(self.linear(self.embed(ids)))))
        hidden = torch.tanh(self.line(hidden.mT)).unflatten(-1, (4, 4))
        hidden = torch.tanh(self.plane(hidden)).unflatten(-1, (2, 2))
        return self.head(torch.tanh(self.space(hidden)).flatten(1))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 20, (3, 16), generator=torch.Generator().manual_seed(0))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor, copied, by its name without adapter parts."""
    return {name.replace("base_layer.", ""): tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """The same tensors, bit for bit."""
    now = state(model)
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert now[name].dtype == tensor.dtype
        # As bits, so that a NaN equals itself.
        assert torch.equal(now[name].view(torch.uint8), tensor.view(torch.uint8)), name


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest value."""
    assert (ours.double() - theirs.double()).abs().max() <= tolerance * theirs.double().abs().max()


def fill(model: nn.Module, seed: int = 0) -> None:
    """Values for adapters that depend on the parameter's name only."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: p for name, p in model.named_parameters() if ".lora_" in f".{name}"}
    with torch.no_grad():
        for name in sorted(parameters):
            values = torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64) / 3
            if "magnitude" in name:
                parameters[name].mul_(1 + 0.3 * values.clamp(-1, 1))
            else:
                parameters[name].copy_(values)


def adapted(net: nn.Module, targets: list[str] | str, adapters: dict[str, dict[str, Any]]) -> si.LoraModel:
    """Our adapters on ``net``, all active, with random values."""
    model: si.LoraModel | None = None
    for name, options in adapters.items():
        config = LoraConfig(target_modules=targets, **({"r": 3, "lora_alpha": 5} | options))
        if model is None:
            model = si.LoraModel(net, config, name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    model.set_adapter(list(adapters))
    fill(model)
    return model.eval()


def pefts(net: nn.Module, targets: list[str] | str, adapters: dict[str, dict[str, Any]], like: nn.Module) -> Any:
    """PEFT's adapters with the values of ours."""
    peft = pytest.importorskip("peft")
    model = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*|.*contained in the prefix.*")
        for name, options in adapters.items():
            config = peft.LoraConfig(target_modules=targets, **({"r": 3, "lora_alpha": 5} | options))
            if model is None:
                model = peft.get_peft_model(net, config, name)
            else:
                model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    ours = dict(like.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.base_model.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(ours[name])
    return model.eval()


OPTIONS: dict[str, tuple[list[str], dict[str, dict[str, Any]]]] = {
    "plain": (EVERY_KIND, {"default": {}}),
    "rslora": (
        EVERY_KIND,
        {"default": {"use_rslora": True, "rank_pattern": {"plane": 5}, "alpha_pattern": {"line": 3}}},
    ),
    "dora": (EVERY_KIND, {"default": {"use_dora": True}}),
    "bias": (WITH_BIAS, {"default": {"lora_bias": True}}),
    "two": (EVERY_KIND, {"b": {"r": 2}, "a": {"r": 4, "lora_alpha": 2}}),
    "dora and plain": (EVERY_KIND, {"a": {"use_dora": True}, "b": {"r": 2}}),
    "plain and dora": (EVERY_KIND, {"a": {}, "b": {"r": 2, "use_dora": True}}),
    "two doras": (EVERY_KIND, {"a": {"use_dora": True}, "b": {"r": 2, "use_dora": True}}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_merged_weights_and_outputs_are_pefts(options: str, dtype: torch.dtype, ids: torch.Tensor) -> None:
    targets, adapters = OPTIONS[options]
    ours = adapted(EveryKind().to(dtype), targets, adapters)
    theirs = pefts(EveryKind().to(dtype), targets, adapters, ours)
    before, expected = state(ours.model), ours(ids)
    ours.merge_adapter(list(adapters))
    merged = ours(ids)
    assert_close(merged, expected, 1e-5 if dtype == torch.float32 else 0.05)
    ours.unmerge_adapter()
    assert_same(ours.model, before)
    assert torch.equal(ours(ids), expected)

    plain, other = (
        ours.merge_and_unload(adapter_names=list(adapters)),
        theirs.merge_and_unload(adapter_names=list(adapters)),
    )
    assert torch.equal(plain(ids), merged)
    assert plain.state_dict().keys() == EveryKind().state_dict().keys()
    # PEFT rounds after every adapter, and the update of an embedding before it adds it.
    roundings = 2 if len(adapters) == 1 and "dora" not in options else 3
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8 * roundings
    for name, tensor in other.state_dict().items():
        assert_close(plain.state_dict()[name], tensor, tolerance)


@pytest.mark.parametrize("options", ["plain", "dora", "bias", "two"])
def test_merged_weights_are_the_formula_rounded_once(options: str) -> None:
    targets, adapters = OPTIONS[options]
    model = adapted(EveryKind(), targets, adapters)
    before, expected = dict(EveryKind().named_parameters()), {}
    for path, layer in model.lora_layers().items():
        stored = before[f"{path}.weight"].double()
        is_transposed = path in ("embed", "conv1d")
        weight = stored.T if is_transposed else stored.flatten(1)
        for name in adapters:
            a, b = (matrix.double().flatten(1) for matrix in factor_parameters(layer, name))
            weight = weight + layer.scaling[name] * b @ a
            if options == "dora":
                magnitude = layer.lora_magnitude_vector[name].weight.double().flatten()
                weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
            if options == "bias":
                shift = layer.scaling[name] * layer.lora_B[name].bias.double()
                expected[f"{path}.bias"] = (before[f"{path}.bias"].double() + shift).float()
        expected[f"{path}.weight"] = (weight.T if is_transposed else weight.reshape(stored.shape)).float()
    merged = dict(model.merge_and_unload().named_parameters())
    for name, tensor in before.items():
        assert torch.equal(merged[name], expected.get(name, tensor)), name


@pytest.mark.parametrize("options", ["plain", "bias"])
def test_the_delta_is_pefts(options: str) -> None:
    targets, adapters = OPTIONS[options]
    ours = adapted(EveryKind(), targets, adapters)
    theirs = pefts(EveryKind(), targets, adapters, ours).base_model.model
    for path, layer in ours.lora_layers().items():
        delta, other = (of.get_delta_weight("default") for of in (layer, theirs.get_submodule(path)))
        assert (delta.shape, delta.dtype) == (layer.weight.shape, torch.float32)
        assert_close(delta, other, 1e-6)
        assert not delta.requires_grad


def test_large_weights_are_changed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a block, the same bits; with DoRA the norms of columns are sums over blocks."""
    merged = []
    for block in (1 << 22, 24):
        monkeypatch.setattr("smartinit.adapters.weight_change._BLOCK", block)
        targets, adapters = OPTIONS["dora and plain"]
        merged.append(state(adapted(EveryKind(), targets, adapters).merge_and_unload()))
    for name, tensor in merged[0].items():
        assert_close(merged[1][name], tensor, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_order_of_calls_does_not_matter(dtype: torch.dtype, ids: torch.Tensor) -> None:
    """One call, or one after the other: every merged weight is computed from the original."""
    targets, adapters = OPTIONS["plain and dora"]
    model = adapted(EveryKind().to(dtype), targets, adapters)
    before = state(model.model)
    model.merge_adapter(["a", "b"])
    together = state(model.model)
    model.unmerge_adapter()
    model.merge_adapter(["a"])
    with pytest.warns(UserWarning, match="a is merged into the base weights already, and b is now merged as well"):
        model.merge_adapter(["b"])
    assert_same(model.model, together)
    assert {tuple(part.merged_adapters) for part in model.parts().values()} == {("a", "b")}
    with pytest.warns(UserWarning, match="a, b is merged into the base weights already; nothing is left to do"):
        model.merge_adapter()
    assert_same(model.model, together)
    model.unmerge_adapter()
    model.unmerge_adapter()
    assert_same(model.model, before)
    model.merge_adapter(["a"])
    outputs = model(ids)
    plain = model.merge_and_unload(adapter_names=["b"])
    assert not torch.equal(plain(ids), outputs)
    assert_same(plain, {name: tensor for name, tensor in together.items() if ".lora_" not in name})


def test_only_what_is_named_is_merged(ids: torch.Tensor) -> None:
    targets, adapters = OPTIONS["two"]
    model = adapted(EveryKind(), targets, adapters)
    model.set_adapter("a")
    alone = model(ids)
    model.set_adapter(["a", "b"])
    model.merge_adapter(["a"])
    assert_close(model(ids), alone, 1e-5)
    with pytest.raises(ConfigError, match="a is merged into the base weights: call unmerge_adapter"):
        model(ids, adapter_names=["a", "b", "__base__"])
    with pytest.raises(ConfigError, match="'a' is merged"):
        model.delete_adapter("a")
    model.delete_adapter("b")


def test_disabling_unmerges(ids: torch.Tensor) -> None:
    net = EveryKind()
    plain = net(ids)
    model = adapted(net, *OPTIONS["plain"])
    before, outputs = state(model.model), model(ids)
    model.merge_adapter()
    with model.disable_adapter():
        assert_same(model.model, before)  # at once, also for those who read weights
        assert torch.equal(model(ids), plain)
    assert_same(model.model, before)
    assert torch.equal(model(ids), outputs)


def test_unload_unmerges() -> None:
    net = EveryKind()
    before = state(net)
    model = adapted(net, *OPTIONS["two"])
    model.merge_adapter()
    assert_same(model.unload(), before)


def test_a_layer_unmerges_by_itself(ids: torch.Tensor) -> None:
    model = adapted(EveryKind(), *OPTIONS["bias"])
    before, x = state(model.model), torch.randn(2, 8)
    layer = model.lora_layers()["linear"]
    outputs = layer(x)
    model.merge_adapter()
    assert_close(layer(x), outputs, 1e-5)
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer(x), outputs)
    model.unmerge_adapter()
    assert_same(model.model, before)


def test_a_layer_alone() -> None:
    layer = adapted(EveryKind(), *OPTIONS["bias"]).lora_layers()["linear"]
    before, x = state(layer), torch.randn(2, 8)
    outputs = layer(x)
    merging.merge_adapters(layer, ["default"])
    assert layer.merged
    assert_close(layer(x), outputs, 1e-5)
    layer.unmerge()
    assert_same(layer, before)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"trainable_token_indices": {"embed": [1]}}, {"bias": "all"}])
def test_what_reads_the_base_is_not_added_while_it_is_another(option: dict[str, Any], ids: torch.Tensor) -> None:
    """DoRA's magnitudes would be those of the merged weight, and wrong once it is unmerged."""
    model = adapted(EveryKind(), ["linear"], {"default": {}})
    model.merge_adapter()
    with pytest.raises(ConfigError, match=f"'new' has {next(iter(option))}=.* but default is merged into these"):
        model.add_adapter("new", LoraConfig(target_modules=["linear"], **option))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("new", LoraConfig(target_modules=["linear"]))
    model.unmerge_adapter()
    model.add_adapter("another", LoraConfig(target_modules=["linear"], **option))


def test_an_adapter_without_values_is_refused() -> None:
    model = si.LoraModel(EveryKind(), LoraConfig(target_modules=["head"]), low_cpu_mem_usage=True)
    with pytest.raises(ConfigError, match="layer 'head': adapter 'default' is on the meta device"):
        model.merge_adapter()


def test_bad_names() -> None:
    model = adapted(EveryKind(), *OPTIONS["plain"])
    with pytest.raises(UnknownNameError, match="no adapter 'other'"):
        model.merge_adapter(["default", "other"])
    with pytest.raises(ArgumentError, match="no list of names"):
        model.merge_adapter("default")
    assert not any(part.merged for part in model.parts().values())


# -- what is refused, and what an error leaves -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("unload", [False, True])
def test_safe_merge_refuses_what_is_not_finite(value: float, unload: bool, ids: torch.Tensor) -> None:
    model = adapted(EveryKind(), *OPTIONS["plain"])
    with torch.no_grad():
        factor_parameters(model.lora_layers()["space"], "default")[1].view(-1)[3] = value
    before, merge = state(model), model.merge_and_unload if unload else model.merge_adapter
    with pytest.raises(ModelError, match="weight of layer 'space' would hold NaN or Inf with adapter default"):
        merge(safe_merge=True)
    assert_same(model, before)
    assert not any(part.merged for part in model.parts().values())
    assert model.lora_layers().keys() == set(EVERY_KIND)
    model.merge_adapter()
    assert not model(ids).isfinite().all(), "without safe_merge it is merged as it is"
    model.unmerge_adapter()
    assert_same(model, before)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "merged before"])
@pytest.mark.parametrize(
    ("options", "key", "where"),
    [
        ({"modules_to_save": ["head"]}, "head.modules_to_save.default.weight", "'head.weight'"),
        ({"modules_to_save": ["plane"]}, "plane.modules_to_save.default.bias", "'plane.bias'"),
        ({"bias": "all"}, "space.bias", "'space.bias'"),
        ({"bias": "lora_only"}, "linear.base_layer.bias", "'linear.base_layer.bias'"),
        ({"trainable_token_indices": {"embed": [7, 2]}}, "embed.token_adapter", "weight of layer 'embed'"),
        ({}, "linear.lora_B.default.weight", "weight of layer 'linear'"),
    ],
)
def test_safe_merge_looks_at_everything_that_is_trained(
    options: dict[str, Any], key: str, where: str, call: str
) -> None:
    """PEFT's looks at matrices only."""
    model = adapted(EveryKind(), ["linear"], {"default": options, "o": {}})
    model.set_adapter("default")
    (values,) = [parameter for name, parameter in model.model.named_parameters() if name.startswith(key)]
    with torch.no_grad():
        values.view(-1)[1] = float("nan")
    if call == "merged before":
        model.merge_adapter()
    before, modules = state(model), dict(model.named_modules())
    merge = model.merge_adapter if call == "merge_adapter" else model.merge_and_unload
    with pytest.raises(ModelError, match=f"{where} .*NaN or Inf .*default"):
        merge(safe_merge=True)
    assert_same(model, before)
    assert dict(model.named_modules()) == modules
    if call == "merged before":
        model.unmerge_adapter()
    model.merge_and_unload(safe_merge=True, adapter_names=["o"])


def test_safe_merge_allows_for_buffers_that_are_infinite_by_nature() -> None:
    net = EveryKind()
    net.plane.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    net.plane.register_buffer("mean", torch.zeros(2))
    model = adapted(net, ["linear"], {"default": {"modules_to_save": ["plane"]}})
    model.model.plane.modules_to_save["default"].mean[0] = float("nan")
    with pytest.raises(ModelError, match=r"'plane.mean'"):
        model.merge_and_unload(safe_merge=True)
    model.model.plane.modules_to_save["default"].mean[0] = 0.0
    model.merge_and_unload(safe_merge=True)


# -- inference mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["bias", "dora and plain"])
def test_a_base_made_in_inference_mode(options: str, ids: torch.Tensor) -> None:
    """torch lets nobody write to its weights: merged ones are new parameters."""
    with torch.inference_mode():
        net = EveryKind()
    net.plane.requires_grad_(False)
    weights = dict(net.named_parameters())
    model = adapted(net, *OPTIONS[options])
    twin = adapted(EveryKind(), *OPTIONS[options])
    before = state(model.model)
    model.merge_adapter()
    twin.merge_adapter()
    assert_same(model.model, state(twin.model))
    model.unmerge_adapter()
    assert_same(model.model, before)
    assert all(model.model.get_submodule(name).weight is weights[f"{name}.weight"] for name in ("linear", "plane"))
    with torch.inference_mode():
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same(model.model, before)
    unloaded = copy.deepcopy(model).unload()
    assert {name: p.requires_grad for name, p in unloaded.named_parameters()} == {
        name: not name.startswith("plane") for name in weights
    }
    plain = model.merge_and_unload()
    assert_same(plain, state(twin.merge_and_unload()))
    trained = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in weights if not name.startswith("plane")}
    assert not plain.linear.weight.is_inference()


def test_unload_of_a_base_made_in_inference_mode() -> None:
    with torch.inference_mode():
        net = EveryKind()
    before = state(net)
    model = adapted(net, *OPTIONS["plain"])
    model.merge_adapter()
    assert_same(model.unload(), before)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_base_made_in_inference_mode_cannot_be_split() -> None:
    with torch.inference_mode():
        net = EveryKind()
    model = adapted(net, ["linear"], {"default": {}})
    before = state(model)
    with pytest.raises(ModelError, match=r"'linear' .* inference mode"):
        write_factors(model, *splitting(model))
    assert_same(model, before)
    write_factors(model, *splitting(model), base="offset")


@pytest.mark.filterwarnings(TIED)
@pytest.mark.filterwarnings(SHARED)
@pytest.mark.filterwarnings("ignore:the input and output embeddings are no longer:UserWarning")
@pytest.mark.parametrize("targets", [["embed_tokens"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("first", [False, True])
def test_what_is_merged_in_inference_mode_can_be_trained(
    first: bool, targets: list[str], tied: nn.Module, tokens: torch.Tensor
) -> None:
    model = adapted(tied, targets, {"default": {}})
    expected = model(tokens).logits
    with torch.inference_mode():
        if first:
            model.merge_adapter()
            model.unmerge_adapter()
            model.merge_adapter()
        plain = model.merge_and_unload()
    assert not any(parameter.is_inference() for parameter in plain.parameters())
    assert_close(plain(tokens).logits, expected, 1e-5)
    optimiser = torch.optim.SGD(plain.parameters(), lr=1e-3)
    loss = plain(tokens, labels=tokens).loss
    loss.backward()
    optimiser.step()
    assert plain(tokens, labels=tokens).loss < loss


def test_a_bias_needs_one_in_the_base(ids: torch.Tensor) -> None:
    with pytest.warns(UserWarning, match="lora_bias"):
        model = adapted(EveryKind(), ["linear", "head"], {"default": {"lora_bias": True}})
    before = state(model)
    with pytest.raises(ConfigError, match=r"layer 'head': .*has a bias \(lora_bias=True\), but the Linear"):
        model.merge_adapter()
    assert_same(model, before)


def test_quantised_layers_are_refused(ids: torch.Tensor) -> None:
    net = EveryKind()
    net.head = FakeQuantLinear.from_linear(net.head)
    model = adapted(net, ["linear", "head"], {"default": {}})
    before, outputs = state(model), model(ids)
    with pytest.raises(
        ModelError, match=r"'head', a FakeQuantLinear whose weight is quantised: .* load the base model"
    ):
        model.merge_and_unload()
    assert_same(model, before)
    assert torch.equal(model(ids), outputs)
    assert model.lora_layers()["head"].get_delta_weight("default").shape == (5, 128)


def test_computed_and_absent_weights_are_refused() -> None:
    net = EveryKind()
    nn.utils.parametrizations.orthogonal(net.linear)
    with pytest.raises(ModelError, match=r"layer 'linear': .* no parameter of its own, expected an ordinary tensor"):
        adapted(net, ["linear"], {"default": {}}).merge_adapter()
    model = adapted(EveryKind(), ["linear"], {"default": {}})
    model.model.linear.base_layer.to("meta")  # as a library does that loads layers when they are called
    with pytest.raises(ModelError, match="on meta"):
        model.merge_adapter()


def test_a_module_in_two_places_is_refused(ids: torch.Tensor) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    net.append(net[0])
    model = adapted(net, ["0"], {"default": {}})
    before = state(model)
    with pytest.raises(ModelError, match="layer '0' also stands as '2', where it has no such adapter"):
        model.merge_adapter()
    assert_same(model, before)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("merged", [[], ["a"]])
@pytest.mark.parametrize("after", [0, 3, 6])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(
    after: int, merged: list[str], unload: bool, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, adapters = OPTIONS["plain and dora"]
    model = adapted(EveryKind(), targets, adapters)
    if merged:
        model.merge_adapter(merged)
    before, modules = state(model), dict(model.named_modules())
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    left = after

    def failing(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise kind
        return write_changed(*args)

    write_changed = merging.write_changed
    merge = model.merge_and_unload if unload else model.merge_adapter
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(merging, "write_changed", failing)
        with pytest.raises(kind):
            merge(adapter_names=["b"])
    assert_same(model, before)
    assert dict(model.named_modules()) == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert all(part.merged_adapters == merged for part in model.parts().values())
    model.unmerge_adapter()
    assert_same(model.model, state(adapted(EveryKind(), targets, adapters).model))


def test_an_error_while_layers_take_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(EveryKind(), *OPTIONS["plain"])
    before, modules, placed = state(model), dict(model.named_modules()), []
    set_submodule = nn.Module.set_submodule

    def failing(self: nn.Module, name: str, module: nn.Module) -> None:
        placed.append(name)
        if len(placed) == 4:
            raise KeyboardInterrupt
        set_submodule(self, name, module)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "set_submodule", failing)
        with pytest.raises(KeyboardInterrupt):
            model.merge_and_unload()
    assert dict(model.named_modules()) == modules
    assert_same(model, before)
    assert model.peft_config


# -- copies, states, what is left ------------------------------------------------------------------------------------


def test_a_merged_model_can_be_copied_and_moved(ids: torch.Tensor) -> None:
    model = adapted(EveryKind(), *OPTIONS["bias"])
    before, keys = state(model), list(model.state_dict())
    model.merge_adapter()
    assert list(model.state_dict()) == keys, "the originals are in no state dict"
    merged, twin = state(model), copy.deepcopy(model)
    kept = [[weight.values for weight in part.merged_weights] for part in model.parts().values()]
    shared = [[weight.values for weight in part.merged_weights] for part in twin.parts().values()]
    assert all(one is two for ones, twos in zip(kept, shared, strict=True) for one, two in zip(ones, twos, strict=True))
    twin.unmerge_adapter()
    assert_same(twin, before)
    assert_same(model, merged)
    half = model.to(torch.bfloat16)
    half.unmerge_adapter()
    assert_same(half, {name: tensor.bfloat16() for name, tensor in before.items()})


def test_trainable_as_before() -> None:
    net = EveryKind()
    net.plane.requires_grad_(False)
    trained = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    plain = adapted(net, *OPTIONS["plain"]).merge_and_unload()
    assert {name: parameter.requires_grad for name, parameter in plain.named_parameters()} == trained


def test_a_progress_bar_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    adapted(EveryKind(), *OPTIONS["plain"]).merge_and_unload()
    assert not capsys.readouterr().err
    adapted(EveryKind(), *OPTIONS["plain"]).merge_and_unload(progressbar=True)
    assert "merging: 100%" in capsys.readouterr().err


def test_a_merged_model_is_exported(tiny_llama: Callable, tokens: torch.Tensor) -> None:
    model = adapted(tiny_llama(num_hidden_layers=1), ["q_proj", "down_proj"], {"default": {"use_dora": True}})
    expected = model(tokens).logits
    plain = model.merge_and_unload()
    assert not any(isinstance(module, AdapterPart) for module in plain.modules())
    plain.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(plain, (tokens,), strict=False)
    torch.testing.assert_close(program.module()(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_offset_starts_are_subtracted(ids: torch.Tensor) -> None:
    net = EveryKind()
    plain = net(ids)
    model = adapted(net, EVERY_KIND, {"default": {}})
    before, layers = state(model.model), model.lora_layers()
    write_factors(model, *splitting(model), base="offset")
    assert_close(model(ids), plain, 1e-6)
    model.merge_adapter()
    for name, tensor in before.items():
        if "lora" not in name:
            assert torch.equal(state(model.model)[name], tensor), "at the start B A = B0 A0"
    model.unmerge_adapter()
    fill(model, seed=5)
    delta = layers["head"].get_delta_weight("default").double()
    a, b = factor_parameters(layers["head"], "default")
    start = layers["head"].start["default"]
    exact = (
        layers["head"].scaling["default"] * b.double() @ a.double()
        - start.scaling * start.b.double() @ start.a.double()
    )
    assert_close(delta, exact, 1e-7)
    outputs = model(ids)
    model.merge_adapter()
    assert_close(model(ids), outputs, 1e-5)


# -- shared weights --------------------------------------------------------------------------------------------------


@pytest.fixture
def tied(tiny_llama: Callable) -> nn.Module:
    return tiny_llama(tie_word_embeddings=True)


@pytest.mark.filterwarnings(TIED)
@pytest.mark.filterwarnings(SHARED)
@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head", "q_proj"]])
def test_tied_weights_with_different_updates_are_untied(
    targets: list[str], tied: nn.Module, tokens: torch.Tensor
) -> None:
    """PEFT writes both updates into the one weight, and the model computes something else."""
    model = adapted(tied, targets, {"default": {}})
    expected, before = model(tokens).logits, state(model)
    shared = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is shared
    model.merge_adapter()
    assert_close(model(tokens).logits, expected, 1e-5)
    twin = copy.deepcopy(model)
    for one in (twin, model):
        one.unmerge_adapter()
        assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert_same(one, before)
        assert torch.equal(one(tokens).logits, expected)
    assert model.get_input_embeddings().weight is shared
    model.merge_adapter()
    model.to(torch.bfloat16).unmerge_adapter()
    assert_same(model, {name: tensor.bfloat16() for name, tensor in before.items()})


@pytest.mark.filterwarnings(TIED)
@pytest.mark.filterwarnings(SHARED)
def test_an_untied_model_says_so_and_loads_as_it_is(tied: nn.Module, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = adapted(tied, ["embed_tokens", "lm_head"], {"default": {}})
    expected = model(tokens).logits
    with pytest.warns(UserWarning, match="tie_word_embeddings=False"):
        plain = model.merge_and_unload()
    assert_close(plain(tokens).logits, expected, 1e-5)
    assert plain.config.tie_word_embeddings is False
    assert all(parameter.requires_grad for parameter in plain.parameters()), "also the new one"
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, plain(tokens).logits)


def test_tied_weights_with_the_same_update_are_merged_once(tied: nn.Module, tokens: torch.Tensor) -> None:
    model = adapted(tied, ["embed_tokens", "lm_head"], {"default": {"ensure_weight_tying": True}})
    expected, before = model(tokens).logits, state(model)
    model.merge_adapter()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_close(model(tokens).logits, expected, 1e-5)
    model.lora_layers()["lm_head"].unmerge()
    assert not any(model.lora_layers()[name].merged for name in ("lm_head", "model.embed_tokens"))
    model.unmerge_adapter()
    assert_same(model, before)
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert_close(plain(tokens).logits, expected, 1e-5)


@pytest.mark.filterwarnings(TIED)
@pytest.mark.filterwarnings(SHARED)
def test_untying_is_undone_on_error(tied: nn.Module, tokens: torch.Tensor) -> None:
    model = adapted(tied, ["embed_tokens", "lm_head"], {"default": {}})
    before = state(model)
    with torch.no_grad():
        factor_parameters(model.lora_layers()["lm_head"], "default")[0].fill_(float("nan"))
    with pytest.raises(ModelError, match="'lm_head'"):
        model.merge_adapter(safe_merge=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        factor_parameters(model.lora_layers()["lm_head"], "default")[0].copy_(
            before["model.lm_head.lora_A.default.weight"]
        )
    assert_same(model, before)


@pytest.mark.filterwarnings(SHARED)
def test_replicated_layers_get_weights_of_their_own(tiny_llama: Callable, tokens: torch.Tensor) -> None:
    replication = [(0, 2), (1, 2)]
    model = adapted(tiny_llama(), ["q_proj", "up_proj"], {"default": {"layer_replication": replication}})
    expected, before = model(tokens).logits, state(model)
    model.merge_adapter()
    assert_close(model(tokens).logits, expected, 1e-5)
    model.unmerge_adapter()
    assert_same(model, before)
    layers = model.merge_and_unload().model.layers
    assert len(layers) == 3
    assert layers[1].mlp.up_proj.weight is not layers[2].mlp.up_proj.weight
    assert layers[1].mlp.down_proj.weight is layers[2].mlp.down_proj.weight


# -- a base that was split -------------------------------------------------------------------------------------------


def splitting(model: si.LoraModel, rank: int = 3, effect: str = "splits") -> tuple[dict[str, Factors], Plan]:
    """Factors whose product the base is to give up: half of what a random projection keeps of it."""
    factors, generator = {}, torch.Generator().manual_seed(7)
    for name, layer in model.lora_layers().items():
        base = layer.get_base_layer()
        weight = base.weight.detach().double()
        weight = weight.T if isinstance(base, (Conv1D, nn.Embedding)) else weight.flatten(1)
        b = torch.linalg.qr(torch.randn(weight.shape[0], rank, dtype=torch.float64, generator=generator)).Q
        a = b.T @ weight / 2
        new = (weight - b @ a).float() if effect == "quantises" else None
        factors[name] = Factors(a.float(), b.float(), effect=effect, base=new)
    return factors, Plan(dict.fromkeys(factors, rank), dict.fromkeys(factors, 2.0 * rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("effect", ["splits", "quantises"])
@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_the_original_of_a_changed_base(merged: bool, effect: str, dtype: torch.dtype) -> None:
    original = state(EveryKind().to(dtype))
    model = adapted(EveryKind().to(dtype), EVERY_KIND, {"default": {}})
    keys = list(model.state_dict())
    write_factors(model, *splitting(model, effect=effect))
    assert list(model.state_dict()) == keys
    residual = state(model.model)
    assert all(not torch.equal(residual[f"{name}.weight"], original[f"{name}.weight"]) for name in EVERY_KIND)
    fill(model)
    twin = copy.deepcopy(model)
    layers = [one.lora_layers()["head"] for one in (model, twin)]
    assert layers[0].original_weight is layers[1].original_weight, "copies of a model share it"
    if merged:
        model.merge_adapter()
    assert_same(model.unload(), original)
    assert_same(twin.unload(), original)


def test_merging_keeps_the_residual(ids: torch.Tensor) -> None:
    net = EveryKind()
    plain = net(ids)
    model = adapted(net, EVERY_KIND, {"default": {}})
    write_factors(model, *splitting(model))
    residual = state(model.model)
    model.merge_adapter()
    assert_close(model(ids), plain, 1e-5)
    model.unmerge_adapter()
    assert_same(model.model, residual)
    assert_close(model.merge_and_unload()(ids), plain, 1e-5)


def test_unload_after_loading_a_residual(tmp_path: Path, ids: torch.Tensor) -> None:
    """No copy of the original then: the start is added in float64 and rounded once."""
    original = state(EveryKind())
    model = adapted(EveryKind(), EVERY_KIND, {"default": {}})
    write_factors(model, *splitting(model))
    residual = copy.deepcopy(model)
    with torch.no_grad():
        for layer in residual.lora_layers().values():
            layer.original_weight = None
            layer.start.clear()
    base = residual.unload()
    fill(model)
    model.save_pretrained(tmp_path)
    loaded = si.LoraModel.from_pretrained(base, tmp_path)
    assert_close(loaded(ids), model(ids), 1e-6)
    restored = state(loaded.unload())
    for name, tensor in original.items():
        assert_close(restored[name], tensor, 2.5e-7)


def tied_factors(model: si.LoraModel, effect: str = "splits") -> tuple[dict[str, Factors], Plan]:
    """Factors of a tied embedding and head whose products are one another's transpose."""
    embedding = model.lora_layers()["model.embed_tokens"].get_base_layer().weight.detach()
    b = torch.linalg.qr(embedding.double().T)[0][:, :3].float()
    a = (embedding.double() @ b.double()).T.float() / 2
    factors = {"model.embed_tokens": Factors(a, b, effect=effect), "lm_head": Factors(b.T, a.T, effect=effect)}
    return factors, Plan(dict.fromkeys(factors, 3), dict.fromkeys(factors, 3.0))


@pytest.mark.filterwarnings(TIED)
def test_a_tied_split_is_restored_once(tied: nn.Module) -> None:
    original = state(tied)
    model = adapted(tied, ["embed_tokens", "lm_head"], {"default": {}})
    write_factors(model, *tied_factors(model))
    twin = copy.deepcopy(model)
    assert_same(model.unload(), original)
    for layer in twin.lora_layers().values():
        layer.original_weight = None
    restored = state(twin.unload())
    assert_close(restored["lm_head.weight"], original["lm_head.weight"], 2.5e-7)
    assert twin.model.lm_head.weight is twin.model.model.embed_tokens.weight


def test_a_failed_write_keeps_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(EveryKind(), EVERY_KIND, {"default": {}})
    before = state(model)
    factors, plan = splitting(model)
    monkeypatch.setattr("smartinit.adapters.attach.set_magnitude", failing_call)
    with pytest.raises(RuntimeError, match="in the middle"):
        write_factors(model, factors, plan)
    assert_same(model, before)
    assert all(layer.original_weight is None for layer in model.lora_layers().values())


def failing_call(*_: object) -> None:
    message = "in the middle"
    raise RuntimeError(message)


@pytest.mark.parametrize("base", ["residual", "offset"])
def test_no_start_is_written_while_an_adapter_is_merged(base: str) -> None:
    model = adapted(EveryKind(), EVERY_KIND, {"default": {}})
    factors, plan = splitting(model)
    model.merge_adapter()
    before = state(model)
    with pytest.raises(ConfigError, match=r"adapter default is merged into the base weight of 'embed': call unmerge"):
        write_factors(model, factors, plan, base=base)
    assert_same(model, before)


# -- other parts than LoRA layers ------------------------------------------------------------------------------------


def test_trained_modules_take_the_originals_places(ids: torch.Tensor) -> None:
    net = EveryKind()
    before = state(net)
    model = adapted(net, ["linear"], {"default": {"modules_to_save": ["head"]}})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    outputs = model(ids)
    twin = copy.deepcopy(model)
    plain = model.merge_and_unload()
    assert_close(plain(ids), outputs, 1e-5)
    assert plain.state_dict().keys() == before.keys()
    assert type(plain.head) is nn.Linear
    assert torch.equal(plain.head.weight, before["head.weight"] + 1)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert_same(twin.unload(), before)


def test_trained_tokens_are_written_into_their_rows(ids: torch.Tensor) -> None:
    net = EveryKind()
    before = state(net)
    model = adapted(net, ["linear"], {"default": {"trainable_token_indices": {"embed": [7, 2]}}})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.mul_(2)
    everything, outputs = state(model), model(ids)
    model.merge_adapter()
    assert_close(model(ids), outputs, 1e-5)
    model.unmerge_adapter()
    assert_same(model, everything)
    twin = copy.deepcopy(model)
    plain = model.merge_and_unload()
    assert_close(plain(ids), outputs, 1e-5)
    expected = before["embed.weight"].clone()
    expected[[7, 2]] *= 2
    assert torch.equal(plain.embed.weight, expected)
    assert_same(twin.unload(), before)
