"""One LoRA layer against the formula, and against PEFT's layer."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from smartinit.adapters.bare import bare_module_names
from smartinit.adapters.fake_quant import FakeQuantLinear
from smartinit.adapters.host import factor_parameters
from smartinit.adapters.kinds import Conv1D, Linear, low_rank_product, wrap
from smartinit.config import LoraConfig
from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from smartinit.adapters.layer import LoraLayer

KINDS = {"linear": lambda: nn.Linear(6, 10), "conv1d": lambda: TransformersConv1D(10, 6)}


def layer_of(kind: str, *, dtype: torch.dtype = torch.float32, **options: object) -> LoraLayer:
    """A layer 6 -> 10 with one active adapter of rank 3 whose B is random."""
    config = LoraConfig(r=3, **options)
    layer = wrap("x", KINDS[kind]().to(dtype))
    layer.update_layer("default", 3, 6.0, config)
    layer.set_adapter(["default"])
    nn.init.normal_(layer.matrices("default")[1])
    return layer


def weight_of(layer: LoraLayer) -> torch.Tensor:
    """The base layer's weight as (out, in)."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_formula(kind: str, use_rslora: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = layer_of(kind, use_rslora=use_rslora)
    assert (layer.in_features, layer.out_features) == (6, 10)
    a, b = layer.matrices("default")
    scaling = 6 / math.sqrt(3) if use_rslora else 2.0
    x = torch.randn(2, 5, 6)
    expected = (weight_of(layer).double() + scaling * b.double() @ a.double()) @ x.double().mT + layer.bias[:, None]
    assert layer.scaling["default"] == scaling
    torch.testing.assert_close(layer(x).double(), expected.mT, rtol=1e-5, atol=1e-5)


def test_the_default_start(seed: int) -> None:
    torch.manual_seed(seed)
    layer = wrap("x", nn.Linear(64, 10))
    layer.update_layer("default", 16, 8, LoraConfig())
    a, b = layer.matrices("default")
    assert b.count_nonzero() == 0
    assert a.abs().max() <= 1 / 8
    assert a.var().item() == pytest.approx(1 / (3 * 64), rel=0.15)
    layer.reset_lora_parameters("default", "gaussian")
    assert a.std().item() == pytest.approx(1 / 16, rel=0.15)
    layer.reset_lora_parameters("default", False)
    assert b.count_nonzero() == b.numel()


@pytest.mark.parametrize("name", ["eva", "pissa", "loftq"])
def test_a_data_driven_start_is_neutral_until_it_is_written(name: str) -> None:
    layer = wrap("x", nn.Linear(6, 10))
    layer.update_layer("default", 2, 8, LoraConfig(init_lora_weights=name))
    layer.set_adapter(["default"])
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_trained_in_float32(base: torch.dtype, adapter: torch.dtype) -> None:
    layer = layer_of("linear", dtype=base)
    assert {matrix.dtype for matrix in layer.matrices("default")} == {adapter}
    out = layer(torch.randn(3, 6, dtype=base))
    assert out.dtype == base


def test_dropout_acts_in_training_only() -> None:
    layer = layer_of("linear", lora_dropout=0.5)
    x = torch.randn(3, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.update_layer("second", 2, 4, LoraConfig(lora_dropout=0.5))
    assert not layer.lora_dropout["second"].training, "a new adapter follows its layer's mode"


def test_only_active_adapters_count_and_train() -> None:
    layer = layer_of("linear")
    layer.update_layer("second", 2, 4, LoraConfig())
    nn.init.normal_(layer.matrices("second")[1])
    x = torch.randn(3, 6)
    base, outputs = layer.base_layer(x), {}
    for names in ([], ["default"], ["second"], ["default", "second"], ["absent"]):
        layer.set_adapter(names)
        outputs[tuple(names)] = layer(x) - base
        for name in ("default", "second"):
            assert all(matrix.requires_grad == (name in names) for matrix in layer.matrices(name))
    assert outputs[()].count_nonzero() == outputs[("absent",)].count_nonzero() == 0
    torch.testing.assert_close(outputs[("default", "second")], outputs[("default",)] + outputs[("second",)])
    layer.set_adapter(["default"], inference_mode=True)
    assert not any(matrix.requires_grad for matrix in layer.matrices("default"))


def test_an_adapter_leaves_no_trace() -> None:
    layer = layer_of("linear")
    layer.update_layer("second", 2, 4, LoraConfig())
    layer.remove("default")
    layer.remove("default")
    for part in (*layer.adapter_layer_names, *layer.other_param_names):
        assert list(getattr(layer, part)) == ([] if part in ("start", "lora_magnitude_vector") else ["second"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_pefts(kind: str, dtype: torch.dtype, seed: int) -> None:
    peft_layer = pytest.importorskip("peft.tuners.lora.layer")
    from peft import LoraConfig as PeftConfig

    torch.manual_seed(seed)
    ours = layer_of(kind, dtype=dtype, use_rslora=True)
    config = PeftConfig(r=3, lora_alpha=6, use_rslora=True, fan_in_fan_out=kind == "conv1d")
    theirs = peft_layer.Linear(ours.base_layer, "default", config=config, r=3, lora_alpha=6)
    theirs.lora_A["default"].float().weight.data.copy_(ours.matrices("default")[0].data)
    theirs.lora_B["default"].float().weight.data.copy_(ours.matrices("default")[1].data)
    x = torch.randn(2, 5, 6, dtype=dtype)
    results = []
    for layer in (ours, theirs):
        rows = x.clone().requires_grad_()
        out = layer(rows)
        out.square().sum().backward()
        results.append((out, rows.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad))
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2  # ours scales the inner product, PEFT's the outer
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.detach().abs().max()))


def test_state_keys_are_pefts() -> None:
    assert set(layer_of("linear").state_dict()) == {
        "base_layer.weight",
        "base_layer.bias",
        "lora_A.default.weight",
        "lora_B.default.weight",
    }


def test_what_cannot_be_wrapped_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'block.norm' is a LayerNorm"):
        wrap("block.norm", nn.LayerNorm(4))
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        wrap("x", nn.Linear(2, 2)).update_layer("default", 0, 1, LoraConfig())
    assert isinstance(wrap("x", nn.Linear(2, 2)), Linear)


def test_names_before_wrapping(tiny_llama: Callable) -> None:
    model = tiny_llama()
    before = [name for name, _ in model.named_modules() if name]
    attention = model.model.layers[0].self_attn
    attention.q_proj = wrap("q_proj", attention.q_proj)
    attention.q_proj.update_layer("default", 2, 4, LoraConfig())
    assert bare_module_names(model) == before


OTHERS = {
    "conv2d": (lambda: nn.Conv2d(4, 10, (2, 3), stride=(1, 2), padding=1), (2, 4, 6, 7)),
    "embedding": (lambda: nn.Embedding(9, 10, padding_idx=0), None),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_kinds_compute_what_pefts_do(kind: str, dtype: torch.dtype, seed: int) -> None:
    peft_layer = pytest.importorskip("peft.tuners.lora.layer")
    from peft import LoraConfig as PeftConfig

    torch.manual_seed(seed)
    make, size = OTHERS[kind]
    base = make().to(dtype)
    x = torch.randint(0, 9, (2, 5)) if size is None else torch.randn(size, dtype=dtype)
    ours = wrap("x", base)
    ours.update_layer("default", 3, 6.0, LoraConfig(r=3))
    ours.set_adapter(["default"])
    peft_kind = peft_layer.Embedding if size is None else peft_layer.Conv2d
    theirs = peft_kind(base, "default", config=PeftConfig(r=3, lora_alpha=6), r=3, lora_alpha=6)
    pairs = [ours.matrices("default"), factor_parameters(theirs, "default")]
    assert torch.equal(ours(x), base(x))
    for mine, other in zip(*pairs, strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == torch.float32
        nn.init.normal_(mine)
        other.data = mine.detach().clone()
    results = []
    for layer, matrices in zip((ours, theirs), pairs, strict=True):
        y = layer(x)
        y.float().square().mean().backward()
        results.append((y, *(matrix.grad for matrix in matrices)))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))
    assert results[0][0].dtype == dtype
    ours_keys = {key for key in ours.state_dict() if "lora_" in key}
    assert ours_keys == {key for key in theirs.state_dict() if "lora_" in key}


@pytest.mark.parametrize("options", [{"padding": 1, "padding_mode": "circular"}, {"dilation": 2}, {"padding": "same"}])
def test_a_convolution_pads_and_spreads_as_its_base_does(options: dict[str, object], seed: int) -> None:
    torch.manual_seed(seed)
    base = nn.Conv2d(2, 4, 3, bias=False, **options)
    layer = wrap("x", base)
    layer.update_layer("default", 2, 4.0, LoraConfig(r=2))
    layer.set_adapter(["default"])
    a, b = layer.matrices("default")
    nn.init.normal_(b)
    merged = copy.deepcopy(base)
    merged.weight.data += 2.0 * (b.flatten(1) @ a.flatten(1)).view_as(merged.weight)
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(layer(x), merged(x))
    torch.testing.assert_close(
        low_rank_product(base, x, a.flatten(1), b.flatten(1)) * 2.0 + base(x), merged(x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("scale", [2.5, torch.tensor(2.5)])
def test_an_embedding_that_scales_its_output(scale: object) -> None:
    class Scaled(nn.Embedding):
        embed_scale = scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * scale

    layer = wrap("x", Scaled(6, 4))
    layer.update_layer("default", 2, 2.0, LoraConfig(r=2, init_lora_weights=False))
    layer.set_adapter(["default"])
    a, b = layer.matrices("default")
    merged = copy.deepcopy(layer.base_layer)
    merged.weight.data += (b @ a).T
    torch.testing.assert_close(layer(torch.arange(6)), merged(torch.arange(6)))
    assert layer.bias is None


def test_the_default_start_of_an_embedding_is_pefts() -> None:
    layer = wrap("x", nn.Embedding(50, 40))
    layer.update_layer("default", 4, 4.0, LoraConfig(r=4))
    a, b = layer.matrices("default")
    assert a.count_nonzero() == 0
    assert b.std().item() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 4, 1, groups=2), nn.ConvTranspose1d(4, 4, 1), nn.MultiheadAttention(4, 2), nn.LayerNorm(4)]
)
def test_other_modules_are_refused(module: nn.Module) -> None:
    with pytest.raises(ConfigError, match=f"'x' is a {type(module).__name__}; adapters exist for"):
        wrap("x", module)


def test_an_adapter_is_trained_on_a_quantised_layer(seed: int) -> None:
    torch.manual_seed(seed)
    base = FakeQuantLinear.from_linear(nn.Linear(64, 16))
    layer = wrap("x", base)
    layer.update_layer("default", 3, 6.0, LoraConfig(r=3))
    layer.set_adapter(["default"])
    x = torch.randn(4, 64)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    assert layer.matrices("default")[1].grad.count_nonzero() > 0
    assert base.weight.grad is None


def test_a_quantised_layer_is_known_by_its_name_and_sizes() -> None:
    """As quantisation libraries write theirs: no subclass of ``nn.Linear``, and no parameter called weight."""

    class PackedLinear(nn.Module):
        in_features, out_features = 6, 10

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(30, dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_ones(*x.shape[:-1], 10)

    layer = wrap("x", PackedLinear())
    layer.update_layer("default", 2, 2.0, LoraConfig(init_lora_weights=False))
    layer.set_adapter(["default"])
    a, b = layer.matrices("default")
    assert (a.shape, b.shape, a.dtype) == ((2, 6), (10, 2), torch.float32)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), 1 + x @ a.T @ b.T)


def test_what_fan_in_fan_out_says_is_seen_in_the_layer() -> None:
    options = LoraConfig(fan_in_fan_out=True)
    wrap("x", TransformersConv1D(10, 6)).update_layer("default", 2, 2.0, options)
    wrap("x", TransformersConv1D(10, 6)).update_layer("default", 2, 2.0, LoraConfig())
    with pytest.warns(UserWarning, match=r"fan_in_fan_out=True is passed over: a torch\.nn\.Linear"):
        wrap("x", nn.Linear(6, 10)).update_layer("default", 2, 2.0, options)


@pytest.mark.parametrize("module", [nn.Linear(4, 4, bias=False), nn.Conv1d(4, 4, 1, bias=False)])
def test_a_bias_that_cannot_be_merged_is_said(module: nn.Module) -> None:
    with pytest.warns(UserWarning, match=f"adapter of a {type(module).__name__} that has none itself"):
        wrap("x", module).update_layer("default", 2, 2.0, LoraConfig(lora_bias=True))


def test_an_embedding_has_no_bias() -> None:
    layer = wrap("x", nn.Embedding(9, 4))
    with pytest.raises(ConfigError, match="cannot be used with an embedding"):
        layer.update_layer("default", 2, 2.0, LoraConfig(lora_bias=True))
    assert layer.adapters() == []


def test_rows_of_other_adapters_stay_in_the_wider_dtype(seed: int) -> None:
    """Half precision is rounded once, after the adapter was added."""
    torch.manual_seed(seed)
    layer = layer_of("linear", dtype=torch.bfloat16)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    whole, mixed = layer(x), layer(x, adapter_names=["default", "__base__", "default"])
    assert torch.equal(mixed[[0, 2]], whole[[0, 2]])
    assert torch.equal(mixed[1], layer.base_layer(x)[1])
