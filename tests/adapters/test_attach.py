"""Writing factors into models of this package and of PEFT."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from smartinit.adapters import LoraModel, write_factors
from smartinit.adapters.host import find_host
from smartinit.config import LoraConfig
from smartinit.errors import ArtefactError, ConfigError, ModelError, UnknownNameError
from smartinit.factors import Factors
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

# PEFT asks every transformers model for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

HOSTS = ("native", "peft")
NAMES = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(2) for kind in "qkv"]


def wrapped(host: str, base: nn.Module, **options: Any) -> nn.Module:
    """A Llama with adapters on q, k and v."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"], **options}
    low_cpu_mem_usage = options.pop("low_cpu_mem_usage", False)
    if host == "native":
        return LoraModel(base, LoraConfig(**options), low_cpu_mem_usage=low_cpu_mem_usage)
    peft = pytest.importorskip("peft")
    cast = {"autocast_adapter_dtype": options.pop("autocast_adapter_dtype", True)}
    return peft.get_peft_model(base, peft.LoraConfig(**options), low_cpu_mem_usage=low_cpu_mem_usage, **cast)


def add_other(host: str, model: nn.Module) -> None:
    """A second adapter, on q and v, that someone trains at the same time."""
    config = {"r": 3, "target_modules": ["q_proj", "v_proj"]}
    if host == "native":
        model.add_adapter("other", LoraConfig(**config))
    else:
        import peft

        model.add_adapter("other", peft.LoraConfig(**config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".other." in name or parameter.requires_grad)


def example(ranks: dict[str, int], seed: int, *, neutral: bool = False) -> tuple[dict[str, Factors], Plan]:
    """Random factors; k and v have 16 outputs, q has 32."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, rank in ranks.items():
        b = torch.randn(32 if name.endswith("q_proj") else 16, rank, generator=generator)
        factors[name] = Factors(torch.randn(rank, 32, generator=generator), b * (not neutral))
    return factors, Plan(ranks, {name: 2.0 * rank for name, rank in ranks.items()})


def layers_of(model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """Target name -> LoRA layer."""
    return find_host(model).layers(adapter_name)


def picture(model: nn.Module) -> tuple[Any, ...]:
    """Everything that writing might change, objects by identity."""
    host = find_host(model)
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    values = [(name, id(p), p.requires_grad, p.dtype, p.tolist()) for name, p in model.named_parameters()]
    kept = [
        (name, dict(layer.r), dict(layer.lora_alpha), dict(layer.scaling)) for name, layer in layers_of(model).items()
    ]
    return modules, values, kept, [(name, id(c), str(c)) for name, c in host.configs.items()]


RANKS = dict(zip(NAMES, [4, 2, 0, 7, 4, 1], strict=True))


@pytest.mark.parametrize("host", HOSTS)
def test_ranks_alphas_and_values_are_the_plans(host: str, seed: int, tiny_llama: Callable) -> None:
    base = tiny_llama()
    model = wrapped(host, base)
    factors, plan = example(RANKS, seed)
    assert write_factors(model, factors, plan) is model
    layers = layers_of(model)
    assert list(layers) == [name for name, rank in RANKS.items() if rank]
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.equal(a, factors[name].a)
        assert torch.equal(b, factors[name].b)
        assert a.requires_grad
        assert b.requires_grad
        assert layer.r["default"] == RANKS[name]
        assert layer.scaling["default"] == plan.scaling(name) == 2.0
        assert layer.lora_alpha["default"] == plan.alphas[name]
    assert type(base.get_submodule(NAMES[2])) is nn.Linear
    assert sum(p.requires_grad for p in model.parameters()) == 10


@pytest.mark.parametrize("host", HOSTS)
def test_the_model_computes_what_the_factors_say(
    host: str, seed: int, tiny_llama: Callable, tokens: torch.Tensor
) -> None:
    factors, plan = example(RANKS, seed)
    expected = tiny_llama().double()
    for name, pair in factors.items():
        expected.get_submodule(name).weight.data += pair.delta(plan.scaling(name)).double()
    model = write_factors(wrapped(host, tiny_llama()), factors, plan)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=tokens).logits.double(), expected(input_ids=tokens).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("host", HOSTS)
def test_an_alpha_can_change_alone(host: str, seed: int, tiny_llama: Callable) -> None:
    model = wrapped(host, tiny_llama())
    factors, plan = example(dict.fromkeys(NAMES, 4), seed)
    write_factors(model, factors, Plan(plan.ranks, dict.fromkeys(NAMES, 20)))
    for layer in layers_of(model).values():
        assert (layer.scaling["default"], layer.lora_alpha["default"]) == (5.0, 20)
    assert find_host(model).config("default").lora_alpha == 20


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("host", HOSTS)
def test_defect_05_names_of_any_wrapper_match(host: str, prefix: str, seed: int, tiny_llama: Callable) -> None:
    factors, plan = example({f"{prefix}{name}": rank for name, rank in RANKS.items()}, seed)
    model = wrapped(host, tiny_llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing starts by default
        write_factors(model, factors, plan)
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.lora_A["default"].weight, factors[f"{prefix}{name}"].a)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32])
def test_defect_07_the_adapter_has_one_dtype(host: str, base: torch.dtype, seed: int, tiny_llama: Callable) -> None:
    """In PEFT a layer whose rank changes takes the base's dtype, and its neighbours stay float32."""
    model = wrapped(host, tiny_llama(dtype=base))
    write_factors(model, *example(RANKS, seed))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {base}


def test_defect_07_an_adapter_in_half_precision_stays_so(seed: int, tiny_llama: Callable) -> None:
    model = wrapped("peft", tiny_llama(dtype=torch.bfloat16), autocast_adapter_dtype=False)
    write_factors(model, *example(RANKS, seed))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("host", HOSTS)
def test_factors_may_share_memory_but_the_adapter_does_not(host: str, tiny_llama: Callable) -> None:
    shared = torch.randn(4, 32)
    factors = {name: Factors(shared, torch.zeros(32 if "q_proj" in name else 16, 4)) for name in NAMES}
    before = shared.clone()
    model = write_factors(wrapped(host, tiny_llama()), factors, Plan(dict.fromkeys(NAMES, 4), dict.fromkeys(NAMES, 8)))
    with torch.no_grad():
        layers_of(model)[NAMES[0]].lora_A["default"].weight.zero_()
    assert torch.equal(shared, before)
    assert torch.equal(layers_of(model)[NAMES[1]].lora_A["default"].weight, before)


@pytest.mark.parametrize("host", HOSTS)
def test_layers_without_factors_start_by_default_with_one_warning(host: str, seed: int, tiny_llama: Callable) -> None:
    model = wrapped(host, tiny_llama())
    for layer in layers_of(model).values():
        nn.init.ones_(layer.lora_B["default"].weight)
    ranks = {name: rank for name, rank in RANKS.items() if "layers.1" in name}
    with pytest.warns(UserWarning, match=r"3 layers .*layers\.0\.self_attn\.q_proj, ") as caught:
        write_factors(model, *example(ranks, seed))
    assert len(caught) == 1
    for name, layer in layers_of(model).items():
        if "layers.0" in name:
            assert layer.lora_B["default"].weight.count_nonzero() == 0
            assert layer.lora_A["default"].weight.count_nonzero() > 0
            assert layer.r["default"] == 4
    assert len(layers_of(model)) == 6


@pytest.mark.parametrize("host", HOSTS)
def test_weights_on_the_meta_device_are_made(host: str, seed: int, tiny_llama: Callable) -> None:
    model = wrapped(host, tiny_llama(dtype=torch.bfloat16), low_cpu_mem_usage=True)
    some = {name: rank for name, rank in RANKS.items() if "layers.1" in name}
    factors, plan = example(some, seed)
    with pytest.warns(UserWarning, match="3 layers"):
        write_factors(model, factors, plan)
    for name, layer in layers_of(model).items():
        assert not any(p.is_meta for p in layer.parameters())
        assert layer.lora_A["default"].weight.dtype == torch.float32
        if name in some:
            assert torch.equal(layer.lora_A["default"].weight, factors[name].a)


@pytest.mark.parametrize("host", HOSTS)
def test_other_adapters_and_modes_are_left_alone(host: str, seed: int, tiny_llama: Callable) -> None:
    model = wrapped(host, tiny_llama(), lora_dropout=0.25)
    add_other(host, model)
    model.eval()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters() if ".other." in name}
    assert len(before) == 8
    write_factors(model, *example(RANKS, seed))
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters() if ".other." in n} == before
    assert NAMES[2] not in layers_of(model)
    assert NAMES[2] in layers_of(model, "other"), "the layer stays for the other adapter"
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("host", HOSTS)
def test_frozen_adapters_stay_frozen(host: str, seed: int, tiny_llama: Callable) -> None:
    model = wrapped(host, tiny_llama())
    model.requires_grad_(False)
    write_factors(model, *example(RANKS, seed))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("host", HOSTS)
def test_a_parameter_of_unchanged_rank_stays_the_same_object(host: str, seed: int, tiny_llama: Callable) -> None:
    model = wrapped(host, tiny_llama())
    weight = layers_of(model)[NAMES[0]].lora_A["default"].weight
    write_factors(model, *example(RANKS, seed))
    assert layers_of(model)[NAMES[0]].lora_A["default"].weight is weight


@pytest.mark.parametrize("host", HOSTS)
def test_the_configuration_says_what_is_in_the_model(host: str, seed: int, tiny_llama: Callable) -> None:
    from smartinit.targets.patterns import alpha_for, match_module, rank_for

    model = wrapped(host, tiny_llama(), layers_to_transform=[0, 1])
    former = find_host(model).config("default")
    write_factors(model, *example(RANKS, seed))
    config = find_host(model).config("default")
    assert type(config) is type(former)
    assert config.layers_to_transform is None, "the names say it"
    assert former.r == 4, "configurations that others hold are not written to"
    assert (config.r, config.lora_alpha) == (7, 14)
    read = LoraConfig.from_any(config)
    for name, rank in RANKS.items():
        assert match_module(read, name) is bool(rank)
        if rank:
            assert (rank_for(read, name), alpha_for(read, name)) == (rank, 2 * rank)
    assert len(config.rank_pattern) == 3


@pytest.mark.parametrize("host", HOSTS)
def test_writing_twice_is_writing_once(host: str, seed: int, tiny_llama: Callable) -> None:
    model = wrapped(host, tiny_llama())
    factors, plan = example(RANKS, seed)
    write_factors(model, factors, plan)
    config = str(find_host(model).config("default"))
    write_factors(model, factors, plan)  # the layer of rank 0 is gone already
    assert str(find_host(model).config("default")) == config
    assert list(layers_of(model)) == [name for name, rank in RANKS.items() if rank]


# --- errors leave everything as it was -----------------------------------------------------------------------------


def bad(what: str, seed: int) -> tuple[dict[str, Factors], Plan]:
    """Factors that do not fit; what is good comes first."""
    factors, plan = example(RANKS, seed)
    last = NAMES[-1]
    ranks, alphas = dict(plan.ranks), dict(plan.alphas)
    if what == "width":
        factors[last] = Factors(torch.zeros(1, 48), torch.zeros(16, 1))
    elif what == "height":
        factors[last] = Factors(torch.zeros(1, 32), torch.zeros(32, 1))
    elif what == "rank":
        factors[last] = Factors(torch.zeros(3, 32), torch.zeros(16, 3))
    elif what == "missing":
        del factors[last]
    elif what in {"unknown", "unadapted"}:
        name = "model.layers.9.self_attn.q_proj" if what == "unknown" else "model.layers.0.mlp.up_proj"
        ranks[name] = alphas[name] = 1
        factors[name] = Factors(torch.zeros(1, 32), torch.zeros(48, 1))
    elif what == "nothing left":
        ranks = dict.fromkeys(ranks, 0)
    return factors, Plan(ranks, alphas, use_rslora=what == "rslora")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("width", ArtefactError, r"A of layer '.*1.self_attn.v_proj' has shape \(1, 48\), but \(1, 32\) is needed"),
        ("height", ArtefactError, r"B of layer '.*1.self_attn.v_proj' has shape \(32, 1\), but \(16, 1\) is needed"),
        ("rank", ArtefactError, r"\(3, 32\), but \(1, 32\)"),
        ("missing", ArtefactError, r"gives layer '.*v_proj' rank 1, but there are no factors"),
        ("unknown", UnknownNameError, r"no layer 'model.layers.9.self_attn.q_proj'"),
        ("unadapted", UnknownNameError, r"layer 'model.layers.0.mlp.up_proj' has no adapter 'default'"),
        ("nothing left", ConfigError, "all 6 layers have rank 0"),
        ("rslora", ConfigError, "use_rslora=True"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    host: str, what: str, error: type[Exception], message: str, seed: int, tiny_llama: Callable
) -> None:
    model = wrapped(host, tiny_llama())
    before = picture(model)
    with pytest.raises(error, match=message):
        write_factors(model, *bad(what, seed))
    assert picture(model) == before


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("low_cpu_mem_usage", "step"), [(False, 1), (False, 3), (True, 1), (True, 5)])
def test_an_error_in_the_middle_of_writing_is_undone(
    host: str, low_cpu_mem_usage: bool, step: int, seed: int, tiny_llama: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(host, tiny_llama(dtype=torch.bfloat16), low_cpu_mem_usage=low_cpu_mem_usage)
    add_other(host, model)
    before = picture(model) if not low_cpu_mem_usage else None
    modules = [(name, id(module)) for name, module in model.named_modules()]
    config = find_host(model).config("default")
    kind = type(layers_of(model)[NAMES[0]])
    update, calls = kind.update_layer, []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        calls.append(self)
        if len(calls) == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(kind, "update_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_factors(model, *example(RANKS, seed))
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert find_host(model).config("default") is config
    if before is not None:
        assert picture(model) == before


def test_a_plain_model_must_be_wrapped_first(seed: int, tiny_llama: Callable) -> None:
    with pytest.raises(ModelError, match=r"wrap it first, with smartinit\.LoraModel.*or peft\.get_peft_model"):
        write_factors(tiny_llama(), *example(RANKS, seed))
    with pytest.raises(UnknownNameError, match="no adapter 'other'; it has: default"):
        write_factors(wrapped("native", tiny_llama()), *example(RANKS, seed), adapter_name="other")


# --- other hosts ---------------------------------------------------------------------------------------------------


def test_the_hosts_of_adapters(tiny_llama: Callable) -> None:
    peft = pytest.importorskip("peft")
    native, theirs = wrapped("native", tiny_llama()), wrapped("peft", tiny_llama())
    assert find_host(native).prefix == ""
    assert find_host(theirs).prefix == "base_model.model."
    injected = tiny_llama()
    injected.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    for model, root in (
        (native, native.model),
        (theirs, theirs.get_base_model()),
        (theirs.base_model, theirs.get_base_model()),
        (injected, injected),
        (nn.DataParallel(native), native.model),
        (nn.DataParallel(theirs), theirs.get_base_model()),
    ):
        assert find_host(model).root is root, type(model)
        assert list(find_host(model).layers("default")) == NAMES


def test_a_model_with_injected_adapters(seed: int, tiny_llama: Callable) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"]))
    factors, plan = example(RANKS, seed)
    write_factors(model, factors, plan)
    assert {name: layer.r["default"] for name, layer in layers_of(model).items()} == {
        n: r for n, r in RANKS.items() if r
    }


def test_layers_around_embeddings_start_by_default(seed: int, tiny_llama: Callable) -> None:
    model = wrapped("peft", tiny_llama(), target_modules=["q_proj", "k_proj", "v_proj", "embed_tokens"])
    with pytest.warns(UserWarning, match=r"1 layers .*embed_tokens"):
        write_factors(model, *example(RANKS, seed))
    assert "model.embed_tokens" in find_host(model).config("default").target_modules


def test_dora_magnitudes_follow_their_layer(seed: int, tiny_llama: Callable, tokens: torch.Tensor) -> None:
    base = tiny_llama()
    with torch.no_grad():
        before = base(input_ids=tokens).logits
        model = write_factors(wrapped("peft", base, use_dora=True), *example(RANKS, seed, neutral=True))
        torch.testing.assert_close(model(input_ids=tokens).logits, before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert sum(p.requires_grad for p in model.parameters()) == 15
