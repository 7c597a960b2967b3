"""Megatron's fused names and the projections of a Hugging Face model, as values."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from smartinit.errors import ArtefactError, ConfigError, ModelError
from smartinit.formats.megatron import megatron_adapter
from smartinit.formats.megatron_experts import of_parameter, parameter_matrices, stack, unstack
from smartinit.formats.megatron_fusion import (
    HeadShape,
    Update,
    divide,
    fuse,
    join_projections,
    padded,
    rescaled,
    split_projections,
    truncated,
)
from smartinit.formats.megatron_names import Place, Spelling, grouped, spelling_of, to_megatron, to_peft
from smartinit.formats.megatron_shape import DecoderShape, lacks_numbers, shape_of
from smartinit.formats.megatron_targets import target_modules
from smartinit.formats.megatron_to_peft import peft_adapter

HEADS = HeadShape(4, 2, 3)
SHAPE = DecoderShape(HEADS, experts=None, layers=1)
LAYER = "model.layers.0"
QKV = "decoder.layers.0.self_attention.linear_qkv"
FC1 = "decoder.layers.0.mlp.linear_fc1"
ROWS = {"q": 12, "k": 6, "v": 6}


@pytest.fixture
def update(seed):
    """Random factors in float64; an A may be given."""
    generator = torch.Generator().manual_seed(seed)

    def make(rows, rank=2, *, a=None, scaling=2.0, columns=5, magnitude=False):
        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        a = draw(rank, columns) if a is None else a
        return Update(a, draw(rows, len(a)), scaling, draw(rows).abs() if magnitude else None)

    return make


def delta(one):
    """``s·B A``."""
    return one.scaling * one.b @ one.a


def fused_by_hand(q, k, v, heads):
    """Row by row, group by group."""
    rows = []
    for group in range(heads.groups):
        for head in range(heads.heads // heads.groups):
            first = (group * (heads.heads // heads.groups) + head) * heads.size
            rows += [q[first + i] for i in range(heads.size)]
        rows += [k[group * heads.size + i] for i in range(heads.size)]
        rows += [v[group * heads.size + i] for i in range(heads.size)]
    return torch.stack(rows)


def test_rows_of_two_heads_and_one_group_by_hand():
    q, k, v = torch.tensor([[11], [12], [21], [22]]), torch.tensor([[31], [32]]), torch.tensor([[41], [42]])
    fused = join_projections({"q": q, "k": k, "v": v}, HeadShape(2, 1, 2))
    assert fused.flatten().tolist() == [11, 12, 21, 22, 31, 32, 41, 42]


def test_rows_of_four_heads_in_two_groups_by_hand():
    q, k, v = torch.tensor([[1], [2], [3], [4]]), torch.tensor([[10], [20]]), torch.tensor([[100], [200]])
    fused = join_projections({"q": q, "k": k, "v": v}, HeadShape(4, 2, 1))
    assert fused.flatten().tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


@pytest.mark.parametrize("heads", [HEADS, HeadShape(3, 3, 2), HeadShape(6, 1, 4)], ids=str)
def test_rows_apart_and_together(heads):
    rows = {part: torch.randn(count, 3) for part, count in heads.rows.items()}
    whole = join_projections(rows, heads)
    assert torch.equal(whole, fused_by_hand(*rows.values(), heads))
    apart = split_projections(whole, ("q", "k", "v"), heads)
    assert all(torch.equal(apart[part], rows[part]) for part in rows)


NAMES = {
    f"{LAYER}.self_attn.q_proj": (QKV, "q", None),
    f"{LAYER}.self_attn.k_proj": (QKV, "k", None),
    f"{LAYER}.self_attn.v_proj": (QKV, "v", None),
    f"{LAYER}.self_attn.o_proj": ("decoder.layers.0.self_attention.linear_proj", None, None),
    "model.layers.11.mlp.gate_proj": ("decoder.layers.11.mlp.linear_fc1", "gate", None),
    "model.layers.11.mlp.up_proj": ("decoder.layers.11.mlp.linear_fc1", "up", None),
    "model.layers.11.mlp.down_proj": ("decoder.layers.11.mlp.linear_fc2", None, None),
    "layers.3.mlp.down_proj": ("decoder.layers.3.mlp.linear_fc2", None, None),
    "model.language_model.layers.2.self_attn.q_proj": (
        "language_model.decoder.layers.2.self_attention.linear_qkv",
        "q",
        None,
    ),
    "language_model.model.layers.2.mlp.up_proj": ("language_model.decoder.layers.2.mlp.linear_fc1", "up", None),
    "model.layers.1.block_sparse_moe.experts.7.w1": ("decoder.layers.1.mlp.experts.linear_fc1", "gate", 7),
    "model.layers.1.block_sparse_moe.experts.7.w3": ("decoder.layers.1.mlp.experts.linear_fc1", "up", 7),
    "model.layers.1.block_sparse_moe.experts.7.w2": ("decoder.layers.1.mlp.experts.linear_fc2", None, 7),
    "model.layers.1.block_sparse_moe.gate": ("decoder.layers.1.mlp.router", None, None),
    "model.layers.1.mlp.experts.12.gate_proj": ("decoder.layers.1.mlp.experts.linear_fc1", "gate", 12),
    "model.layers.1.mlp.experts.12.up_proj": ("decoder.layers.1.mlp.experts.linear_fc1", "up", 12),
    "model.layers.1.mlp.experts.12.down_proj": ("decoder.layers.1.mlp.experts.linear_fc2", None, 12),
    "model.layers.1.mlp.gate": ("decoder.layers.1.mlp.router", None, None),
    "model.layers.1.mlp.shared_expert.up_proj": ("decoder.layers.1.mlp.shared_experts.linear_fc1", "up", None),
    "model.layers.1.mlp.shared_experts.down_proj": ("decoder.layers.1.mlp.shared_experts.linear_fc2", None, None),
    "model.embed_tokens": ("embedding.word_embeddings", None, None),
    "model.language_model.embed_tokens": ("language_model.embedding.word_embeddings", None, None),
    "lm_head": ("output_layer", None, None),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_both_ways(name):
    place = to_megatron(name)
    assert (place.module, place.part, place.expert) == NAMES[name]
    assert to_peft(place, spelling_of([name])) == name


def test_stacked_parameters_both_ways():
    for name, layer in (("gate_up_proj", "linear_fc1"), ("down_proj", "linear_fc2")):
        full = f"model.layers.4.mlp.experts.{name}"
        place = to_megatron(full)
        assert place == Place(f"decoder.layers.4.mlp.experts.{layer}", stacked=True)
        assert to_peft(place, spelling_of([full])) == full


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.mlp.shared_expert_gate",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.layers.x.self_attn.q_proj",
        "transformer.h.0.attn.c_attn",
        "model.layers.0.mlp.experts.1.c_fc",
        "score",
    ],
)
def test_an_unknown_name_is_refused_by_name(name):
    with pytest.raises(ArtefactError, match=f"'{name}' has no known name in Megatron"):
        to_megatron(name)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_q_proj",
        "decoder.layers.0.mlp.linear_fc3",
        "vision_model.decoder.layers.0.self_attention.linear_qkv",
        "decoder.layers.0.mlp.other.linear_fc1",
    ],
)
def test_an_unknown_layer_of_megatron_is_refused_by_name(name):
    with pytest.raises(ArtefactError, match=f"'{name}' has no known name in a Hugging Face model"):
        grouped(name)


def test_names_of_two_models_are_refused():
    with pytest.raises(
        ArtefactError, match=r"'model.language_model.layers.0.mlp.up_proj' is written for another model"
    ):
        spelling_of([f"{LAYER}.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"])


@pytest.mark.parametrize(
    "values", [None, {"prefix": 3}, {"prefix": "../"}, {"other": "x"}, {"head": "a b"}, {"experts": "bogus"}]
)
def test_a_broken_spelling_is_refused(values):
    assert Spelling.from_dict(Spelling(head="x").as_dict()) == Spelling(head="x")
    with pytest.raises(ArtefactError, match="does not say how a model writes its names"):
        Spelling.from_dict(values)


def test_one_a_for_all_loses_nothing(update):
    a = update(1, rank=2).a
    parts = {part: update(count, a=a) for part, count in ROWS.items()}
    fused = fuse(parts, ROWS, HEADS)
    assert fused.rank == 2
    assert torch.equal(fused.a, a)
    assert torch.equal(fused.b, fused_by_hand(*(part.b for part in parts.values()), HEADS))
    for part, back in divide(fused, ("q", "k", "v"), HEADS).items():
        assert torch.equal(back.a, a)
        assert torch.equal(back.b, parts[part].b)


def test_shorter_beginnings_of_one_a_lose_nothing(update):
    """EVA gives q, k and v other ranks of one basis."""
    a = update(1, rank=4).a
    parts = {"q": update(12, a=a[:2]), "k": update(6, a=a), "v": update(6, a=a[:1])}
    fused = fuse(parts, ROWS, HEADS)
    assert fused.rank == 4
    by_hand = fused_by_hand(*(delta(part) for part in parts.values()), HEADS)
    assert torch.allclose(delta(fused), by_hand, atol=1e-12)
    for part, back in divide(fused, ("q", "k", "v"), HEADS).items():
        assert torch.equal(back.a, parts[part].a)
        assert torch.equal(back.b, parts[part].b)


@pytest.mark.parametrize("scalings", [(2.0, 2.0, 2.0), (2.0, 0.5, 3.0)])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2)])
def test_own_as_are_put_together_exactly(update, ranks, scalings):
    parts = {
        part: update(ROWS[part], rank=rank, scaling=scaling)
        for part, rank, scaling in zip(ROWS, ranks, scalings, strict=True)
    }
    fused = fuse(parts, ROWS, HEADS)
    assert fused.rank == sum(ranks)
    assert torch.allclose(delta(fused), fused_by_hand(*(delta(part) for part in parts.values()), HEADS), atol=1e-12)
    back = divide(fused, ("q", "k", "v"), HEADS)
    for part in ROWS:
        assert back[part].rank == parts[part].rank, "each has its own rank again"
        assert torch.equal(back[part].a, parts[part].a)
        assert torch.allclose(delta(back[part]), delta(parts[part]), atol=1e-12)


def test_a_projection_without_adapter_has_rows_of_zeros(update):
    q, v = update(12), update(6)
    fused = fuse({"q": q, "v": v}, ROWS, HEADS)
    by_hand = fused_by_hand(delta(q), torch.zeros(6, 5, dtype=torch.float64), delta(v), HEADS)
    assert torch.allclose(delta(fused), by_hand, atol=1e-12)


def test_magnitudes_go_with_their_rows(update):
    parts = {part: update(count, magnitude=True) for part, count in ROWS.items()}
    fused = fuse(parts, ROWS, HEADS)
    assert torch.equal(fused.magnitude, fused_by_hand(*(part.magnitude for part in parts.values()), HEADS))
    back = divide(fused, ("q", "k", "v"), HEADS)
    assert all(torch.equal(back[part].magnitude, parts[part].magnitude) for part in ROWS)
    with pytest.raises(ConfigError, match="q and v have DoRA magnitudes, but k of the same fused layer none"):
        fuse({"q": parts["q"], "v": parts["v"]}, ROWS, HEADS)


def test_truncation_is_the_best_there_is(update):
    whole = fuse({part: update(count, rank=3) for part, count in ROWS.items()}, ROWS, HEADS)
    small, error = truncated(whole, 2)
    u, s, vt = torch.linalg.svd(whole.b @ whole.a)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    assert torch.allclose(small.b @ small.a, best, atol=1e-10)
    assert error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-9)
    with pytest.raises(ConfigError, match="rank=0"):
        truncated(whole, 0)


def test_padding_and_rescaling_change_nothing(update):
    one = update(7, rank=3)
    assert torch.allclose(delta(padded(one, 5)), delta(one), atol=1e-12)
    assert padded(one, 5).rank == 5
    assert torch.allclose(delta(rescaled(one, 0.7)), delta(one), atol=1e-12)
    assert one.alpha == 6.0
    with pytest.raises(ConfigError, match="scaling of zero"):
        rescaled(one, 0.0)


def test_stacked_matrices_are_those_of_peft(update):
    """A's row e·r + k and B's column k·E + e are direction k of expert e."""
    experts = {e: update(4, rank=3) for e in range(5)}
    whole = stack(experts, 5)
    a, b = parameter_matrices(whole)
    for e, k in itertools.product(range(5), range(3)):
        assert torch.equal(a[e * 3 + k], experts[e].a[k])
        assert torch.equal(b[:, k * 5 + e], experts[e].b[:, k])
    back = of_parameter(a, b, 3, whole.scaling)
    assert torch.equal(back.a, whole.a)
    assert torch.equal(back.b, whole.b)
    for e, one in unstack(back, 5).items():
        assert torch.equal(delta(one), delta(experts[e]))


def test_experts_of_other_ranks_and_without_adapters(update):
    experts = {0: update(4, rank=1), 2: update(4, rank=3, scaling=0.5)}
    whole = stack(experts, 4)
    assert whole.a.shape == (4, 3, 5)
    for e, one in unstack(whole, 4).items():
        expected = delta(experts[e]) if e in experts else torch.zeros(4, 5, dtype=torch.float64)
        assert torch.allclose(delta(one), expected, atol=1e-12)


def test_what_experts_cannot_be(update):
    with pytest.raises(ArtefactError, match="expert 4 has an adapter, but the model has 4 experts"):
        stack({4: update(3)}, 4)
    with pytest.raises(ConfigError, match="experts with DoRA cannot be stacked"):
        stack({0: update(3, magnitude=True)}, 1)
    with pytest.raises(ConfigError, match="one size is expected"):
        stack({0: update(3), 1: update(4)}, 2)
    with pytest.raises(ConfigError, match="one adapter is shared by all experts"):
        unstack(update(3), None)
    with pytest.raises(ArtefactError, match="a layer has adapters of 2 experts, but the model has 3"):
        unstack(stack({0: update(3), 1: update(3)}, 2), 3)
    with pytest.raises(ArtefactError, match="which rank 4 does not divide"):
        of_parameter(torch.zeros(6, 2), torch.zeros(3, 6), 4, 1.0)
    one = update(3)
    shared = unstack(one, 2)
    assert torch.equal(delta(shared[1]), delta(one))


def attention(update, **options):
    """An adapter of q, k and v."""
    return {f"{LAYER}.self_attn.{part}_proj": update(count, **options) for part, count in ROWS.items()}


def test_auto_says_what_it_has_chosen(update):
    made = megatron_adapter(attention(update, a=update(1).a), {}, SHAPE)
    assert made.config["peft_type"] == "lora"
    assert made.fused == {QKV: "equal"}
    assert made.notes == ()
    assert made.config["target_modules"] == ["linear_qkv"]
    made = megatron_adapter(attention(update), {}, SHAPE)
    assert made.config["peft_type"] == "canonical_lora"
    assert sorted(made.tensors) == [
        f"{QKV}.adapter.adapter_{part}.linear_{side}.weight" for part in "kqv" for side in ("in", "out")
    ]
    assert made.config["target_modules"] == ["linear_q", "linear_k", "linear_v"]
    assert "exported as canonical adapters" in made.notes[0]
    made = megatron_adapter(attention(update, magnitude=True), {}, SHAPE)
    assert made.config["peft_type"] == "dora"
    assert made.fused == {QKV: "exact"}
    assert made.ranks == {QKV: 6}
    assert made.config["alpha"] == 12.0, "alpha / dim stays"


def test_canonical_is_for_all_fused_layers(update):
    """Megatron's canonical class takes no fused layer, so an equal A does not matter."""
    a = update(1).a
    layers = {f"{LAYER}.mlp.{part}_proj": update(6, a=a) for part in ("gate", "up")} | attention(update)
    made = megatron_adapter(layers, {}, SHAPE)
    assert made.fused == {FC1: "canonical", QKV: "canonical"}


@pytest.mark.parametrize("how", ["exact", "canonical", "svd"])
def test_there_and_back(update, how):
    layers = attention(update) | {
        f"{LAYER}.self_attn.o_proj": update(5, columns=12),
        f"{LAYER}.mlp.gate_proj": update(8, rank=3, scaling=1.5),
        f"{LAYER}.mlp.up_proj": update(8),
        f"{LAYER}.mlp.down_proj": update(5, columns=8),
        "model.embed_tokens": update(5, columns=30),
        "lm_head": update(30),
    }
    made = megatron_adapter(layers, {}, SHAPE, how=how, rank=5 if how == "svd" else None)
    back = peft_adapter(made.tensors, made.config, SHAPE, Spelling())
    assert set(back.layers) == set(layers)
    assert set(made.errors) == ({QKV, FC1} if how == "svd" else set())
    for name, one in back.layers.items():
        assert torch.allclose(delta(one), delta(layers[name]), atol=1e-11), name  # 5 features have rank 5
        if how == "canonical" or "attn.o" in name:
            assert torch.equal(one.a, layers[name].a)
            assert torch.equal(one.b, layers[name].b)


@pytest.mark.parametrize("multiple", [1, 4])
def test_one_rank_for_all(update, multiple):
    layers = attention(update) | {f"{LAYER}.self_attn.o_proj": update(5, columns=12, scaling=0.3)}
    made = megatron_adapter(layers, {}, SHAPE, how="exact", one_rank=multiple)
    dim = 6 if multiple == 1 else 8
    assert made.config["dim"] == dim
    assert made.config["layers"] == {}
    assert all(t.shape[0] == dim for key, t in made.tensors.items() if "linear_in" in key)
    back = peft_adapter(made.tensors, made.config, SHAPE, Spelling())
    for name, one in back.layers.items():
        assert torch.allclose(delta(one), delta(layers[name]), atol=1e-12)


@pytest.mark.parametrize("layout", ["grouped", "sequential"])
@pytest.mark.parametrize("shared", [True, False], ids=["one A", "own A"])
@pytest.mark.parametrize("how", ["exact", "canonical"])
def test_experts_in_their_forms(update, layout, shared, how):
    a = update(1).a if shared else None
    layers = {}
    for e in range(3):
        layers |= {f"{LAYER}.mlp.experts.{e}.{part}_proj": update(8, a=a) for part in ("gate", "up")}
        layers[f"{LAYER}.mlp.experts.{e}.down_proj"] = update(5, columns=8)
    shape = DecoderShape(HEADS, experts=3, layers=1)
    made = megatron_adapter(layers, {}, shape, how=how, experts=layout)
    local = ".local_experts.2" if layout == "sequential" else ""
    part = ".adapter_up" if how == "canonical" else ""
    key = f"decoder.layers.0.mlp.experts{local}.linear_fc1.adapter{part}.linear_in.weight"
    assert made.tensors[key].ndim == (2 if layout == "sequential" else 3)
    back = peft_adapter(made.tensors, made.config, shape, spelling_of(layers))
    assert set(back.layers) == set(layers)
    for name, one in back.layers.items():
        assert torch.allclose(delta(one), delta(layers[name]), atol=1e-12)
    stacked = peft_adapter(made.tensors, made.config, shape, Spelling()).stacks
    gate_up = stacked[f"{LAYER}.mlp.experts.gate_up_proj"]
    for e in range(3):
        both = torch.cat([delta(layers[f"{LAYER}.mlp.experts.{e}.{part}_proj"]) for part in ("gate", "up")])
        assert torch.allclose(gate_up.scaling * gate_up.b[e] @ gate_up.a[e], both, atol=1e-12)


def test_an_adapter_that_all_experts_share(update):
    one = update(8)
    key = "decoder.layers.0.mlp.experts.linear_fc2.adapter"
    tensors = {f"{key}.linear_in.weight": one.a, f"{key}.linear_out.weight": one.b}
    shape = DecoderShape(HEADS, experts=3)
    spelling = Spelling(experts="modules", home="block_sparse_moe", w=True)
    back = peft_adapter(tensors, {"alpha": 4}, shape, spelling).layers
    assert list(back) == [f"{LAYER}.block_sparse_moe.experts.{e}.w2" for e in range(3)]
    assert all(torch.equal(delta(layer), delta(one)) for layer in back.values())
    with pytest.raises(ConfigError, match="how many there are is not known"):
        peft_adapter(tensors, {"alpha": 4}, DecoderShape(HEADS), spelling)


def test_a_projection_that_gets_nothing_is_said(update):
    layers = attention(update)
    del layers[f"{LAYER}.self_attn.k_proj"]
    made = megatron_adapter(layers, {}, SHAPE, how="exact")
    assert f"k of {QKV} had no adapter" in made.notes[0]
    back = peft_adapter(made.tensors, made.config, SHAPE, Spelling())
    assert set(back.layers) == set(layers)
    assert f"k of {QKV} gets no adapter" in back.notes[0]


def test_a_model_without_gates(update):
    shape = DecoderShape(HEADS, gated=False)
    layers = {f"{LAYER}.mlp.up_proj": update(7), f"{LAYER}.mlp.down_proj": update(5, columns=7)}
    made = megatron_adapter(layers, {}, shape)
    assert f"{FC1}.adapter.linear_in.weight" in made.tensors
    back = peft_adapter(made.tensors, made.config, shape, Spelling())
    assert all(torch.equal(delta(back.layers[name]), delta(layers[name])) for name in layers)
    with pytest.raises(ArtefactError, match="is a gate, but the model is said to have none"):
        megatron_adapter({f"{LAYER}.mlp.gate_proj": update(7)}, {}, shape)


def test_targets_as_short_as_they_can_be_said():
    qkv = [(f"decoder.layers.{i}.self_attention.linear_qkv", "") for i in range(3)]
    assert target_modules(qkv, 3) == ["linear_qkv"]
    assert target_modules(qkv, None) == [name for name, _ in qkv]
    assert target_modules(qkv, 4) == [name for name, _ in qkv]
    moe = [(f"decoder.layers.{i}.mlp.experts.linear_fc1", "") for i in range(2)]
    moe += [(f"decoder.layers.{i}.mlp.shared_experts.linear_fc1", "") for i in range(2)]
    assert target_modules(moe, 2) == ["*.mlp.experts.linear_fc1", "*.mlp.shared_experts.linear_fc1"]
    canonical = [("decoder.layers.0.self_attention.linear_qkv", ".adapter_q")]
    assert target_modules(canonical, 1) == ["linear_q"]
    assert target_modules(canonical, 2) == ["decoder.layers.0.self_attention.linear_q"]


CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 12}


def test_the_shape_of_a_configuration():
    assert shape_of(CONFIG).heads == HEADS
    assert shape_of({**CONFIG, "head_dim": 5}).heads == HeadShape(4, 2, 5)
    assert shape_of({"text_config": CONFIG}).heads == HEADS
    assert shape_of({**CONFIG, "num_key_value_heads": None}).heads == HeadShape(4, 4, 3)
    assert shape_of({**CONFIG, "num_local_experts": 8}).experts == 8
    assert not shape_of({**CONFIG, "model_type": "nemotron"}).gated
    assert shape_of({}).heads is None
    whole = DecoderShape(HEADS, 4, 2, gated=False)
    assert shape_of(whole.as_dict()) == whole
    assert shape_of(DecoderShape().as_dict()) == DecoderShape()
    assert lacks_numbers(CONFIG)
    assert not lacks_numbers({"text_config": {**CONFIG, "head_dim": 3}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": "4"}, "num_attention_heads='4'"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_key_value_heads": 3}, "groups divide"),
        ({"hidden_size": 13}, "neither head_dim nor a hidden_size that 4 heads divide"),
        ({"model_type": "gpt_oss"}, "gate and up by turns"),
    ],
)
def test_a_configuration_that_cannot_be(change, words):
    with pytest.raises(ModelError, match=words):
        shape_of({**CONFIG, **change})


def test_bad_input_is_one_sentence(update):
    layers = attention(update)
    with pytest.raises(ConfigError, match="grouped by the heads of the model, which are not known"):
        megatron_adapter(layers, {}, DecoderShape())
    with pytest.raises(
        ArtefactError, match=r"q of .* has 12 rows, but 2 heads in 2 query groups of head size 3 make 6"
    ):
        megatron_adapter(layers, {}, DecoderShape(HeadShape(2, 2, 3)))
    with pytest.raises(ConfigError, match="fuse='best' is not known"):
        megatron_adapter(layers, {}, SHAPE, how="best")
    with pytest.raises(ConfigError, match="rank=3 is what fuse='svd' cuts to"):
        megatron_adapter(layers, {}, SHAPE, how="exact", rank=3)
    with pytest.raises(ConfigError, match="one_rank=0"):
        megatron_adapter(layers, {}, SHAPE, one_rank=0)
    with pytest.raises(ConfigError, match="Megatron's DoRA has one adapter"):
        megatron_adapter(attention(update, magnitude=True), {}, SHAPE, how="canonical")
    mixed = layers | {f"{LAYER}.self_attn.o_proj": update(5, magnitude=True)}
    with pytest.raises(ConfigError, match="some layers have DoRA magnitudes and others have none"):
        megatron_adapter(mixed, {}, SHAPE)
    odd = {f"{LAYER}.mlp.gate_proj": update(4), f"{LAYER}.mlp.up_proj": update(5)}
    with pytest.raises(ArtefactError, match=r"gate and up of .* have \[4, 5\] rows"):
        megatron_adapter(odd, {}, SHAPE)
    odd = {f"{LAYER}.mlp.gate_proj": update(4), f"{LAYER}.mlp.up_proj": update(4, columns=6)}
    with pytest.raises(ArtefactError, match=r"read \[5, 6\] features"):
        megatron_adapter(odd, {}, SHAPE)
    with pytest.raises(ConfigError, match="4 heads in 3 query groups"):
        HeadShape(4, 3, 2)
    with pytest.raises(ArtefactError, match="has an adapter twice"):
        megatron_adapter({f"{LAYER}.mlp.gate": update(3), "model.layers.00.mlp.gate": update(3)}, {}, SHAPE)


def test_bad_folders_are_one_sentence(update):
    made = megatron_adapter(attention(update, a=update(1).a), {}, SHAPE)
    first, second = f"{QKV}.adapter.linear_in.weight", f"{QKV}.adapter.linear_out.weight"
    whole = dict(made.tensors)

    def refused(words, change, shape=SHAPE, config=made.config):
        with pytest.raises((ArtefactError, ConfigError), match=words):
            peft_adapter({**whole, **change}, config, shape, Spelling())

    refused("is no key of an adapter", {"decoder.weight": whole[first]})
    refused("has only one of linear_in and linear_out", {f"{FC1}.adapter.linear_in.weight": whole[first]})
    refused("do not go together", {first: whole[first][:1]})
    refused(
        "has one adapter for all of it and others",
        {
            f"{QKV}.adapter.adapter_q.{end}": whole[f"{QKV}.adapter.{end}"]
            for end in ("linear_in.weight", "linear_out.weight")
        },
    )
    refused("has 24 rows, but 2 heads", {}, replace(SHAPE, heads=HeadShape(2, 1, 3)))
    refused("which are not known", {}, DecoderShape())
    refused("weight_magnitude of .* has shape", {f"{QKV}.adapter.weight_magnitude": torch.ones(3)})
    refused("has alpha='x'", {}, config={"alpha": "x"})
    refused("has 23 rows", {second: whole[second][:23]})
