"""DoRA against its formula in float64, its norm against changes of the base, and what torch does with its layers."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from smartinit.adapters import LoraModel, dora
from smartinit.adapters.attach import write_factors
from smartinit.adapters.dora import decomposed_update, magnitude_quotient, row_norms, squared_norms
from smartinit.adapters.fake_quant import FakeQuantLinear
from smartinit.adapters.kinds import wrap
from smartinit.config import LoraConfig
from smartinit.errors import ConfigError
from smartinit.factors import Factors
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from smartinit.adapters.layer import LoraLayer

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 10), (4, 6)),
    "transposed": (lambda: Conv1D(10, 6), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 10, 3, padding=2, padding_mode="circular"), (2, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 10, (2, 3), dilation=2), (2, 3, 6, 7)),
    "one image": (lambda: nn.Conv2d(3, 10, 3), (3, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 10, 2, stride=2), (2, 3, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(9, 10), (4, 5)),
}


def decomposed(base: nn.Module, *, rank: int = 3, alpha: float = 4.0, **options: Any) -> LoraLayer:
    """A layer with one active adapter, at its start."""
    layer = wrap("x", base)
    layer.update_layer("default", rank, alpha, LoraConfig(r=rank, use_dora=True, **options))
    layer.set_adapter(["default"])
    base.requires_grad_(False)
    return layer


def moved(layer: LoraLayer) -> LoraLayer:
    """The same layer, as if it had been trained."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + torch.randn_like(parameter) / 4)
            elif "lora_" in name:
                parameter.add_(torch.randn_like(parameter) / 2)
    return layer


def input_of(kind: str) -> torch.Tensor:
    """Something that the layer takes."""
    size = KINDS[kind][1]
    return torch.randint(0, 9, size) if kind == "embedding" else torch.randn(size)


def published(layer: LoraLayer, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output of eq. 5 in float64 with the norm as a constant, and the leaves m, A, B."""
    base = copy.deepcopy(layer.base_layer).double()
    a, b = (matrix.detach().double().requires_grad_() for matrix in layer.matrices("default"))
    m = layer.lora_magnitude_vector["default"].weight.detach().double().requires_grad_()
    embedding = isinstance(base, nn.Embedding)
    weight = base.weight.T if embedding or isinstance(base, Conv1D) else base.weight.flatten(1)
    whole = weight + layer.scaling["default"] * b.flatten(1) @ a.flatten(1)
    whole = m.view(-1, 1) * whole / whole.norm(dim=1, keepdim=True).detach()
    if embedding:
        out = functional.embedding(x, whole.T)
    elif isinstance(base, (nn.Linear, Conv1D)):
        out = functional.linear(x.double(), whole, base.bias)
    else:
        out = base._conv_forward(x.double(), whole.view_as(base.weight), base.bias)
    return out, [m, a, b]


def close(mine: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Relative to the largest number."""
    assert mine.shape == expected.shape
    assert torch.dist(mine.double(), expected.double(), float("inf")) <= tolerance * expected.abs().max()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_the_published_ones(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    layer = moved(decomposed(KINDS[kind][0]()))
    x = input_of(kind)
    out = layer(x)
    expected, leaves = published(layer, x)
    weights = torch.randn(expected.shape)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    close(out.detach(), expected.detach())
    for parameter, leaf in zip(
        (layer.lora_magnitude_vector["default"].weight, *layer.matrices("default")), leaves, strict=True
    ):
        close(parameter.grad, leaf.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_starts_where_the_base_does(kind: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    layer = decomposed(KINDS[kind][0]().to(dtype))
    x = input_of(kind)
    x = x.to(dtype) if x.is_floating_point() else x
    assert torch.equal(layer(x), layer.base_layer(x))
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.shape == layer.magnitude_shape()
    assert magnitude.dtype == layer.matrices("default")[0].dtype
    close(magnitude.detach().flatten(), layer.weight_matrix().double().norm(dim=1))
    # The magnitude is taken after the init, whatever that is: a plain adapter with the same factors agrees.
    shifted = decomposed(KINDS[kind][0]().to(dtype), init_lora_weights=False)
    assert torch.all(magnitude_quotient(shifted, "default") == 1)
    plain = copy.deepcopy(shifted)
    del plain.lora_magnitude_vector["default"]
    tolerance = 2e-6 if dtype != torch.bfloat16 else 1e-2
    close(shifted(x).detach(), plain(x).detach().to(dtype), tolerance)


def test_the_norm_of_a_large_layer_to_seven_digits(seed: int) -> None:
    """Sizes that go through in several blocks, and factors that matter; stored either way."""
    torch.manual_seed(seed)
    base = nn.Linear(1600, 900)
    layer = moved(decomposed(base, rank=8, alpha=16.0))
    a, b = (matrix.detach().double() for matrix in layer.matrices("default"))
    exact = (base.weight.double() + 2 * b @ a).norm(dim=1)
    close(row_norms(layer, "default"), exact, 2e-7)
    close(row_norms(layer, "default", base.weight.double()), exact, 1e-14)
    base.bfloat16()
    exact = (base.weight.double() + 2 * b @ a).norm(dim=1)
    close(row_norms(layer, "default"), exact, 2e-7)
    for matrix in (torch.randn(900, 1600), torch.randn(1600, 900).T, torch.randn(1, 700), torch.randn(700, 1)):
        close(squared_norms(matrix), matrix.double().square().sum(1), 1e-14)


def test_autocast_rounds_neither_norm_nor_sum(seed: int) -> None:
    torch.manual_seed(seed)
    layer = moved(decomposed(nn.Linear(60, 10, bias=False)))
    x = torch.randn(40, 60)
    norms = row_norms(layer, "default")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(row_norms(layer, "default"), norms)
        base, product = layer.base_layer(x), layer.product("default", x)
        assert base.dtype == product.dtype == torch.bfloat16
        out = decomposed_update(layer, "default", x, base)
    close(out, (base.double() + product.double()) * magnitude_quotient(layer, "default"))


def test_rows_without_direction() -> None:
    """A row of zeros has no direction; one that the adapter cancels has next to none."""
    base = nn.Linear(6, 4)
    with torch.no_grad():
        base.weight[1] = 0
    layer = decomposed(base, rank=1, alpha=1.0)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        layer.matrices("default")[0].copy_(base.weight[2:3])
        layer.matrices("default")[1].copy_(torch.tensor([[0.0], [0.0], [-1.0], [0.0]]))
    out = layer(x)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters() if parameter.requires_grad)
    assert row_norms(layer, "default").min() > 0
    close(out[:, [0, 1, 3]].detach(), base(x)[:, [0, 1, 3]])


# --- the base changes ----------------------------------------------------------------------------------------------


def in_place(layer: LoraLayer) -> LoraLayer:
    with torch.no_grad():
        layer.base_layer.weight.mul_(3)
    return layer


def another_parameter(layer: LoraLayer) -> LoraLayer:
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight * 3)
    return layer


def other_data(layer: LoraLayer) -> LoraLayer:
    layer.base_layer.weight.data = layer.base_layer.weight.data * 3
    return layer


def same_memory(layer: LoraLayer) -> LoraLayer:
    version = layer.base_layer.weight._version
    data = layer.base_layer.weight.data.mul_(3)
    layer.base_layer.weight = nn.Parameter(data)
    while layer.base_layer.weight._version < version:
        with torch.no_grad():
            layer.base_layer.weight.mul_(1)
    assert layer.base_layer.weight._version == version
    return layer


def data_and_forget(layer: LoraLayer) -> LoraLayer:
    layer.base_layer.weight.data.mul_(3)
    layer.forget_norms()
    return layer


def data_and_train(layer: LoraLayer) -> LoraLayer:
    layer.base_layer.weight.data.mul_(3)
    return layer.eval()


def data_and_move(layer: LoraLayer) -> LoraLayer:
    layer.base_layer.weight.data.mul_(3)
    return layer.to("cpu")


def state_dict(layer: LoraLayer) -> LoraLayer:
    layer.load_state_dict({key: 3 * t if "base_layer" in key else t for key, t in layer.state_dict().items()})
    return layer


def assigned_state_dict(layer: LoraLayer) -> LoraLayer:
    state = {key: 3 * t if "base_layer" in key else t.clone() for key, t in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    return layer


def cast(layer: LoraLayer) -> LoraLayer:
    return in_place(layer).double().float()


def copied(layer: LoraLayer) -> LoraLayer:
    twin = copy.deepcopy(layer)
    in_place(layer)
    assert torch.equal(row_norms(twin, "default"), row_norms(copy.deepcopy(twin), "default"))
    return in_place(twin)


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        another_parameter,
        other_data,
        same_memory,
        data_and_forget,
        data_and_train,
        data_and_move,
        state_dict,
        assigned_state_dict,
        cast,
        copied,
    ],
)
def test_a_changed_base_is_noticed(change: Callable[[LoraLayer], LoraLayer], seed: int) -> None:
    torch.manual_seed(seed)
    layer = moved(decomposed(nn.Linear(6, 10)))
    x = torch.randn(4, 6)
    before = layer(x)
    layer = change(layer)
    expected, _ = published(layer, x)
    close(layer(x).detach(), expected.detach())
    assert torch.dist(layer(x), before) > 0.1


def test_the_bases_norm_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dora, "squared_norms", lambda matrix: calls.append(1) or squared_norms(matrix))
    layer = moved(decomposed(nn.Linear(6, 10).requires_grad_(False)))
    layer.update_layer("second", 2, 2.0, LoraConfig(use_dora=True))
    layer.set_adapter(["default", "second"])
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad])
    for _ in range(3):
        layer.train()
        layer(torch.randn(2, 6)).sum().backward()
        optimizer.step()
    assert len(calls) == 1
    with torch.inference_mode():
        layer(torch.randn(2, 6))
    assert len(calls) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_base_that_is_trained_itself(fused: bool, seed: int) -> None:
    """torch's fused optimisers write to a parameter and leave its version as it was."""
    torch.manual_seed(seed)
    layer = moved(decomposed(nn.Linear(6, 10)))
    layer.base_layer.weight.requires_grad_(True)
    x = torch.randn(4, 6)
    optimizer = torch.optim.AdamW([layer.base_layer.weight], lr=0.5, fused=fused)
    layer(x).square().sum().backward()
    optimizer.step()
    close(layer(x).detach(), published(layer, x)[0].detach())


def test_transforms_of_functions_take_the_base_as_an_input(seed: int) -> None:
    torch.manual_seed(seed)
    layer = moved(decomposed(nn.Linear(6, 10)))
    x = torch.randn(4, 6)
    state = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(state: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, state, (x,)).square().sum()

    found = torch.func.grad(loss)(state)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            close(found[name], parameter.grad)


def test_shapes_without_values() -> None:
    with torch.device("meta"):
        layer = decomposed(nn.Linear(6, 10))
        assert layer(torch.randn(4, 6)).shape == (4, 10)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18])
def test_weights_of_any_size(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    base = nn.Linear(6, 10, bias=False)
    with torch.no_grad():
        base.weight.mul_(scale)
    model = LoraModel(nn.Sequential(base), LoraConfig(target_modules=["0"], r=2, use_dora=True))
    x = torch.randn(4, 6)
    before = model(x).detach()
    model.merge_adapter()
    close(model(x).detach() / scale, before / scale)


def test_a_base_made_in_inference_mode() -> None:
    with torch.inference_mode():
        base = nn.Linear(6, 10)
    layer = moved(decomposed(base))
    x = torch.randn(4, 6)
    with torch.inference_mode():
        close(layer(x), published(layer, x)[0])


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            fresh = isinstance(tensor, torch.Tensor) and all(
                tensor.untyped_storage().data_ptr() != arg.untyped_storage().data_ptr()
                for arg in args
                if isinstance(arg, torch.Tensor)
            )
            self.largest = max(self.largest, tensor.numel() if fresh else 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_step_makes_nothing_of_the_weights_size(dtype: torch.dtype, dropout: float) -> None:
    layer = decomposed(nn.Linear(1200, 1000).to(dtype), lora_dropout=dropout)
    with Sizes() as sizes:
        layer(torch.randn(8, 1200, dtype=dtype)).sum().backward()
    assert 8 * 1200 <= sizes.largest <= 1200 * 1000 / 2


# --- bases of other kinds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_dora": True, "lora_dropout": 0.4}, {}])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_the_layer_that_it_stands_for(options: dict[str, Any], bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    quantised = FakeQuantLinear.from_linear(nn.Linear(64, 16), bits)
    dense = nn.Linear(64, 16)
    dense.weight.data, dense.bias.data = quantised.dequantise(), quantised.bias.data.clone()
    layers = []
    for base in (quantised, dense):
        layer = wrap("x", base)
        layer.update_layer("default", 3, 4.0, LoraConfig(r=3, **options))
        layer.set_adapter(["default"])
        layers.append(layer)
    moved(layers[0])
    layers[1].load_state_dict({key: t for key, t in layers[0].state_dict().items() if "lora_" in key}, strict=False)
    assert {p.dtype for name, p in layers[0].named_parameters() if "lora_" in name} == {torch.float32}
    x, found = torch.randn(5, 64), []
    for layer in layers:
        torch.manual_seed(seed)
        rows = x.clone().requires_grad_()
        out = layer(rows)
        out.square().sum().backward()
        found.append([out.detach(), rows.grad, *(p.grad for n, p in layer.named_parameters() if "lora_" in n)])
    for mine, other in zip(*found, strict=True):
        close(mine, other)


def test_weights_that_come_later() -> None:
    """Neither base nor adapter has values when the layer is made."""
    base = nn.Linear(6, 10)
    layer = decomposed(nn.Linear(6, 10, device="meta"))
    assert all(parameter.is_meta for parameter in layer.parameters())
    full = moved(decomposed(base))
    layer.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), full(x))


def test_the_bias_of_an_adapter_and_its_norm_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="use_dora cannot be used with lora_bias"):
        LoraConfig(use_dora=True, lora_bias=True)


# --- starts that are written ---------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """Three layers, one of them stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 16), Conv1D(10, 16), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.third(self.second(self.first(x).tanh()).tanh())
        return result


@pytest.mark.parametrize("effect", ["splits", "shifts", "keeps"])
@pytest.mark.parametrize("ranks", [(4, 4), (2, 5)])
def test_a_start_is_written_with_its_magnitude(effect: Any, ranks: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    base = Perceptron()
    x = torch.randn(5, 12)
    before = base(x).detach()
    model = LoraModel(base, LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["first", "second"]))
    model(x)  # norms of the base as it is now are known
    factors = {
        "first": Factors(torch.randn(ranks[0], 12) / 4, torch.randn(16, ranks[0]) / 4, effect),
        "second": Factors(torch.randn(ranks[1], 16) / 4, torch.randn(10, ranks[1]) / 4, effect),
    }
    if effect == "keeps":
        factors = {name: Factors(pair.a, torch.zeros_like(pair.b)) for name, pair in factors.items()}
    plan = Plan({"first": ranks[0], "second": ranks[1]}, {"first": 2.0 * ranks[0], "second": 2.0 * ranks[1]})
    write_factors(model, factors, plan)
    after = model(x).detach()
    if effect == "shifts":
        assert torch.dist(after, before) > 0.01
    else:
        close(after, before)
    for layer in model.lora_layers().values():
        assert torch.all(magnitude_quotient(layer, "default") == 1)
        assert layer.lora_magnitude_vector["default"].weight.requires_grad


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions_of_any_dimensions_give_up_their_start(use_dora: bool, seed: int) -> None:
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Unflatten(2, (2, 2, 2)), nn.Conv3d(4, 5, (1, 2, 2)))
    original = copy.deepcopy(base)
    model = LoraModel(base, LoraConfig(r=2, lora_alpha=3, use_dora=use_dora, target_modules=["0", "2"]))
    factors = {
        "0": Factors(torch.randn(2, 6) / 4, torch.randn(4, 2) / 4, "splits"),
        "2": Factors(torch.randn(2, 16) / 4, torch.randn(5, 2) / 4, "splits"),
    }
    write_factors(model, factors, Plan({"0": 2, "2": 2}, {"0": 3.0, "2": 3.0}))
    x = torch.randn(2, 3, 9)
    close(model(x).detach(), original(x).detach())
    residual = original[2].weight.flatten(1) - 1.5 * factors["2"].b @ factors["2"].a
    close(base[2].base_layer.weight.detach().flatten(1), residual.detach())


# --- torch ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def perceptron(seed: int) -> LoraModel:
    """Trained a little."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, use_dora=True, target_modules=["first", "second", "third"], lora_alpha=3)
    model = LoraModel(Perceptron(), config)
    for layer in model.lora_layers().values():
        moved(layer)
    return model


def gradients_of(model: nn.Module, x: torch.Tensor, run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """Of a loss, with the output."""
    model.zero_grad()
    out = run(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_without_a_break(backend: str, perceptron: LoraModel) -> None:
    x = torch.randn(5, 12)
    expected = gradients_of(perceptron, x, perceptron)
    torch.compiler.reset()
    compiled = torch.compile(perceptron.model, backend=backend, fullgraph=True)
    for mine, other in zip(gradients_of(perceptron, x, compiled), expected, strict=True):
        close(mine, other)
    with torch.no_grad():
        perceptron.model.first.base_layer.weight.mul_(2)
    close(compiled(x).detach(), perceptron(x).detach())
    torch.compiler.reset()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, perceptron: LoraModel) -> None:
    x = torch.randn(5, 12, requires_grad=True)
    expected = gradients_of(perceptron, x, perceptron)
    again = gradients_of(perceptron, x, lambda rows: checkpoint(perceptron, rows, use_reentrant=use_reentrant))
    assert all(torch.equal(mine, other) for mine, other in zip(again, expected, strict=True))


def test_copies_and_state_dicts(perceptron: LoraModel) -> None:
    x = torch.randn(5, 12)
    out = perceptron(x)
    twin = copy.deepcopy(perceptron)
    assert torch.equal(twin(x), out)
    for layer in twin.lora_layers().values():
        moved(layer)
    assert torch.equal(perceptron(x), out)
    twin.load_state_dict(perceptron.state_dict())
    assert torch.equal(twin(x), out)
    assert len(pickle.dumps(perceptron)) > 0  # what sends a model to other processes
