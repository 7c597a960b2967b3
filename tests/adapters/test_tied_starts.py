"""Starts for layers that have one adapter between them: ``ensure_weight_tying``."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import smartinit as si
from smartinit.adapters.attach import write_factors
from smartinit.config import LoraConfig
from smartinit.errors import ConfigError
from smartinit.factors import Factors
from smartinit.planning.plan import Plan
from tests.adapters.test_merging import assert_close, assert_same, fill, state, tied, tied_factors  # noqa: F401

if TYPE_CHECKING:
    from torch import nn

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def wrapped(base: nn.Module, **options: Any) -> si.LoraModel:
    targets = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    return si.LoraModel(base, LoraConfig(**({"r": 2, "ensure_weight_tying": True} | targets | options))).eval()


def written(model: si.LoraModel, factors: dict[str, Factors], plan: Plan, **options: Any) -> None:
    with pytest.warns(UserWarning, match="2 layers with adapter 'default' had no factors"):  # those of q_proj
        write_factors(model, factors, plan, **options)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("named", [[EMBEDDING, HEAD], [HEAD, EMBEDDING], [EMBEDDING], [HEAD]])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("base", ["residual", "offset"])
def test_a_split_is_written_once(
    base: str,
    rank: int,
    named: list[str],
    tied: nn.Module,  # noqa: F811
    tokens: torch.Tensor,
) -> None:
    expected, original = tied(tokens).logits, state(tied)
    model = wrapped(tied, r=rank)
    names = trained(model)
    factors, plan = tied_factors(model)
    flipped = torch.tensor([1.0, -1.0, 1.0])  # a decomposition of the other layer's weight may have other signs
    head = factors[HEAD]
    factors[HEAD] = Factors(head.a * flipped[:, None], head.b * flipped, effect="splits")
    plan = Plan({name: plan.ranks[name] for name in named}, plan.alphas)
    written(model, {name: factors[name] for name in named}, plan, base=base)
    layers = model.lora_layers()
    product = layers[EMBEDDING].get_delta_weight("default") if base == "residual" else None
    if product is not None:
        assert torch.equal(layers[HEAD].get_delta_weight("default"), product)
        assert_close(layers[EMBEDDING].weight + product, original[f"{EMBEDDING}.weight"], 1e-6)
    assert {(layer.r["default"], layer.scaling["default"]) for layer in layers.values()} >= {(3, 1.0)}
    assert_close(model(tokens).logits, expected, 1e-5)
    assert trained(model) == names, "the head has no matrices of its own"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    fill(model)
    model.set_adapter("default")
    twin, outputs = copy.deepcopy(model), model(tokens).logits
    assert_same(twin.unload(), original)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(merged(tokens).logits, outputs, 1e-5)


@pytest.mark.parametrize(
    ("name", "trains", "matrix"), [(EMBEDDING, "a", "A"), (EMBEDDING, "b", "B"), (HEAD, "a", "B"), (HEAD, "b", "A")]
)
def test_the_matrix_that_is_not_trained(name: str, trains: Any, matrix: str, tied: nn.Module) -> None:  # noqa: F811
    model = wrapped(tied)
    factors, plan = tied_factors(model, effect="shifts")
    written(model, {name: replace(factors[name], trains=trains)}, Plan({name: 3}, plan.alphas))
    model.set_adapter("default")
    kept = f"{EMBEDDING}.lora_embedding_{matrix}.default"
    assert {name for name in trained(model.model) if "embedding" in name or "head" in name} == {kept}


@pytest.mark.parametrize(
    "change",
    [
        lambda pair, plan: (replace(pair, a=pair.a * 1.1), plan),
        lambda pair, plan: (replace(pair, effect="shifts"), plan),
        lambda pair, plan: (pair, replace(plan, alphas=dict(plan.alphas) | {HEAD: 7.0})),
        lambda pair, plan: (
            Factors(pair.a[:2], pair.b[:, :2], effect=pair.effect),
            replace(plan, ranks=dict(plan.ranks) | {HEAD: 2}),
        ),
        lambda pair, plan: (pair, replace(plan, ranks=dict(plan.ranks) | {HEAD: 0})),
        lambda pair, plan: (replace(pair, a=pair.a[:, 1:]), plan),
    ],
)
def test_starts_that_cannot_both_be(change: Any, tied: nn.Module) -> None:  # noqa: F811
    model = wrapped(tied)
    factors, plan = tied_factors(model)
    factors[HEAD], plan = change(factors[HEAD], plan)
    before = state(model)
    with pytest.raises(ConfigError, match=r"'lm_head' has the matrices of 'model\.embed_tokens', transposed"):
        write_factors(model, factors, plan)
    assert_same(model, before)


def test_layers_without_a_start_and_without_rank(tied: nn.Module, tokens: torch.Tensor) -> None:  # noqa: F811
    expected = tied(tokens).logits
    model = wrapped(tied)
    fill(model)
    layer = model.lora_layers()["model.layers.0.self_attn.q_proj"].get_base_layer()
    queries = {f"model.layers.{index}.self_attn.q_proj": 2 for index in (0, 1)}
    pair = Factors(torch.ones(2, layer.in_features), torch.zeros(layer.out_features, 2))
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="2 layers with adapter 'default' had no factors .*: model.embed_tokens, lm_h"):
        write_factors(model, dict.fromkeys(queries, pair), Plan(queries, dict.fromkeys(queries, 2.0)))
    a, b = (getattr(model.lora_layers()[EMBEDDING], f"lora_embedding_{one}")["default"] for one in "AB")
    assert not a.any()
    assert b.abs().max() > 1, "normal, as an embedding's; a linear layer's would be uniform in ±0.18"
    assert_close(model(tokens).logits, expected, 1e-6)

    ranks = queries | {EMBEDDING: 0}
    write_factors(twin, dict.fromkeys(queries, pair), Plan(ranks, dict.fromkeys(ranks, 2.0)))
    assert twin.lora_layers().keys() == queries.keys()
    assert_close(twin(tokens).logits, expected, 1e-6)


@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_computed_starts(method: str, tied: nn.Module, tokens: torch.Tensor) -> None:  # noqa: F811
    expected = tied(tokens).logits
    config = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    artefact = si.compute(tied, config, method)
    model = si.LoraModel(tied, config)
    artefact.apply(model)
    assert_close(model(tokens).logits, expected, 1e-5)
