"""Adapters on quantised models: our own layers everywhere, bitsandbytes' where it is installed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import smartinit as si
from smartinit.adapters import dequantise
from smartinit.adapters.dequantise import dequantised_weight, is_quantised, register_dequantiser, weight_by_probing
from smartinit.adapters.fake_quant import FakeQuantLinear
from smartinit.errors import ArgumentError, MissingFileError, ModelError, UnknownNameError
from smartinit.linalg.quantisers import Quantiser
from smartinit.quantised import replace_lora_weights_loftq
from smartinit.targets import Target
from tests.oracles import loftq as oracle

TARGETS = ["q_proj", "v_proj", "down_proj"]


def quantise_(model: nn.Module, bits: int = 4) -> nn.Module:
    """Every linear layer but the head, as a quantising loader leaves it."""
    for name, module in list(model.named_modules()):
        if (isinstance(module, nn.Linear) or hasattr(module, "nf")) and name != "lm_head":
            model.set_submodule(name, FakeQuantLinear.from_linear(module, bits))
    return model


@pytest.fixture
def original(tiny_llama):
    """The model before it is quantised."""
    return tiny_llama(hidden_size=64, intermediate_size=96)


@pytest.fixture
def folder(original, tmp_path):
    original.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    return tmp_path / "model"


@pytest.fixture(params=["smartinit", "peft"])
def wrap(request):
    """Wraps a model with adapters."""
    if request.param == "smartinit":
        return lambda model, **options: si.LoraModel(model, si.LoraConfig(**options))
    peft = pytest.importorskip("peft")
    return lambda model, **options: peft.get_peft_model(model, peft.LoraConfig(**options))


@pytest.fixture
def quantised(original):
    return quantise_(copy.deepcopy(original))


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with adapters, by their names in the base model."""
    return {
        name.removeprefix("base_model.").removeprefix("model."): m
        for name, m in model.named_modules()
        if hasattr(m, "lora_A")
    }


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("options", [dict(lora_alpha=4), dict(lora_alpha=16), dict(lora_alpha=3, use_rslora=True)])
def test_every_layer_gets_the_best_correction(original, quantised, folder, wrap, options):
    """Defect 24 again: s·B A is the correction whatever alpha is."""
    model = wrap(quantised, r=4, target_modules=TARGETS, **options)
    assert replace_lora_weights_loftq(model, folder) is model
    layers = lora_layers(model)
    assert len(layers) == 6
    for name, layer in layers.items():
        weight = original.get_submodule(name).weight.detach()
        quantised_weight = oracle.quantise_blocks(weight, oracle.NF4)
        torch.testing.assert_close(dequantised_weight(layer.base_layer).double(), quantised_weight, rtol=0, atol=1e-6)
        best = oracle.best_correction(weight.double() - quantised_weight, 4)
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        assert (layer.scaling["default"] * b @ a - best).norm() < 1e-4 * best.norm(), name


def test_the_model_comes_closer_to_the_original(original, quantised, folder, wrap):
    tokens = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = original(tokens).logits
        before = (quantised(tokens).logits - exact).norm()
        model = wrap(quantised, r=16, lora_alpha=32, target_modules="all-linear")
        replace_lora_weights_loftq(model, folder)
        inner = model if hasattr(model, "get_base_model") else model.model
        after = (inner(tokens).logits - exact).norm()
    assert before > 0
    assert after < 0.75 * before


def test_rejected_layers_get_back_what_they_had(quantised, folder, wrap):
    model = wrap(quantised, r=4, target_modules=TARGETS)
    start = weights_of(model)
    seen = []

    def callback(given, name):
        assert given is model
        layer = lora_layers(model)[name]
        assert layer.lora_B["default"].weight.any()  # it is called after the replacement
        seen.append(name)
        return "v_proj" in name

    replace_lora_weights_loftq(model, folder, callback=callback)
    assert len(seen) == 6
    assert seen == list(lora_layers(model))
    for name, value in weights_of(model).items():
        assert torch.equal(value, start[name]) == ("v_proj" not in name), name


def test_a_callback_makes_it_greedy(original, quantised, folder, wrap):
    """The example of PEFT's documentation: keep what brings the logits closer."""
    tokens = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    model = wrap(quantised, r=4, target_modules=TARGETS)
    with torch.no_grad():
        exact = original(tokens).logits

    @torch.no_grad()
    def distance() -> float:
        inner = model if hasattr(model, "get_base_model") else model.model
        return float((inner(tokens).logits - exact).norm())

    best = [distance()]

    def callback(_model, _name):
        now = distance()
        if now < best[-1]:
            best.append(now)
            return True
        return False

    replace_lora_weights_loftq(model, folder, callback=callback)
    assert len(best) > 1
    assert distance() == best[-1] < best[0]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_the_adapter_as_it_was(quantised, folder, wrap, error):
    model = wrap(quantised, r=4, target_modules=TARGETS)
    start = weights_of(model)
    calls = []

    def callback(_model, name):
        calls.append(name)
        if len(calls) == 3:
            raise error
        return True

    with pytest.raises(type(error)):
        replace_lora_weights_loftq(model, folder, callback=callback)
    after = weights_of(model)
    assert all(torch.equal(after[name], value) for name, value in start.items())


def test_the_folder_is_found_through_the_model(folder, wrap):
    from transformers import AutoModelForCausalLM

    model = wrap(quantise_(AutoModelForCausalLM.from_pretrained(folder)), r=4, target_modules=TARGETS)
    replace_lora_weights_loftq(model)
    assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(model).values())


def test_a_model_that_comes_from_nowhere(quantised, wrap):
    model = wrap(quantised, r=4, target_modules=TARGETS)
    with pytest.raises(ModelError, match="does not say where it was loaded from"):
        replace_lora_weights_loftq(model)
    with pytest.raises(MissingFileError, match="does not exist"):
        replace_lora_weights_loftq(model, "/no/such/folder")


def test_files_saved_without_the_head(original, quantised, tmp_path, wrap):
    """The names in them lack the base model's prefix."""
    original.model.save_pretrained(tmp_path)
    model = wrap(quantised, r=4, target_modules=TARGETS)
    assert "layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "model.safetensors")
    replace_lora_weights_loftq(model, tmp_path)
    assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(model).values())


def test_files_of_another_model(quantised, tiny_llama, tmp_path, wrap):
    tiny_llama(hidden_size=64, intermediate_size=80).save_pretrained(tmp_path / "narrow")
    tiny_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=1).save_pretrained(tmp_path / "short")
    model = wrap(quantised, r=4, target_modules=TARGETS)
    start = weights_of(model)
    with pytest.raises(ModelError, match=r"down_proj' is \(64, 80\), the quantised layer's \(64, 96\).*another model"):
        replace_lora_weights_loftq(model, tmp_path / "narrow")
    with pytest.raises(UnknownNameError, match=r"no tensor 'model\.layers\.1"):
        replace_lora_weights_loftq(model, tmp_path / "short")
    after = weights_of(model)
    assert all(torch.equal(after[name], value) for name, value in start.items())


def test_files_that_are_quantised_themselves(quantised, folder, tmp_path, wrap):
    tensors = {}
    for name in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]:
        tensors[name] = torch.zeros(8, 1, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    model = wrap(quantised, r=4, target_modules=TARGETS)
    with pytest.raises(ModelError, match=r"torch\.uint8, so it is quantised itself; pass the folder of the original"):
        replace_lora_weights_loftq(model, tmp_path)


def test_a_model_that_is_not_quantised_or_has_no_adapter(original, quantised, folder, wrap):
    model = wrap(original, r=4, target_modules=TARGETS)
    with pytest.raises(ModelError, match="no layer of adapter 'default' is around a quantised one"):
        replace_lora_weights_loftq(model, folder)
    with pytest.raises(ModelError, match="has no adapter"):
        replace_lora_weights_loftq(quantised, folder)
    model = wrap(quantised, r=4, target_modules=TARGETS)
    with pytest.raises(UnknownNameError, match="no adapter 'other'"):
        replace_lora_weights_loftq(model, folder, "other")


def test_only_the_named_adapter_and_only_quantised_layers_change(original, folder, wrap):
    quantised = copy.deepcopy(original)
    for layer in quantised.model.layers:
        layer.self_attn.q_proj = FakeQuantLinear.from_linear(layer.self_attn.q_proj, 8)
    model = wrap(quantised, r=4, target_modules=TARGETS)
    peft_config = model.peft_config["default"]
    model.add_adapter("second", peft_config.copy() if hasattr(peft_config, "copy") else copy.deepcopy(peft_config))
    start = weights_of(model)
    replace_lora_weights_loftq(model, folder, adapter_name="second")
    changed = {name for name, value in weights_of(model).items() if not torch.equal(value, start[name])}
    assert len(changed) == 4
    assert all("q_proj" in name and ".second." in name for name in changed)


def test_progress_goes_to_stderr(quantised, folder, wrap, capfd):
    replace_lora_weights_loftq(wrap(quantised, r=2, target_modules=TARGETS), folder)
    out, err = capfd.readouterr()
    assert out == ""
    assert "loftq" in err
    assert "6/6" in err


def test_conv1d_weights_are_stored_transposed(tmp_path, seed):
    """A square one cannot be told from its shape: the quantised layer says what it was."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=32, n_embd=64, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    original = GPT2LMHeadModel(config).eval()
    original.save_pretrained(tmp_path)
    model = si.LoraModel(
        quantise_(copy.deepcopy(original)), si.LoraConfig(r=4, target_modules=["attn.c_proj", "c_attn"])
    )
    replace_lora_weights_loftq(model, tmp_path)
    for name, layer in lora_layers(model).items():
        weight = original.get_submodule(name).weight.detach().T
        error = weight - dequantised_weight(layer.base_layer)
        best = oracle.best_correction(error, 4)
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert (delta.double() - best).norm() < 1e-4 * best.norm(), name


def test_dora_starts_neutral(quantised, folder):
    """The magnitude is the norm of the corrected rows, not of what the default start had."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(quantised, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for layer in lora_layers(model).values():  # PEFT cannot make DoRA for layers that it does not know
        layer.lora_magnitude_vector["default"] = nn.Linear(1, layer.out_features, bias=False)
        layer.lora_magnitude_vector["default"].weight = nn.Parameter(torch.zeros(layer.out_features))
    replace_lora_weights_loftq(model, folder)
    for layer in lora_layers(model).values():
        merged = dequantised_weight(layer.base_layer) + layer.scaling["default"] * (
            layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        )
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, merged.norm(dim=1))


class TestFakeQuantLinear:
    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("name", ["bitsandbytes", "normal", "uniform"])
    def test_it_computes_with_the_quantised_weight(self, bits, name, seed):
        torch.manual_seed(seed)
        linear = nn.Linear(50, 23)
        before = copy.deepcopy(linear.state_dict())
        layer = FakeQuantLinear.from_linear(linear, bits, name)
        expected = Quantiser(bits, name)(linear.weight)
        assert torch.equal(layer.dequantise(), expected)
        x = torch.randn(3, 2, 50, requires_grad=True)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, expected, linear.bias))
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad[0, 0], expected.sum(0))
        assert all(torch.equal(before[key], value) for key, value in linear.state_dict().items())

    def test_it_is_small(self):
        layer = FakeQuantLinear.from_linear(nn.Linear(256, 128, bias=False))
        size = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
        assert size == 256 * 128 * (0.5 + 4 / 64)
        assert not layer.weight.requires_grad

    def test_state_dict_round_trip(self, seed):
        torch.manual_seed(seed)
        layer = FakeQuantLinear.from_linear(nn.Linear(30, 20))
        other = FakeQuantLinear(30, 20)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.dequantise(), layer.dequantise())
        assert torch.equal(copy.deepcopy(layer).dequantise(), layer.dequantise())

    def test_a_change_of_dtype_does_not_round_the_scales(self, seed):
        torch.manual_seed(seed)
        layer = FakeQuantLinear.from_linear(nn.Linear(64, 20))
        before = layer.dequantise()
        layer.to(torch.bfloat16)
        assert torch.equal(layer.dequantise(), before)
        assert layer(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_other_layers_are_refused(self):
        with pytest.raises(ArgumentError, match="Embedding cannot be quantised"):
            FakeQuantLinear.from_linear(nn.Embedding(4, 4))
        with pytest.raises(ModelError, match="quantised already"):
            FakeQuantLinear.from_linear(FakeQuantLinear.from_linear(nn.Linear(8, 8)))
        broken = nn.Linear(8, 8)
        broken.weight.data[0, 0] = float("nan")
        with pytest.raises(ModelError, match="NaN"):
            FakeQuantLinear.from_linear(broken)

    def test_it_is_a_target_whose_weight_cannot_be_read(self):
        """A method that needs the original is refused with the way out."""
        target = Target.of(FakeQuantLinear.from_linear(nn.Linear(12, 8)), "fc")
        assert (target.shape, target.host, target.is_readable) == ((8, 12), "linear", False)
        with pytest.raises(ModelError, match=r"'fc' \(FakeQuantLinear\) cannot be read.*load the model unquantised"):
            target.weight()
        assert "bits=4" in repr(target.module)


@pytest.mark.parametrize("method", ["pissa", "loftq", "olora"])
def test_methods_that_need_the_original_refuse_a_quantised_model(quantised, method):
    with pytest.raises(ModelError, match=r"q_proj.*FakeQuantLinear.*load the model unquantised"):
        si.compute(quantised, si.LoraConfig(init_lora_weights=method, r=4, target_modules=["q_proj"]))


class TestDequantising:
    def test_a_plain_layer_is_no_quantised_one(self):
        assert not is_quantised(nn.Linear(4, 4))
        with pytest.raises(
            ModelError, match=r"a Linear is no quantised layer of a known kind \(.*register_dequantiser"
        ):
            dequantised_weight(nn.Linear(4, 4))

    @pytest.mark.parametrize("bias", [True, False])
    def test_packed_layers_are_read_by_probing(self, bias, seed, monkeypatch):
        """GPTQ and AWQ: a layout of their own, and a forward pass that knows it."""
        monkeypatch.setattr(dequantise, "_PROBE_ROWS", 5)
        torch.manual_seed(seed)

        class PackedLinear(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.in_features, self.out_features = 12, 7
                self.qweight = nn.Parameter(torch.randint(-8, 8, (12, 7), dtype=torch.int8), requires_grad=False)
                self.register_buffer("scales", torch.rand(7))
                self.bias = nn.Parameter(torch.randn(7)) if bias else None

            def forward(self, x):
                return x @ (self.qweight * self.scales) + (0 if self.bias is None else self.bias)

        layer = PackedLinear()
        assert is_quantised(layer)
        found = dequantised_weight(layer)
        assert found.shape == (7, 12)
        assert not found.requires_grad
        torch.testing.assert_close(found, (layer.qweight * layer.scales).T, rtol=0, atol=1e-6)

    def test_probing_serves_any_linear_layer(self, seed):
        torch.manual_seed(seed)
        linear = nn.Linear(9, 5)
        torch.testing.assert_close(weight_by_probing(linear), linear.weight, rtol=0, atol=1e-6)

    def test_hqq_and_torchao_are_known_by_their_looks(self):
        class HqqLinear(nn.Module):
            W_q = None
            in_features, out_features = 3, 2

            def dequantize(self):
                return torch.ones(2, 3)

        assert torch.equal(dequantised_weight(HqqLinear()), torch.ones(2, 3))

        class Packed(torch.Tensor):
            def dequantize(self):
                return torch.full((2, 3), 2.0)

        Packed.__module__ = "torchao.quantization.somewhere"
        layer = nn.Linear(3, 2)
        layer._parameters.pop("weight")
        layer.weight = torch.zeros(2, 3).as_subclass(Packed)
        assert torch.equal(dequantised_weight(layer), torch.full((2, 3), 2.0))

    def test_a_layer_whose_library_is_missing(self):
        class Params4bit(nn.Parameter):
            quant_state = object()

        layer = nn.Linear(3, 2)
        layer.weight = Params4bit(torch.zeros(3, 1), requires_grad=False)
        layer.weight.__class__ = Params4bit
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            with pytest.raises(ImportError, match=r"Linear \(bitsandbytes 4-bit\) cannot be read here: No module"):
                dequantised_weight(layer)
        else:
            pytest.skip("bitsandbytes is installed")

    def test_a_wrong_shape_is_said(self, monkeypatch):
        monkeypatch.setattr(dequantise, "_KINDS", list(dequantise._KINDS))

        class OddLinear(nn.Linear):
            pass

        register_dequantiser("odd", lambda m: isinstance(m, OddLinear), lambda m: m.weight.T)
        assert is_quantised(OddLinear(3, 3))
        with pytest.raises(ModelError, match=r"OddLinear \(odd\) came out as \(3, 2\) instead of \(2, 3\)"):
            dequantised_weight(OddLinear(3, 2))


class TestBitsandbytes:
    """Its real layers, on the GPU if there is one, else on the CPU."""

    @pytest.fixture
    def bnb(self):
        return pytest.importorskip("bitsandbytes")

    @pytest.fixture
    def device(self):
        return "cuda" if torch.cuda.is_available() else "cpu"

    def layer(self, bnb, bits: int, linear: nn.Linear, device: str) -> nn.Module:
        if bits == 4:
            layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False)
        return layer.to(device)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_weights_are_those_of_our_format(self, bnb, bits, device, seed):
        torch.manual_seed(seed)
        linear = nn.Linear(64, 32, bias=False)
        layer = self.layer(bnb, bits, linear, device)
        expected = Quantiser(bits, double=bits == 4)(linear.weight)
        found = dequantised_weight(layer)
        torch.testing.assert_close(found.float().cpu(), expected, rtol=0, atol=2e-4)
        layer(torch.randn(2, 64, device=device))  # the scales move to another place in the first forward pass
        torch.testing.assert_close(dequantised_weight(layer), found)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_replacement_in_a_whole_model(self, bnb, bits, original, folder, wrap, device):
        quantised = copy.deepcopy(original)
        for layer in quantised.model.layers:
            layer.self_attn.q_proj = self.layer(bnb, bits, layer.self_attn.q_proj, device)
        model = wrap(quantised.to(device), r=4, lora_alpha=16, target_modules=["q_proj"])
        replace_lora_weights_loftq(model, folder)
        for name, layer in lora_layers(model).items():
            weight = original.get_submodule(name).weight.detach()
            best = oracle.best_correction(weight - dequantised_weight(layer.base_layer).cpu(), 4)
            delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            assert (delta.double().cpu() - best).norm() < 1e-3 * best.norm()
