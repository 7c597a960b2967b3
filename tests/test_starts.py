"""Starts end to end where weights, data or wishes are odd: one clear sentence, or a sound result."""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from torch import nn

import smartinit as si
from smartinit.errors import ConfigError, DataError, ModelError, SmartinitError
from smartinit.formats.convert import recompress

SEED = int(os.environ.get("SMARTINIT_TEST_SEED", "0"))
FROM_MOMENTS = ("corda", "output_pca", "lora_null")
FROM_WEIGHTS = ("pissa", "olora", "milora", "mica", "loram", "loftq")
NAME = "model.layers.0.self_attn.o_proj"


def make_model(**changes: object) -> nn.Module:
    torch.manual_seed(SEED)
    values = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
        "initializer_range": 0.2,
    } | changes  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()


def make_batches(count: int = 4, length: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (count, 4, length), generator=torch.Generator().manual_seed(SEED))
    return [{"input_ids": batch, "labels": batch} for batch in ids]


def config(method: str | bool, r: int = 4, **more: object) -> si.LoraConfig:
    more = {"target_modules": ["o_proj", "down_proj"]} | more
    return si.LoraConfig(r=r, lora_alpha=r, init_lora_weights=method, **more)


def start(model: nn.Module, method: str, batches: object = None, **more: object) -> si.Artefact:
    data = make_batches() if batches is None else batches
    return si.compute(model, config(method, **more), data, show_progress_bar=False)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_batches(1)[0]).logits.double()


def preserved(model: nn.Module, artefact: si.Artefact) -> float:
    """Relative change of the outputs when the start is applied."""
    before = logits(model)
    wrapped = si.LoraModel(model, si.LoraConfig(r=4, lora_alpha=4, target_modules=["o_proj", "down_proj"]))
    artefact.apply(wrapped)
    return float((logits(wrapped) - before).norm() / before.norm())


@pytest.mark.parametrize("method", [*FROM_MOMENTS, "eva"])
def test_constant_and_duplicated_features(method):
    model, name = make_model(), "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:8] = 0.0
        model.model.embed_tokens.weight[:, 8:16] = model.model.embed_tokens.weight[:, 16:24]
    wanted = logits(model)
    artefact = start(model, method, make_batches(8), target_modules=["q_proj"])
    assert torch.isfinite(artefact.factors[name].a).all()
    assert torch.isfinite(artefact.factors[name].b).all()
    wrapped = artefact.apply(si.LoraModel(model, config(True, target_modules=["q_proj"])))
    assert (logits(wrapped) - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("method", FROM_MOMENTS)
def test_a_singular_covariance(method):
    model = make_model()
    with torch.no_grad():  # four tokens are all there is: the moment has rank 4 of 32
        model.model.embed_tokens.weight[4:] = model.model.embed_tokens.weight[:4].repeat(15, 1)
    assert preserved(model, start(model, method, make_batches(8))) < 1e-4


@pytest.mark.parametrize("method", FROM_WEIGHTS + FROM_MOMENTS)
def test_a_weight_of_zeros(method):
    model = make_model()
    nn.init.zeros_(model.get_submodule(NAME).weight)
    if method == "loram":  # it matches the magnitude of the weight, and there is none
        with pytest.raises(SmartinitError, match=rf"{NAME}.*zero"):
            start(model, method)
        return
    artefact = start(model, method)
    pair = artefact.factors[NAME]
    assert torch.isfinite(pair.a).all()
    assert (pair.b @ pair.a).abs().max() < 1e-6
    assert preserved(model, artefact) < (0.5 if method == "loftq" else 1e-4)


@pytest.mark.parametrize("method", FROM_WEIGHTS)
def test_leading_columns_that_depend_on_each_other(method):
    model = make_model()
    with torch.no_grad():
        weight = model.get_submodule(NAME).weight
        weight[:, 1:4] = weight[:, :1]
    artefact = start(model, method)
    assert torch.isfinite(artefact.factors[NAME].b).all()
    assert preserved(model, artefact) < (0.5 if method == "loftq" else 1e-4)


@pytest.mark.parametrize("options", [{"corda_method": "kpm"}, None], ids=["corda kpm", "lora_null"])
def test_fewer_tokens_than_features_is_refused_with_the_number_needed(options):
    method = "lora_null" if options is None else "corda"
    with pytest.raises(SmartinitError, match=r"32|48"):
        start(make_model(), method, make_batches(1, 6), init_options=options or {})


@pytest.mark.parametrize("method", ["corda", "output_pca"])
def test_fewer_tokens_than_features_is_enough_for_the_leading_directions(method):
    model = make_model()
    assert preserved(model, start(model, method, make_batches(1, 6))) < 1e-4


@pytest.mark.parametrize("method", ["lora_ga", "lora_one"])
def test_gradients_that_are_all_zero_are_refused(method):
    batches = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in make_batches()]
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError):
        start(model, method, batches)
    with pytest.raises(DataError, match="zero"):
        si.compute(
            model, config(method), make_batches(), loss_fn=lambda output, _: output.logits.sum() * 0.0,
            show_progress_bar=False,
        )  # fmt: skip
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", ["pissa", "corda"])
def test_what_overflows_in_half_precision_is_refused_and_nothing_changes(method):
    model = make_model()
    artefact = start(model, method)
    huge = {name: si.Factors(pair.a * 3e4, pair.b * 3e4, pair.effect) for name, pair in artefact.factors.items()}
    half = make_model().half()
    wrapped = si.LoraModel(half, config(True))
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    from smartinit.adapters import write_factors

    with pytest.raises(SmartinitError, match=r"float16|overflow|half"):
        write_factors(wrapped, huge, artefact.plan)
    after = wrapped.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("method", ["pissa", "corda", "loftq"])
def test_quantised_weights_are_refused_where_the_originals_are_needed(method):
    from smartinit.adapters.fake_quant import FakeQuantLinear

    model = make_model()
    model.set_submodule(NAME, FakeQuantLinear.from_linear(model.get_submodule(NAME), bits=4))
    with pytest.raises(ModelError, match=rf"'{NAME}'.*unquantised"):
        start(model, method)


@pytest.mark.parametrize("method", FROM_WEIGHTS)
def test_nan_weights_are_named(method):
    model = make_model()
    model.get_submodule(NAME).weight.data[3, 5] = float("nan")
    with pytest.raises(SmartinitError, match=f"'{NAME}' holds NaN or Inf"):
        start(model, method)


def test_options_of_the_method():
    with pytest.raises(ConfigError, match=r"'corda' has no option 'corda_metod'.*closest: 'corda_method'"):
        start(make_model(), "corda", init_options={"corda_metod": "kpm"})
    with pytest.raises(ConfigError, match="frozen_a leaves nothing to train"):
        start(make_model(), "mica", frozen_a=True)
    from smartinit.methods.pissa import Pissa

    with pytest.raises(ConfigError, match="give the options to one of them"):
        si.compute(make_model(), config("pissa", init_options={"oversampling": 2}), method=Pissa())
    finished = si.compute(make_model(), config(True), method=Pissa(iterations=2), show_progress_bar=False)
    named = si.compute(make_model(), config("pissa_niter_2"), show_progress_bar=False)
    assert finished.recipe.options == named.recipe.options
    assert torch.equal(finished.factors[NAME].a, named.factors[NAME].a)


def test_a_frozen_a_is_not_trained():
    model = make_model()
    artefact = start(model, "eva", frozen_a=True)
    wrapped = artefact.apply(si.LoraModel(model, config(True)))
    trained = {name.rsplit(".", 3)[1] for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained == {"lora_B"}


def test_a_matched_gain_is_that_of_loras_own_start():
    model = make_model()
    plain, matched = (start(model, "eva", match_gain=gain) for gain in (None, "kaiming"))
    for name, layer in matched.layers.items():
        assert layer.gain is not None
        assert layer.gain.relative == pytest.approx(1.0, rel=1e-3)
        assert plain.layers[name].gain.relative > 1.5


@pytest.mark.parametrize("method", ["eva", "pissa"])
def test_ranks_from_a_captured_share(method):
    artefact = si.compute(
        make_model(), config(method), make_batches(8), captured=0.5, max_rank=32, show_progress_bar=False
    )
    for name, layer in artefact.layers.items():
        rank = artefact.plan.ranks[name]
        assert sum(layer.ratios[:rank]) >= 0.5 - 1e-9
        assert sum(layer.ratios[: rank - 1]) < 0.5


@pytest.mark.parametrize("method", ["pissa", "output_pca", "corda", "lora_ga"])
def test_planning_by_variance_takes_layers_out(method):
    artefact = start(make_model(), method, alpha_pattern={"o_proj": 3})
    moved = si.compute(
        make_model(), config(method), make_batches(), planner="variance", budget=5, show_progress_bar=False
    )
    assert sum(artefact.plan.ranks.values()) == 8
    assert sum(moved.plan.ranks.values()) == 5
    assert not moved.verify()


@pytest.mark.parametrize("method", ["gaussian", "mica", "milora", "lora_null", "olora", "loram"])
@pytest.mark.parametrize("wish", [{"planner": "variance"}, {"captured": 0.5}], ids=["variance", "captured"])
def test_ranks_by_shares_are_refused_where_there_are_none(method, wish):
    with pytest.raises(ConfigError, match="gives ranks by shares of a spectrum, which"):
        si.compute(make_model(), config(method), make_batches(), show_progress_bar=False, **wish)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("eva", {"whiten": "False"}, "true or false"),
        ("olora", {"pivoted": "no"}, "true or false"),
        ("pissa", {"iterations": 2.5}, "a whole number or null"),
        ("corda", {"corda_method": True}, "text"),
        ("lora_one", {"stable_gamma": "64"}, "a number"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(method, options, expected):
    with pytest.raises(ConfigError, match=f"'{method}' is .*; expected {expected}"):
        start(make_model(), method, init_options=options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("corda", {"corda_method": "kmp"}),
        ("corda", {"balance": "odd"}),
        ("lora_ga", {"direction": "ArC"}),
        ("lora_ga", {"scale": "stabel"}),
        ("loftq", {"bits": 3}),
        ("loftq", {"quantiser": "nf5"}),
        ("pissa", {"iterations": -1}),
    ],
)
def test_values_that_an_option_does_not_have_are_refused(method, options):
    (value,) = options.values()
    with pytest.raises(ConfigError, match=str(value)):
        start(make_model(), method, init_options=options)


def test_layers_that_cannot_capture_the_share_are_named():
    with pytest.warns(UserWarning, match=r"2 of 2 layers do not reach captured=0.99 .*'model.layers.0"):
        si.compute(make_model(), config("pissa"), captured=0.99, max_rank=6, show_progress_bar=False)


def test_defect_10_merging_adapters_decomposes_nothing_again():
    peft = pytest.importorskip("peft")
    model = make_model()
    artefact = start(model, "pissa")
    wanted = logits(model)
    wrapped = peft.get_peft_model(model, config(True).to_peft()).eval()
    artefact.apply(wrapped)
    other = config(True).to_peft()
    wrapped.add_adapter("other", other)
    weights = {n: p.clone() for n, p in wrapped.named_parameters() if ".base_layer." in n}
    wrapped.add_weighted_adapter(["default", "other"], [1.0, 0.0], "merged", combination_type="cat")
    assert all(torch.equal(p, weights[n]) for n, p in wrapped.named_parameters() if n in weights)
    wrapped.set_adapter("merged")
    assert (logits(wrapped) - wanted).norm() < 1e-4 * wanted.norm()


def test_defect_25_a_product_is_recompressed_without_being_formed():
    generator = torch.Generator().manual_seed(SEED)
    a, b = torch.randn(12, 4000, generator=generator), torch.randn(3000, 12, generator=generator)
    shapes: list[tuple[int, ...]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            shapes.extend(tuple(t.shape) for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t))
            return out

    with Watch():
        small = recompress(si.Factors(a, b, "splits"), 4)
    assert not any(min(shape) > 100 for shape in shapes if len(shape) == 2), "a matrix of the layer's size was made"
    left, _ = torch.linalg.qr(b.double())
    right, _ = torch.linalg.qr(a.double().T)
    best = torch.linalg.svdvals(left.T @ b.double() @ a.double() @ right)
    error = torch.linalg.matrix_norm(b.double() @ a.double() - small.b.double() @ small.a.double())
    assert float(error) == pytest.approx(float(best[4:].norm()), rel=1e-4)
