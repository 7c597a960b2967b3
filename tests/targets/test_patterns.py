"""Matching rules: PEFT's own functions are the oracle."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartinit.config import LoraConfig
from smartinit.errors import ConfigError
from smartinit.targets import alpha_for, match_module, rank_for
from smartinit.targets.pattern_index import compiled, pattern_index

LAYER = "model.layers.0.self_attn.q_proj"

# Names that real models have, and the ones that make rules differ.
NAMES = [
    "model.embed_tokens",
    *(
        f"model.layers.{i}.{name}"
        for i in (0, 1, 10)
        for name in ("self_attn", "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.3.up_proj")
    ),
    "lm_head",
    "transformer.h.1.attn.c_attn",
    "h.1.attn.c_attn",
    "h.0.mlp.c_proj",
    "encoder.layer.11.attention.self.query",
    "vision.blocks.2.q_proj",
    "model.xq_proj",
    "q_proj",
    "score",
    "score.dense",
]
ENTRIES = [
    "q_proj",
    "v_proj",
    "self_attn.q_proj",
    "up_proj",
    "3.up_proj",
    "c_attn",
    "attn.c_attn",
    "query",
    "score",
    "lm_head",
    "h.1.attn.c_attn",
    "model.layers.10.self_attn.q_proj",
    "layers",
    "dense",
    "proj",
    "nothing",
]
REGEXES = [
    r".*q_proj",
    r"model\.layers\.[01]\..*proj",
    r".*\.(q|v)_proj",
    r"q_proj",
    r".*",
    r"^model.*up_proj$",
    r"(?i).*Q_PROJ",
    r"h.1.attn.c_attn",
    r".*experts\.\d+\..*",
]
LAYERS = st.none() | st.integers(0, 11) | st.lists(st.sampled_from([0, 1, 2, 3, 10, 11]), max_size=3)
PARENTS = (
    st.none()
    | st.sampled_from(["layers", "h", "blocks", "layer", "experts", r"(?:h|layers)", []])
    | st.just(["h", "layers"])
)
entries = st.lists(st.sampled_from(ENTRIES), min_size=1, max_size=4)


@st.composite
def options(draw):
    """What decides about a match, as keyword arguments of both LoraConfig classes."""
    chosen = {"target_modules": draw(entries | st.sampled_from(REGEXES))}
    if isinstance(chosen["target_modules"], list):
        chosen["layers_to_transform"] = draw(LAYERS)
        if chosen["layers_to_transform"] is not None:
            chosen["layers_pattern"] = draw(PARENTS)
    chosen["exclude_modules"] = draw(st.none() | entries | st.sampled_from(REGEXES))
    chosen["modules_to_save"] = draw(st.none() | st.lists(st.sampled_from(["score", "lm_head", "mlp", r"layers\.1"])))
    return chosen


@settings(max_examples=300)
@given(options())
def test_matches_what_peft_matches(chosen):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs, ours = peft.LoraConfig(**chosen), LoraConfig(**chosen)
    for name in NAMES:
        assert match_module(ours, name) == bool(check_target_module_exists(theirs, name)), name


PATTERNS = [
    "q_proj",
    "self_attn.q_proj",
    r"model\.layers\.0\.self_attn\.q_proj",
    "^q_proj",
    "^model.layers.0.self_attn.q_proj",
    r"^model\.layers\.\d+\.self_attn\.(?:q|v)_proj$",
    r".*\.mlp\..*",
    "layers.1",
    "x?q_proj",
    r"^(?:h\.1\.attn\.c_attn|lm_head)$",
]


@settings(max_examples=200)
@given(
    st.dictionaries(st.sampled_from(PATTERNS + NAMES), st.integers(1, 99), max_size=5),
    st.dictionaries(st.sampled_from(PATTERNS + NAMES), st.floats(0.5, 99), max_size=5),
)
def test_ranks_and_alphas_are_pefts_on_the_base_model(ranks, alphas):
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    config = LoraConfig(r=7, lora_alpha=5, rank_pattern=ranks, alpha_pattern=alphas)
    for name in NAMES:
        assert rank_for(config, name) == ranks.get(get_pattern_key(ranks.keys(), name), 7), name
        assert alpha_for(config, name) == alphas.get(get_pattern_key(alphas.keys(), name), 5), name


def test_a_key_that_matches_only_literally_counts_as_in_peft():
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    ranks = {"fc[0]": 3}
    assert ranks.get(get_pattern_key(ranks.keys(), "fc[0]")) == 3
    assert rank_for(LoraConfig(rank_pattern=ranks), "fc[0]") == 3


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "module.", "_orig_mod.", "module.base_model.model."])
def test_defect_06_anchored_patterns(prefix):
    """`^` stands for the start of the name in the base model, whatever host the name comes from."""
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    config = LoraConfig(
        r=8,
        rank_pattern={f"^{LAYER}": 2, r"^model\.layers\.1\.": 3},
        alpha_pattern={r"^model\.layers\.0\.self_attn\.(?:k_proj|q_proj)$": 6},
    )

    assert rank_for(config, prefix + LAYER) == 2
    assert alpha_for(config, prefix + LAYER) == 6
    assert rank_for(config, f"{prefix}x.{LAYER}") == 8
    if prefix == "base_model.model.":  # the defect
        assert get_pattern_key(config.rank_pattern, prefix + LAYER) not in config.rank_pattern


def test_the_first_pattern_wins_whatever_host_the_name_comes_from():
    config = LoraConfig(rank_pattern={f"^{LAYER}": 2, "q_proj": 3})
    assert rank_for(config, f"base_model.model.{LAYER}") == rank_for(config, LAYER) == 2


def test_an_anchored_pattern_for_a_genuine_attribute_called_module():
    config = LoraConfig(rank_pattern={r"^module\.fc": 2})
    assert rank_for(config, "module.fc") == rank_for(config, "base_model.model.module.fc") == 2
    assert rank_for(config, "module.base_model.model.fc") == 8  # there it is a wrapper


@pytest.mark.parametrize(
    ("entry", "matched"),
    [
        ("*.layers.0.*.q_proj", {"model.layers.0.self_attn.q_proj"}),
        (
            "layers.0.*",
            {f"model.layers.0.{n}" for n in ("self_attn", "self_attn.q_proj", "self_attn.v_proj")}
            | {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.experts.3.up_proj"},
        ),
        ("*up_proj", {name for name in NAMES if name.endswith("up_proj")}),
        ("model.layers.*.mlp*.up_proj", {n for n in NAMES if n.endswith("up_proj")}),
        ("model*lm_head", set()),
        ("lm_*head", {"lm_head"}),
        ("l*d", {"lm_head"}),
        ("h.?.attn.c_attn", set()),
        ("model.layers.0*self.attn*", set()),
    ],
)
def test_wildcards_cross_dots_match_nothing_too_and_leave_the_rest_literal(entry, matched):
    config = LoraConfig(target_modules=[entry])
    assert {name for name in NAMES if match_module(config, name)} == matched


def test_wildcards_exclude_and_go_with_layers_to_transform():
    config = LoraConfig(target_modules=["*_proj"], exclude_modules=["*experts*"], layers_to_transform=1)
    assert {name for name in NAMES if match_module(config, name)} == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_none_matches_nothing_by_itself():
    assert not match_module(LoraConfig(), LAYER)


def test_a_pattern_assigned_later_that_is_no_regular_expression():
    config = LoraConfig()
    config.rank_pattern = {"(q": 2}
    with pytest.raises(ConfigError, match=r"'\(\.\*\\\\\.\)\?\(\(q\)\$' is not a regular expression"):
        rank_for(config, LAYER)


@pytest.mark.parametrize(("form", "expressions"), [("^{}$", 0), (r"^(?:{}|x\.y)$", 0), ("^{}x?$", 1000)])
def test_of_a_thousand_patterns_none_is_tried_that_is_a_name_and_each_other_is_compiled_once(form, expressions):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(1000)]
    config = LoraConfig(rank_pattern={form.format(name): i + 1 for i, name in enumerate(names)})
    before = compiled.cache_info().misses
    assert rank_for(config, names[-1]) == 1000
    assert compiled.cache_info().misses == before + expressions
    assert [rank_for(config, name) for name in names[::100]] == list(range(1, 1001, 100))
    assert compiled.cache_info().misses == before + expressions


PIECES = st.sampled_from(["a", "b", "ab", "_", "-", ".", ".", r"\.", r"\-", "^", "$", "|", "(?:", ")", "*", "\n", "é"])
KEYS = st.lists(PIECES, min_size=1, max_size=6).map("".join)
KEYS |= st.lists(st.sampled_from(["a", r"a\.b", "a.b", "b", "-a", "b.a.b"]), min_size=1, max_size=3).flatmap(
    lambda names: st.sampled_from(
        ["|".join(names), f"^(?:{'|'.join(names)})$", f"(?:{'|'.join(names)})", f"^{names[0]}"]
    )
)


def is_expression(key):
    try:
        re.compile(key)
    except re.error:
        return False
    return True


@settings(max_examples=500)
@given(
    st.lists(KEYS.filter(is_expression), min_size=1, max_size=5, unique=True),
    st.lists(st.sampled_from(["a", "b", "ab", "_", "-", ".", ".", "\n", "é"]), min_size=1, max_size=7).map("".join),
)
def test_the_first_of_any_keys_is_pefts(keys, name):
    """Dots match any character, anchors hold, and what looks like a name but is an expression is tried as one."""
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    assert (pattern_index(tuple(keys)).first([name]) or name) == get_pattern_key(keys, name)
