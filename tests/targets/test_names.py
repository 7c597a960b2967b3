"""Names under wrappers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartinit.targets import match_names, normalise_name
from smartinit.targets.names import base_names, spellings

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "wrapped",
    [
        NAME,
        f"base_model.model.{NAME}",
        f"module.{NAME}",
        f"_orig_mod.{NAME}",
        f"module.base_model.model.{NAME}",
        f"_orig_mod.module.base_model.model.{NAME}",
        f"base_model.model._orig_mod.{NAME}",
        "base_model.model.model.layers.0._orig_mod.self_attn.q_proj",
        "model.layers.0._orig_mod.self_attn.q_proj._orig_mod",
        f"base_model.model.{NAME}.base_layer",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.q_proj",
    ],
)
def test_defect_05_prefixes_are_normalised(wrapped):
    """A state dict of the base model and one of an adapter model name the same layers."""
    assert normalise_name(wrapped) == NAME
    assert match_names([wrapped], [NAME, "model.layers.1.self_attn.q_proj"]) == {wrapped: NAME}
    assert match_names([NAME], [f"base_model.model.{NAME}"]) == {NAME: f"base_model.model.{NAME}"}
    assert match_names([wrapped], [f"module.base_model.model.{NAME}"]) != {}


@pytest.mark.parametrize("name", ["model_module.q", "x.module.q", "base_layers.0.q", "my_orig_mod.q", "base_model.q"])
def test_names_that_only_look_like_wrappers_stay(name):
    assert normalise_name(name) == name


def test_a_genuine_attribute_called_module_is_told_from_a_wrapper():
    available = ["base_model.model.module.fc", "base_model.model.fc", "base_model.model.module.out"]

    assert match_names(["module.fc", "fc", "module.out"], available) == {
        "module.fc": "base_model.model.module.fc",
        "fc": "base_model.model.fc",
        "module.out": "base_model.model.module.out",
    }
    assert match_names(["module.base_model.model.fc"], available) == {
        "module.base_model.model.fc": "base_model.model.fc"
    }


def test_the_exact_name_goes_first_whatever_the_order():
    assert match_names(["base_model.model.fc", "fc"], ["fc"]) == {"fc": "fc"}
    assert match_names(["module.fc", "fc"], ["fc", "module.fc"]) == {"module.fc": "module.fc", "fc": "fc"}


def test_a_name_without_partner_is_left_out():
    assert match_names(["fc1", "fc3"], ["fc1", "fc2"]) == {"fc1": "fc1"}
    assert match_names([], ["fc1"]) == {}


def test_base_names_offer_module_as_wrapper_and_as_attribute():
    assert base_names("base_model.model.module.fc") == ("module.fc", "fc")
    assert base_names("module.base_model.model.fc") == ("fc",)
    assert base_names("fc") == ("fc",)


parts = st.sampled_from(["base_model", "model", "module", "_orig_mod", "base_layer", "fc", "layers", "0"])
names = st.lists(parts, min_size=1, max_size=6).map(".".join)


@given(names)
def test_normalising_is_idempotent_and_leaves_something(name):
    assert normalise_name(normalise_name(name)) == normalise_name(name) != ""
    assert spellings(name)[0] == name


@given(st.lists(names, unique=True, max_size=8), st.lists(names, unique=True, max_size=8))
def test_matching_is_one_to_one_between_names_of_one_module(wanted, available):
    found = match_names(wanted, available)

    assert len(set(found.values())) == len(found)
    assert set(found) <= set(wanted)
    assert set(found.values()) <= set(available)
    for name, partner in found.items():
        assert set(spellings(name)) & set(spellings(partner))
    for name in set(wanted) & set(available):
        assert found[name] == name
