"""Layers of every kind with every option, beside PEFT's with the same factors: outputs, gradients, keys, starts."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from smartinit.adapters import LoraModel
from smartinit.adapters.kinds import wrap
from smartinit.config import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from smartinit.adapters.layer import LoraLayer

peft = pytest.importorskip("peft")
peft_layers = pytest.importorskip("peft.tuners.lora.layer")

# PEFT asks every transformers model for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

RANK, ALPHA = 3, 4.0  # a scaling that is no power of two
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (lambda: nn.Linear(6, 10), (4, 5, 6), "Linear"),
    "no bias": (lambda: nn.Linear(6, 10, bias=False), (4, 6), "Linear"),
    "transposed": (lambda: Conv1D(10, 6), (4, 5, 6), "Linear"),
    "conv1d": (lambda: nn.Conv1d(4, 10, 3, stride=2, padding=1), (4, 4, 9), "Conv1d"),
    "conv2d": (lambda: nn.Conv2d(4, 10, (2, 3), stride=(1, 2), padding=1), (4, 4, 5, 6), "Conv2d"),
    "point": (lambda: nn.Conv2d(4, 10, 1, bias=False), (4, 4, 3, 3), "Conv2d"),
    "conv3d": (lambda: nn.Conv3d(2, 10, (1, 3, 3), padding="same"), (4, 2, 3, 3, 4), "Conv3d"),
    "embedding": (lambda: nn.Embedding(9, 10, padding_idx=0), (4, 5), "Embedding"),
    "by frequency": (lambda: nn.Embedding(9, 10, scale_grad_by_freq=True), (4, 5), "Embedding"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.4},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.4},
}


def input_of(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Something that the layer takes; tokens come more than once."""
    size = KINDS[kind][1]
    return torch.randint(0, 9, size) if KINDS[kind][2] == "Embedding" else torch.randn(size).to(dtype)


def adapter_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """By their names on the layer."""
    return {name: parameter for name, parameter in layer.named_parameters() if "lora_" in name}


def pair_of(
    kind: str, adapters: dict[str, dict[str, Any]], *, dtype: torch.dtype = torch.float32
) -> tuple[LoraLayer, nn.Module]:
    """Our layer and PEFT's, around copies of one base layer, all adapters active, nothing at its start any more."""
    make, _, name = KINDS[kind]
    base = make().to(dtype)
    ours = wrap("x", copy.deepcopy(base))
    theirs = None
    for adapter, options in adapters.items():
        ours.update_layer(adapter, RANK, ALPHA, LoraConfig(r=RANK, **options))
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, fan_in_fan_out=kind == "transposed", **options)
        if theirs is None:
            theirs = getattr(peft_layers, name)(base, adapter, config=config, r=RANK, lora_alpha=ALPHA)
        else:
            theirs.update_layer(adapter, RANK, ALPHA, config=config)
    assert theirs is not None
    ours.set_adapter(list(adapters))
    theirs.set_adapter(list(adapters))
    own, others = adapter_parameters(ours), adapter_parameters(theirs)
    assert {key: p.shape for key, p in own.items()} == {key: p.shape for key, p in others.items()}
    for key, parameter in own.items():
        values = torch.randn(parameter.shape)
        # A magnitude is about as large as the norm that it is divided by.
        parameter.data = (1 + values / 4) * parameter.data if "magnitude" in key else values / 2
        others[key].data = parameter.data.clone()
    return ours, theirs


def results_of(layer: nn.Module, x: torch.Tensor, seed: int, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The output, and the gradients of a loss that weighs every number of it differently."""
    rows = x.clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(seed)
    out = layer(rows, **kwargs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    (out.float() * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in adapter_parameters(layer).items()}
    return {"out": out.detach(), "x": rows.grad, **found}


def assert_same(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """Relative to the largest number of each tensor."""
    assert mine.keys() == other.keys()
    for name, expected in other.items():
        if expected is None:
            assert mine[name] is None, name
            continue
        assert mine[name].dtype == expected.dtype, name
        largest = float(expected.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(mine[name], expected, rtol=0, atol=tolerance * largest, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
def test_outputs_and_gradients(kind: str, options: str, seed: int) -> None:
    if options == "bias" and KINDS[kind][2] == "Embedding":
        pytest.skip("embeddings have no lora_bias")
    torch.manual_seed(seed)
    ours, theirs = pair_of(kind, {"default": OPTIONS[options]})
    x = input_of(kind)
    mine = results_of(ours, x, seed)
    assert ("lora_magnitude_vector.default.weight" in mine) == ("dora" in options)
    assert_same(mine, results_of(theirs, x, seed))
    with torch.no_grad():
        assert_same({"eval": ours.eval()(x)}, {"eval": theirs.eval()(x)})
    assert set(ours.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("kind", ["linear", "transposed", "conv2d", "embedding"])
@pytest.mark.parametrize("options", ["plain", "dora", "dora, dropout"])
@pytest.mark.parametrize("how", ["bfloat16 base", "autocast"])
def test_half_precision(kind: str, options: str, how: str, seed: int) -> None:
    if (kind, options, how) == ("conv2d", "dora, dropout", "bfloat16 base"):
        pytest.skip("PEFT's convolves float32 with bfloat16, which torch refuses")
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if how == "bfloat16 base" else torch.float32
    ours, theirs = pair_of(kind, {"default": OPTIONS[options]}, dtype=dtype)
    x = input_of(kind, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        mine, other = results_of(ours, x, seed), results_of(theirs, x, seed)
    assert_same(mine, other, tolerance=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_several_active_adapters(kind: str, seed: int) -> None:
    """Each adapter acts on what those before it have made."""
    torch.manual_seed(seed)
    dropout = {} if KINDS[kind][2] == "Embedding" else {"lora_dropout": 0.3}
    adapters = {"one": {}, "two": {"use_dora": True}, "three": dropout, "four": {"use_dora": True, **dropout}}
    ours, theirs = pair_of(kind, adapters)
    x = input_of(kind)
    assert_same(results_of(ours, x, seed), results_of(theirs, x, seed), 3e-6)
    for layer in (ours, theirs):
        layer.set_adapter(["two", "one"])
        layer.zero_grad()
    assert_same(results_of(ours, x, seed), results_of(theirs, x, seed), 3e-6)


@pytest.mark.parametrize("kind", ["linear", "transposed", "conv1d", "conv2d", "conv3d", "embedding"])
def test_rows_with_adapters_of_their_own(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    ours, theirs = pair_of(kind, {"one": {}, "two": {"use_rslora": True}})
    x = input_of(kind)
    names = ["two", "__base__", "one", "two"]
    assert_same(results_of(ours, x, seed, adapter_names=names), results_of(theirs, x, seed, adapter_names=names))


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_rows_with_decomposed_adapters_of_their_own(kind: str, seed: int) -> None:
    """PEFT refuses these, so each row is compared with what its adapter makes of it alone."""
    torch.manual_seed(seed)
    ours, theirs = pair_of(kind, {"one": {"use_dora": True}, "two": {}})
    x = input_of(kind)
    mixed = ours(x, adapter_names=["one", "two", "one", "__base__"])
    for row, name in enumerate(["one", "two", "one"]):
        theirs.set_adapter([name])
        assert_same({"out": mixed[row].detach()}, {"out": theirs(x)[row].detach()})
    assert torch.equal(mixed[3], ours.base_layer(x)[3])


@pytest.mark.parametrize("start", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", ["linear", "transposed", "conv1d", "conv2d", "conv3d", "embedding"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_starts_are_pefts_number_by_number(kind: str, start: bool | str, lora_bias: bool, seed: int) -> None:
    if lora_bias and (kind == "embedding" or start == "gaussian"):
        pytest.skip("there is no such bias")
    make, _, name = KINDS[kind]
    base = make()
    options = {"init_lora_weights": start, "lora_bias": lora_bias}
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, fan_in_fan_out=kind == "transposed", **options)
    theirs = getattr(peft_layers, name)(base, "default", config=config, r=RANK, lora_alpha=ALPHA)
    torch.manual_seed(seed)
    ours = wrap("x", base)
    ours.update_layer("default", RANK, ALPHA, LoraConfig(r=RANK, **options))
    mine, other = adapter_parameters(ours), adapter_parameters(theirs)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in other)


class Mixture(nn.Module):
    """A model with a layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 1)
        self.conv3 = nn.Conv3d(8, 8, 1)
        self.transposed = Conv1D(8, 8)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(self.embed(x).mT)
        y = self.conv3(self.conv2(y[..., None]).tanh()[..., None])[..., 0, 0]
        result: torch.Tensor = self.linear(self.transposed(y.mT.contiguous()).tanh())
        return result


NAMES = ["embed", "conv1", "conv2", "conv3", "transposed", "linear"]


def both_models(**options: Any) -> tuple[LoraModel, nn.Module]:
    """Wrapped by us, and by PEFT."""
    model = Mixture()
    ours = LoraModel(copy.deepcopy(model), LoraConfig(target_modules=NAMES, **options))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=NAMES, **options))
    return ours, theirs


def keys_of(model: nn.Module, prefixes: Sequence[str]) -> set[str]:
    """Of the state dict, without what a wrapper puts before them."""
    keys = list(model.state_dict())
    for prefix in prefixes:
        assert all(key.startswith(prefix) for key in keys)
        keys = [key.removeprefix(prefix) for key in keys]
    return set(keys)


@pytest.mark.parametrize("use_dora", [False, True])
def test_keys_and_outputs_of_a_whole_model(use_dora: bool, seed: int) -> None:
    torch.manual_seed(seed)
    ours, theirs = both_models(r=2, lora_alpha=3, use_dora=use_dora)
    assert keys_of(ours, ["model."]) == keys_of(theirs, ["base_model.model."])
    # The same names and shapes: PEFT's adapter goes into ours as it is.
    for parameter in adapter_parameters(theirs).values():
        parameter.data += torch.randn_like(parameter) / 4
    state = {key.removeprefix("base_model."): tensor for key, tensor in theirs.state_dict().items()}
    assert not any(ours.load_state_dict(state))
    x = torch.randint(0, 16, (3, 7))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("maker", ["ours", "theirs"])
def test_folders_of_decomposed_adapters(maker: str, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Mixture()
    options: dict[str, Any] = {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": NAMES}
    if maker == "ours":
        made: nn.Module = LoraModel(copy.deepcopy(model), LoraConfig(**options))
    else:
        with pytest.warns(UserWarning, match="fan_in_fan_out"):
            made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
    for parameter in adapter_parameters(made).values():
        parameter.data += torch.randn_like(parameter) / 4
    made.save_pretrained(str(tmp_path))
    if maker == "ours":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out")
            loaded: nn.Module = peft.PeftModel.from_pretrained(model, str(tmp_path))
    else:
        loaded = LoraModel.from_pretrained(model, tmp_path)
    x = torch.randint(0, 16, (3, 7))
    torch.testing.assert_close(loaded(x), made(x), rtol=1e-5, atol=1e-6)
    saved, read = (
        {name.removeprefix("base_model."): parameter for name, parameter in adapter_parameters(which).items()}
        for which in (made, loaded)
    )
    assert saved.keys() == read.keys()
    assert all(torch.equal(saved[name], read[name]) for name in saved)
