"""What writing does to the base layers: splits, offsets, quantised bases, shared weights, DoRA, and undoing it all."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from smartinit.adapters import LoraModel, write_factors
from smartinit.adapters.host import factor_parameters, find_host
from smartinit.adapters.start import start_of
from smartinit.config import LoraConfig
from smartinit.errors import ArtefactError, ConfigError, ModelError
from smartinit.factors import Factors
from smartinit.planning.plan import Plan
from smartinit.targets.weight import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# PEFT asks every transformers model for a property that transformers has renamed, and warns of tied weights.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
]

HOSTS = ("native", "peft")
BASES = ("residual", "offset")
TIED = r"ignore:an adapter trains a layer whose weight is tied:UserWarning"


class ConvNet(nn.Module):
    """Convolutions, an embedding and a linear layer."""

    def __init__(self, **conv: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 6, padding_idx=0)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, (3, 2), stride=(2, 1), bias=False, **conv)
        self.head = nn.Linear(6, 5)

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.embed(input_ids)[:, None]
        x = self.second(torch.relu(self.first(x)))
        return type("Output", (), {"logits": self.head(x.mean(-1).mT)})


def conv_net(*, dtype: torch.dtype = torch.float32, seed: int = 0, **conv: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvNet(**conv).to(dtype).eval()


TARGETS = {
    "llama": ["q_proj", "down_proj", "lm_head", "embed_tokens"],
    "gpt2": ["c_attn", "c_fc"],
    "conv": ["embed", "first", "second", "head"],
}


@pytest.fixture
def make(tiny_llama: Callable, tiny_gpt2: Callable) -> Callable[..., nn.Module]:
    """A model of one of the kinds in `TARGETS`."""
    kinds = {"llama": tiny_llama, "gpt2": tiny_gpt2, "conv": conv_net}
    return lambda kind, **options: kinds[kind](**options)


def wrapped(host: str, model: nn.Module, targets: Iterable[str], **options: Any) -> nn.Module:
    options = {"r": 3, "lora_alpha": 6, "target_modules": list(targets), **options}
    low_cpu_mem_usage = options.pop("low_cpu_mem_usage", False)
    if host == "native":
        return LoraModel(model, LoraConfig(**options), low_cpu_mem_usage=low_cpu_mem_usage)
    peft = pytest.importorskip("peft")
    cast = options.pop("autocast_adapter_dtype", True)
    options["fan_in_fan_out"] = type(model).__name__.startswith("GPT2")
    return peft.get_peft_model(
        model, peft.LoraConfig(**options), autocast_adapter_dtype=cast, low_cpu_mem_usage=low_cpu_mem_usage
    )


def layers_of(model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    return find_host(model).layers(adapter_name)


def weight_of(layer: Any) -> torch.Tensor:
    """W (out, in) of a LoRA layer's base, by the definition of each kind of layer."""
    base = layer.get_base_layer()
    weight = base.weight.detach()
    if isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D":
        return weight.T
    return weight.flatten(1)


def principal(
    model: nn.Module,
    rank: int = 3,
    alpha: float = 6.0,
    *,
    use_rslora: bool = False,
    effect: str = "splits",
    **more: Any,
) -> tuple[dict[str, Factors], Plan]:
    """PiSSA's factors (arXiv 2404.02948, eq. 2-3) of every layer with an adapter."""
    scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
    factors = {}
    for name, layer in layers_of(model).items():
        u, s, vh = torch.linalg.svd(weight_of(layer).double(), full_matrices=False)
        root = (s[:rank] / scaling).sqrt()
        factors[name] = Factors((root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float(), effect, **more)
    return factors, Plan(dict.fromkeys(factors, rank), dict.fromkeys(factors, alpha), use_rslora)


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def assert_same_function(ours: torch.Tensor, base: torch.Tensor, dtype: torch.dtype) -> None:
    """Two layers of rounding in a row, relative to the size of the outputs."""
    error = (ours.double() - base.double()).norm() / base.double().norm()
    assert error <= (2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = bits(model)
    assert list(now) == list(before)
    for name, tensor in now.items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


# --- the function is preserved --------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("host", HOSTS)
def test_a_split_model_computes_what_its_base_did(
    host: str, kind: str, dtype: torch.dtype, base: str, make: Callable, tokens: torch.Tensor
) -> None:
    model = make(kind, dtype=dtype)
    before = logits(model, tokens)
    model = wrapped(host, model, TARGETS[kind])
    factors, plan = principal(model)
    originals = {name: weight_of(layer).clone() for name, layer in layers_of(model).items()}
    assert write_factors(model, factors, plan, base=base) is model
    after = logits(model, tokens)
    assert after.dtype == before.dtype
    assert_same_function(after, before, dtype)
    for name, layer in layers_of(model).items():
        a, b = (p.detach().flatten(1) for p in factor_parameters(layer, "default"))
        given_up = 2.0 * b.double() @ a.double() if base == "residual" else torch.zeros_like(originals[name]).double()
        residual = originals[name].double() - given_up
        one_rounding = residual.abs() * torch.finfo(dtype).eps * 0.501 + torch.finfo(dtype).smallest_normal
        assert ((weight_of(layer).double() - residual).abs() <= one_rounding + 1e-7 * (dtype != torch.float32)).all()
        assert b.count_nonzero()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_any_scaling(host: str, use_rslora: bool, base: str, make: Callable, tokens: torch.Tensor) -> None:
    model = make("llama")
    before = logits(model, tokens)
    model = wrapped(host, model, TARGETS["llama"], use_rslora=use_rslora)
    write_factors(model, *principal(model, 5, 7.0, use_rslora=use_rslora), base=base)
    assert_same_function(logits(model, tokens), before, torch.float32)


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_left_without_the_adapter(host: str, make: Callable, tokens: torch.Tensor) -> None:
    """The residual, as in PEFT, and what our `unload` makes of it; with an offset the original, to the bit."""
    plain = make("llama")
    before, weights = logits(plain, tokens), bits(plain)
    for base in BASES:
        model = wrapped(host, make("llama"), ["q_proj", "down_proj"])
        write_factors(model, *principal(model), base=base)
        with model.disable_adapter():
            disabled = logits(model, tokens)
        assert torch.equal(disabled, before) is (base == "offset")
        unloaded = model.unload()
        if base == "offset" or host == "native":
            assert_same_bits(unloaded, weights)
        else:
            assert torch.equal(logits(unloaded, tokens), disabled)


def test_a_shifted_start_leaves_the_base_alone(make: Callable, tokens: torch.Tensor) -> None:
    plain = make("llama")
    weights = bits(plain)
    model = wrapped("native", plain, ["q_proj", "down_proj"])
    write_factors(model, *principal(model, effect="shifts"))
    assert not torch.equal(logits(model, tokens), logits(make("llama"), tokens))
    assert all(start_of(layer, "default") is None for layer in layers_of(model).values())
    assert_same_bits(model.unload(), weights)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("host", HOSTS)
def test_a_quantised_base_takes_the_weights_place(host: str, kind: str, make: Callable) -> None:
    model = wrapped(host, make(kind), TARGETS[kind])
    factors, plan = principal(model, effect="quantises")
    rounded = {name: (weight_of(layer) * 8).round() / 8 for name, layer in layers_of(model).items()}
    factors = {n: Factors(p.a, p.b, "quantises", base=rounded[n]) for n, p in factors.items()}
    write_factors(model, factors, plan)
    for name, layer in layers_of(model).items():
        assert torch.equal(weight_of(layer), rounded[name])
        assert torch.equal(factor_parameters(layer, "default")[0].flatten(1), factors[name].a)
    with pytest.raises(ConfigError, match="quantises its base weight, so base='offset'"):
        write_factors(model, factors, plan, base="offset")


def test_a_wrong_quantised_base_is_refused(make: Callable) -> None:
    model = wrapped("native", make("gpt2"), ["c_attn"])
    factors, plan = principal(model)
    before = bits(model)
    for wrong, message in ((torch.zeros(24, 72), "its new base weight is"), (torch.full((72, 24), math.nan), "fit")):
        broken = {n: Factors(p.a, p.b, "quantises", base=wrong) for n, p in factors.items()}
        with pytest.raises(ModelError, match=message):
            write_factors(model, broken, plan)
        assert_same_bits(model, before)


@pytest.mark.parametrize("host", HOSTS)
def test_defect_13_factors_are_rounded_before_the_residual_is_taken(
    host: str, make: Callable, tokens: torch.Tensor
) -> None:
    """A bf16 adapter on a bf16 base: PEFT subtracts what the adapter does not hold."""
    peft = pytest.importorskip("peft")
    plain = make("llama", dtype=torch.bfloat16)
    targets = ["q_proj", "up_proj", "down_proj"]
    config = {"r": 8, "lora_alpha": 8, "target_modules": targets}
    theirs = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(**config, init_lora_weights="pissa"), autocast_adapter_dtype=False
    )
    ours = wrapped(host, copy.deepcopy(plain), targets, r=8, lora_alpha=8)
    ours.to(torch.bfloat16)
    write_factors(ours, *principal(ours, 8, 8.0))

    def error(model: nn.Module) -> float:
        total = 0.0
        for name, layer in layers_of(model).items():
            a, b = (p.detach().double() for p in factor_parameters(layer, "default"))
            original = plain.get_submodule(name).weight.detach().double()
            total += (weight_of(layer).double() + b @ a - original).square().sum().item()
        return math.sqrt(total)

    rounding = math.sqrt(sum((weight_of(x).double() * 2**-9).square().sum().item() for x in layers_of(ours).values()))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert error(ours) <= rounding
    assert error(ours) <= 0.8 * error(theirs)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("host", HOSTS)
def test_defect_14_a_split_with_low_cpu_mem_usage(
    host: str, kind: str, base: str, make: Callable, tokens: torch.Tensor
) -> None:
    model = make(kind)
    before = logits(model, tokens)
    model = wrapped(host, model, TARGETS[kind], low_cpu_mem_usage=True)
    assert any(p.is_meta for p in model.parameters())
    write_factors(model, *principal(model), base=base)
    assert not any(p.is_meta for p in model.parameters())
    assert_same_function(logits(model, tokens), before, torch.float32)


# --- an offset ------------------------------------------------------------------------------------------------------


def trained(model: nn.Module, seed: int) -> nn.Module:
    """The adapter's matrices after something that stands for training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("host", HOSTS)
def test_offset_and_residual_train_alike(host: str, kind: str, make: Callable, tokens: torch.Tensor, seed: int) -> None:
    models = []
    for base in BASES:
        model = wrapped(host, make(kind), TARGETS[kind])
        write_factors(model, *principal(model), base=base)
        models.append(trained(model, seed))
    residual, offset = (model(input_ids=tokens).logits for model in models)
    assert (residual - logits(make(kind), tokens)).norm() > 0.01 * residual.norm()
    torch.testing.assert_close(residual, offset, rtol=1e-4, atol=1e-5)
    residual.square().mean().backward()
    offset.square().mean().backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in models]
    assert gradients[0].keys() == gradients[1].keys()
    assert all("lora_" in name for name in gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
def test_what_was_given_up_does_not_follow_a_later_scaling(host: str, make: Callable, tokens: torch.Tensor) -> None:
    results = []
    for base in BASES:
        model = wrapped(host, make("llama"), TARGETS["llama"])
        write_factors(model, *principal(model), base=base)
        for layer in layers_of(model).values():
            layer.scaling["default"] *= 1.5
        results.append(logits(model, tokens))
    assert (results[0] - logits(make("llama"), tokens)).norm() > 0.01 * results[0].norm()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_peft_merges_an_offset_adapter_as_it_computes(
    kind: str, safe_merge: bool, make: Callable, tokens: torch.Tensor, seed: int
) -> None:
    model = wrapped("peft", make(kind), TARGETS[kind])
    write_factors(model, *principal(model), base="offset")
    trained(model, seed)
    before = logits(model, tokens)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(logits(merged, tokens), before, rtol=1e-4, atol=1e-5)
    assert not any("LessStart" in type(module).__name__ for module in merged.modules())


@pytest.mark.parametrize("host", HOSTS)
def test_an_offset_survives_copies_pickles_and_state_dicts(
    host: str, make: Callable, tokens: torch.Tensor, seed: int
) -> None:
    model = wrapped(host, make("conv"), TARGETS["conv"])
    write_factors(model, *principal(model), base="offset")
    trained(model, seed)
    before = logits(model, tokens)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(copied, tokens), before)
    for layer in layers_of(copied).values():
        again = pickle.loads(pickle.dumps(layer))  # noqa: S301  (our own)
        assert type(again) is type(layer)
        assert again.start["default"].equals(layer.start["default"].a, layer.start["default"].b, 2.0)
    if host == "native":  # in PEFT it would be saved with the adapter
        for buffer in model.buffers():
            buffer.zero_()
        assert sum(".start." in name for name in copied.state_dict()) == 8
    model.load_state_dict(copied.state_dict())
    assert torch.equal(logits(model, tokens), before)
    assert not any("start" in name for name, _ in model.named_parameters())
    halves = copied.to(torch.bfloat16)
    assert {buffer.dtype for name, buffer in halves.named_buffers() if ".start." in name} == {torch.bfloat16}


def test_a_deleted_adapter_takes_its_offset_along(make: Callable, tokens: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    plain = make("llama")
    model = wrapped("peft", plain, ["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    base = logits(make("llama"), tokens)
    write_factors(model, *principal(model), base="offset")
    with pytest.warns(UserWarning, match="Adapter default was active"):
        model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model, tokens), base)
    assert not any(layer.start for layer in layers_of(model, "other").values())


def test_only_the_active_adapters_offset_is_subtracted(make: Callable, tokens: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    base = logits(make("llama"), tokens)
    for host in HOSTS:
        model = wrapped(host, make("llama"), ["q_proj"])
        kind = LoraConfig if host == "native" else peft.LoraConfig
        model.add_adapter("other", kind(r=2, target_modules=["q_proj"]))
        write_factors(model, *principal(model), base="offset")
        model.set_adapter("other")
        assert torch.equal(logits(model, tokens), base)
        model.set_adapter("default")
        assert_same_function(logits(model, tokens), base, torch.float32)


def test_rows_of_a_batch_with_adapters_of_their_own(make: Callable, tokens: torch.Tensor, seed: int) -> None:
    peft = pytest.importorskip("peft")
    model = wrapped("peft", make("llama"), ["q_proj", "embed_tokens"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    write_factors(model, *principal(model), base="offset")
    trained(model, seed).eval()
    expected = []
    for row, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        expected.append(logits(model, tokens[row : row + 1])[0])
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=["default", "other"]).logits
        base = model(input_ids=tokens, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(base[0], logits(make("llama"), tokens)[0], rtol=1e-4, atol=1e-5)


def test_pefts_file_of_an_offset_adapter_holds_lora_only(make: Callable, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    model = wrapped("peft", make("llama"), ["q_proj"])
    write_factors(model, *principal(model), base="offset")
    model.save_pretrained(tmp_path)
    assert all("lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


# --- a weight that several modules use ------------------------------------------------------------------------------


@pytest.mark.filterwarnings(TIED)
def test_defect_27_a_tied_weight_is_split_once(tiny_llama: Callable, tokens: torch.Tensor) -> None:
    """Embedding and head give up the same product (each in its own orientation), and the weight gives it up once."""
    for host in HOSTS:
        model = tiny_llama(tie_word_embeddings=True)
        before, weight = logits(model, tokens), model.lm_head.weight.detach().clone()
        model = wrapped(host, model, ["lm_head", "embed_tokens"])
        factors, plan = principal(model)
        head = factors["lm_head"]
        factors["model.embed_tokens"] = Factors(head.b.T.contiguous(), head.a.T.contiguous(), "splits")
        write_factors(model, factors, plan)
        shared = layers_of(model)["lm_head"].get_base_layer().weight
        assert shared is layers_of(model)["model.embed_tokens"].get_base_layer().weight
        torch.testing.assert_close(weight - shared, head.delta(2.0), rtol=1e-4, atol=1e-6)
        assert_same_function(logits(model, tokens), before, torch.float32)


def test_defect_27_replicated_layers_are_split_once(tiny_llama: Callable, tokens: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    plain = tiny_llama()
    replicated = {"layer_replication": [[0, 2], [0, 2]], "target_modules": ["q_proj", "down_proj"]}
    model = peft.get_peft_model(plain, peft.LoraConfig(r=3, lora_alpha=6, **replicated))
    before = logits(model, tokens)
    factors, plan = principal(model)
    assert len(factors) == 8
    originals = {name: weight_of(layer).clone() for name, layer in layers_of(model).items()}
    write_factors(model, factors, plan)
    assert_same_function(logits(model, tokens), before, torch.float32)
    for name, layer in layers_of(model).items():
        torch.testing.assert_close(originals[name] - weight_of(layer), factors[name].delta(2.0), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize("host", HOSTS)
def test_defect_27_tied_layers_with_different_starts_are_refused(host: str, tiny_llama: Callable) -> None:
    model = wrapped(host, tiny_llama(tie_word_embeddings=True), ["lm_head", "embed_tokens"])
    factors, plan = principal(model)
    head = factors["lm_head"]
    before = bits(model)
    for other in (
        Factors(head.b.T, head.a.T * 1.01, "splits"),
        Factors(head.b.T, head.a.T, "keeps"),
        Factors(head.b.T, head.a.T, "quantises", base=torch.zeros(32, 64)),
    ):
        with pytest.raises(ConfigError, match=r"share"):
            write_factors(model, factors | {"model.embed_tokens": other}, plan)
        assert_same_bits(model, before)
    write_factors(
        model, factors | {"model.embed_tokens": Factors(head.b.T, head.a.T * 1.01, "splits")}, plan, base="offset"
    )


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize("host", HOSTS)
def test_defect_27_a_tied_weight_is_not_split_behind_the_embeddings_back(
    host: str, tiny_llama: Callable, tokens: torch.Tensor
) -> None:
    model = wrapped(host, tiny_llama(tie_word_embeddings=True), ["lm_head", "q_proj"])
    before, output = bits(model), logits(model, tokens)
    with pytest.raises(ConfigError, match=r"'lm_head' shares its weight with 'model\.embed_tokens\.weight'.*offset"):
        write_factors(model, *principal(model))
    assert_same_bits(model, before)
    write_factors(model, *principal(model), base="offset")
    assert_same_function(logits(model, tokens), output, torch.float32)


@pytest.mark.parametrize("host", HOSTS)
def test_defect_27_a_module_in_two_places_and_a_transposed_weight(host: str) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6)
            self.two = nn.Sequential(self.one)

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 6)
            self.two.weight = nn.Parameter(self.one.weight.detach().T)

    for kind in (Shared, Transposed):
        model = wrapped(host, kind(), ["one"])
        before = bits(model)
        with pytest.raises(ConfigError, match=r"'one' shares its weight with 'two(\.0)?\.weight'"):
            write_factors(model, *principal(model))
        assert_same_bits(model, before)


# --- DoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_dora_starts_where_the_base_was(
    kind: str, low_cpu_mem_usage: bool, dtype: torch.dtype, make: Callable, tokens: torch.Tensor
) -> None:
    model = make(kind, dtype=dtype)
    before = logits(model, tokens)
    model = wrapped("peft", model, TARGETS[kind], use_dora=True, low_cpu_mem_usage=low_cpu_mem_usage)
    norms = {name: weight_of(layer).float().norm(dim=1) for name, layer in layers_of(model).items()}
    factors, plan = principal(model, 4)  # another rank than it was made with
    write_factors(model, factors, plan)
    assert_same_function(logits(model, tokens), before, dtype)
    for name, layer in layers_of(model).items():
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert magnitude.dtype == torch.float32
        assert magnitude.requires_grad
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(magnitude.flatten(), norms[name], rtol=tolerance, atol=0)


def test_doras_magnitudes_are_renewed_in_place(make: Callable, tokens: torch.Tensor) -> None:
    model = wrapped("peft", make("llama"), TARGETS["llama"], use_dora=True)
    kept = {name: layer.lora_magnitude_vector["default"].weight for name, layer in layers_of(model).items()}
    for magnitude in kept.values():
        nn.init.ones_(magnitude)
    write_factors(model, *principal(model))
    assert_same_function(logits(model, tokens), logits(make("llama"), tokens), torch.float32)
    for name, layer in layers_of(model).items():
        assert layer.lora_magnitude_vector["default"].weight is kept[name]


def test_doras_magnitudes_can_be_given_and_stay_the_same_objects(make: Callable) -> None:
    for kind, targets in TARGETS.items():
        model = wrapped("peft", make(kind), targets, use_dora=True)
        kept = {name: layer.lora_magnitude_vector["default"].weight for name, layer in layers_of(model).items()}
        factors, plan = principal(model)
        factors = {
            name: Factors(p.a, p.b, "splits", magnitude=torch.arange(1.0, len(p.b) + 1)) for name, p in factors.items()
        }
        write_factors(model, factors, plan)
        for name, layer in layers_of(model).items():
            magnitude = layer.lora_magnitude_vector["default"].weight
            assert magnitude is kept[name]
            assert magnitude.flatten().tolist() == list(range(1, len(factors[name].b) + 1))


def test_dora_with_an_offset_is_refused(make: Callable) -> None:
    model = wrapped("peft", make("llama"), ["q_proj"], use_dora=True)
    before = bits(model)
    with pytest.raises(ConfigError, match=r"DoRA.*use base='residual'"):
        write_factors(model, *principal(model), base="offset")
    assert_same_bits(model, before)


# --- which matrices are trained -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trains", "expected"), [("a", (True, False)), ("b", (False, True)), ("both", (True, True))])
@pytest.mark.parametrize("host", HOSTS)
def test_one_matrix_can_be_frozen(host: str, trains: str, expected: tuple[bool, bool], make: Callable) -> None:
    model = wrapped(host, make("conv"), TARGETS["conv"])
    factors, plan = principal(model)
    for one, want in ((trains, expected), ("both", (True, True)), (trains, expected)):
        written = {n: Factors(p.a, p.b, "keeps", trains=one) for n, p in factors.items()}
        write_factors(model, written, plan)
        for layer in layers_of(model).values():
            assert tuple(p.requires_grad for p in factor_parameters(layer, "default")) == want
    kind = LoraConfig if host == "native" else pytest.importorskip("peft").LoraConfig
    model.add_adapter("other", kind(r=2, target_modules=TARGETS["conv"]))
    model.set_adapter("other")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "default" in n)
    model.set_adapter("default")
    for layer in layers_of(model).values():
        assert tuple(p.requires_grad for p in factor_parameters(layer, "default")) == expected


# --- writing again, and other adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_a_base_is_split_once_however_often_it_is_written(host: str, make: Callable, tokens: torch.Tensor) -> None:
    model = wrapped(host, make("llama"), ["q_proj", "down_proj"])
    factors, plan = principal(model)
    write_factors(model, factors, plan)
    before = bits(model)
    write_factors(trained(model, 0), factors, plan)  # the same start again
    assert_same_bits(model, before)
    neutral = {n: Factors(p.a, p.b * 0) for n, p in factors.items()}
    other, _ = principal(model)  # of the residual
    some = Plan({n: 3 * ("q_proj" in n) for n in factors}, dict.fromkeys(factors, 6.0))
    for what, plan_, base in ((neutral, plan, "residual"), (other, plan, "residual"), (factors, plan, "offset")):
        with pytest.raises(ConfigError, match="given up the start of adapter 'default' already"):
            write_factors(model, what, plan_, base=base)
        assert_same_bits(model, before)
    with pytest.raises(ConfigError, match="given up the start"):
        write_factors(model, factors, some)
    assert_same_bits(model, before)


@pytest.mark.parametrize("host", HOSTS)
def test_an_offset_can_be_replaced(host: str, make: Callable, tokens: torch.Tensor) -> None:
    plain = make("llama")
    before = logits(plain, tokens)
    model = wrapped(host, plain, ["q_proj", "down_proj"])
    factors, plan = principal(model)
    for rank in (3, 5):
        write_factors(model, *principal(model, rank), base="offset")
        assert_same_function(logits(model, tokens), before, torch.float32)
    write_factors(model, {n: Factors(p.a, p.b * 0) for n, p in factors.items()}, plan)
    assert torch.equal(logits(model, tokens), before)
    write_factors(model, *principal(model))  # the base is still the original
    assert_same_function(logits(model, tokens), before, torch.float32)


@pytest.mark.parametrize("host", HOSTS)
def test_a_residual_would_change_what_other_adapters_compute(host: str, make: Callable) -> None:
    model = wrapped(host, make("llama"), ["q_proj"])
    if host == "native":
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    else:
        import peft

        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = bits(model)
    with pytest.raises(ConfigError, match=r"would change what its adapter 'other' computes.*base='offset'"):
        write_factors(model, *principal(model))
    assert_same_bits(model, before)


def test_what_peft_split_itself_is_not_split_again(make: Callable) -> None:
    model = wrapped("peft", make("llama"), ["q_proj"], init_lora_weights="pissa")
    before = bits(model)
    with pytest.raises(ConfigError, match=r"init_lora_weights='pissa'; make the adapter with init_lora_weights=True"):
        write_factors(model, *principal(model))
    assert_same_bits(model, before)


# --- errors leave every bit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("step", [1, 4])
def test_ctrl_c_in_the_middle_of_a_split_is_undone(
    host: str, kind: str, base: str, step: int, make: Callable, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(host, make(kind), TARGETS[kind])
    factors, plan = principal(model, 4)
    before, output = bits(model), logits(model, tokens)
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    names = [(layer.adapter_layer_names, layer.other_param_names) for layer in layers_of(model).values()]
    config = find_host(model).config("default")
    calls = []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == step:
            raise KeyboardInterrupt
        if base == "residual":
            genuine(*args)

    if base == "residual":
        from smartinit.adapters import base_weight

        monkeypatch.setattr("smartinit.adapters.weight_change._BLOCK", 100)  # several blocks in a weight
        genuine = base_weight._write
        monkeypatch.setattr(base_weight, "_write", interrupted)
    else:
        monkeypatch.setattr("smartinit.adapters.attach.set_magnitude", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_factors(model, factors, plan, base=base)
    assert len(calls) == step
    monkeypatch.undo()
    assert_same_bits(model, before)
    assert [(name, id(module), type(module)) for name, module in model.named_modules()] == modules
    assert [(x.adapter_layer_names, x.other_param_names) for x in layers_of(model).values()] == names
    assert find_host(model).config("default") is config
    assert torch.equal(logits(model, tokens), output)
    write_factors(model, factors, plan, base=base)
    assert_same_function(logits(model, tokens), logits(make(kind), tokens), torch.float32)


@pytest.mark.parametrize("host", HOSTS)
def test_fp16_that_would_overflow_is_refused(host: str, make: Callable) -> None:
    model = wrapped(host, make("llama", dtype=torch.float16), ["q_proj", "down_proj"])
    factors, plan = principal(model)
    name = list(factors)[-1]
    factors[name] = Factors(factors[name].a * 3000, factors[name].b * 3000, "splits")
    before = bits(model)
    with pytest.raises(ModelError, match=rf"base weight of '{name}' does not fit into float16.*bfloat16.*offset"):
        write_factors(model, factors, plan)
    assert_same_bits(model, before)


def test_factors_that_overflow_the_adapter_are_refused(make: Callable) -> None:
    model = wrapped("native", make("llama"), ["q_proj"]).to(torch.float16)
    factors, plan = principal(model)
    name = list(factors)[-1]
    factors[name] = Factors(factors[name].a * 1e9, factors[name].b, "splits")
    before = bits(model)
    with pytest.raises(ArtefactError, match=rf"A of layer '{name}' holds NaN or Inf as float16"):
        write_factors(model, factors, plan, base="offset")
    assert_same_bits(model, before)


@pytest.mark.parametrize("host", HOSTS)
def test_weights_that_cannot_give_anything_up(host: str, make: Callable) -> None:
    name = "model.layers.1.self_attn.q_proj"

    def broken(change: Callable[[nn.Linear], None]) -> nn.Module:
        model = make("llama")
        change(model.get_submodule(name))
        return model

    def nan(layer: nn.Linear) -> None:
        layer.weight.data[3, 4] = math.nan

    def packed(layer: nn.Linear) -> None:
        layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)

    good = make("llama")
    factors, plan = principal(wrapped("native", good, ["q_proj"]))
    for change, message in (
        (nan, rf"weight of '{name}' holds NaN or Inf"),
        (packed, rf"weight of '{name}' \(Linear\) cannot be read"),
    ):
        model = wrapped(host, broken(change), ["q_proj"])
        before = bits(model)
        with pytest.raises(ModelError, match=message):
            write_factors(model, factors, plan)
        assert_same_bits(model, before)
        write_factors(model, factors, plan, base="offset")  # needs no weight


def test_pefts_convolutions_that_pad_otherwise_are_refused(tokens: torch.Tensor) -> None:
    """PEFT's A has neither the base layer's dilation nor its padding mode: its product would be another."""
    for options in ({"padding_mode": "reflect", "padding": 1}, {"dilation": (2, 1)}):
        model = wrapped("peft", conv_net(**options), ["second"])
        with pytest.raises(ConfigError, match=r"'second' is a convolution with .*LoraModel"):
            write_factors(model, *principal(model))
        for base in BASES:
            plain = conv_net(**options)
            before = logits(plain, tokens)
            ours = wrapped("native", plain, ["second"])
            write_factors(ours, *principal(ours), base=base)
            assert_same_function(logits(ours, tokens), before, torch.float32)


def test_channels_last_is_kept(tokens: torch.Tensor) -> None:
    plain = conv_net().to(memory_format=torch.channels_last)
    before = logits(plain, tokens)
    model = wrapped("native", plain, ["second"])
    write_factors(model, *principal(model))
    assert_same_function(logits(model, tokens), before, torch.float32)
    assert plain.second.weight.is_contiguous(memory_format=torch.channels_last)


def test_work_space_does_not_grow_with_the_layer() -> None:
    from smartinit.adapters.weight_change import _BLOCK, blocks

    stored = torch.empty(1).expand(100_000, 4096)
    found = list(blocks(stored))
    assert all((rows.stop - rows.start) * 4096 <= _BLOCK for rows in found)
    assert (found[0].start, found[-1].stop) == (0, len(stored))
    assert all(one.stop == two.start for one, two in itertools.pairwise(found))


def test_no_warning_when_all_layers_are_written(make: Callable) -> None:
    model = wrapped("native", make("conv"), TARGETS["conv"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_factors(model, *principal(model))
    assert Target.of(model.model.embed.base_layer, "embed").shape == (6, 64)
