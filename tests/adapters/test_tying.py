"""Weights that a model ties, and adapters on them."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from smartinit.adapters import LoraModel
from smartinit.adapters.tying import Ties, embedding_ties
from smartinit.config import LoraConfig
from smartinit.errors import ConfigError
from tests.adapters.beside_peft import (
    bert,
    both,
    close,
    gpt2,
    gradients,
    llama,
    others_in_file,
    output,
    pefts_others,
    picture,
    same_step,
    scatter,
    trained,
)

if TYPE_CHECKING:
    from pathlib import Path

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def tied() -> nn.Module:
    """A Llama whose head is its embedding."""
    return llama(tie_word_embeddings=True)


def test_ties_are_found_by_the_weight_itself() -> None:
    model = tied()
    assert embedding_ties(model) == Ties(EMBEDDING, (HEAD,))
    wrapped = LoraModel(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]))
    assert embedding_ties(wrapped.model) == Ties(EMBEDDING, (HEAD,))
    model = wrapped.unload()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert embedding_ties(model) is None  # whatever its configuration says
    assert embedding_ties(llama()) is None
    assert embedding_ties(gpt2()) == Ties("transformer.wte", ("lm_head",))
    assert embedding_ties(bert("BertForMaskedLM")) == Ties(
        "bert.embeddings.word_embeddings", ("cls.predictions.decoder",)
    )
    assert embedding_ties(nn.Sequential(nn.Linear(2, 2))) is None


# What is asked for, and what PEFT and this package then train whole.
SAVED = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]


@pytest.mark.parametrize("names", SAVED)
def test_saved_modules_stay_one_weight(names: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj"], "modules_to_save": names, "ensure_weight_tying": True}
    ours, theirs = both(tied, **options)
    assert trained(ours).keys() == trained(theirs).keys()
    assert f"{EMBEDDING}.modules_to_save.default.weight" in trained(ours)
    assert same_step(ours, theirs)
    assert close(others_in_file(ours), pefts_others(theirs, ours), 0)
    assert ours.model.lm_head.weight is ours.model.model.embed_tokens.weight
    assert (ours.model.lm_head.in_features, ours.model.lm_head.out_features) == (16, 40)  # PEFT has them swapped
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(tied(), tmp_path / "ours")
    assert close({"": output(loaded)}, {"": output(ours)})
    for lean in (False, True):
        again = LoraModel.from_pretrained(tied(), tmp_path / "theirs", low_cpu_mem_usage=lean)
        assert close({"": output(again)}, {"": output(theirs)})
        assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    twin = copy.deepcopy(ours)
    assert twin.model.lm_head.weight is twin.model.model.embed_tokens.weight
    expected = output(ours)
    merged = ours.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert close({"": output(merged)}, {"": expected}, 1e-5)


TARGETS: list[Any] = [["q_proj", "embed_tokens"], ["q_proj", "lm_head"], r".*(q_proj|lm_head)"]


@pytest.mark.parametrize("targets", TARGETS)
def test_lora_on_tied_layers_is_one_adapter(targets: Any, tmp_path: Path) -> None:
    """The head's matrices are the embedding's: PEFT has parameters of their own for them, in the same memory."""
    peft = pytest.importorskip("peft")
    ours, theirs = both(tied, target_modules=targets, ensure_weight_tying=True, lora_alpha=6)
    scatter(theirs.base_model.model.model)  # the head's shares this memory, and was moved by itself
    scatter(ours.model.model)
    head, embedding = ours.model.lm_head, ours.model.model.embed_tokens
    assert not [name for name in trained(ours) if name.startswith(HEAD)]
    assert torch.equal(head.lora_B["default"].weight @ head.lora_A["default"].weight, _product(embedding).T)
    assert close({"": output(ours)}, {"": output(theirs)})
    one, other = gradients(ours), gradients(theirs)
    a, b = f"{EMBEDDING}.lora_embedding_A.default", f"{EMBEDDING}.lora_embedding_B.default"
    other[a] = other[a] + other.pop(f"{HEAD}.lora_B.default.weight").T
    other[b] = other[b] + other.pop(f"{HEAD}.lora_A.default.weight").T
    assert close(one, other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        loaded = peft.PeftModel.from_pretrained(tied(), tmp_path / "ours")
    assert close({"": output(loaded)}, {"": output(ours)})
    for lean in (False, True):
        again = LoraModel.from_pretrained(tied(), tmp_path / "theirs", low_cpu_mem_usage=lean, is_trainable=True)
        assert close({"": output(again)}, {"": output(theirs)})
        assert trained(again).keys() == trained(ours).keys()
    expected = output(ours)
    twin = copy.deepcopy(ours)
    scatter(ours.model.model.embed_tokens)
    assert torch.equal(output(twin), expected)
    merged = twin.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert close({"": output(merged)}, {"": expected}, 1e-5)


def test_both_layers_have_the_embeddings_rank_and_scaling() -> None:
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    model = LoraModel(
        tied(), LoraConfig(r=2, rank_pattern={"embed_tokens": 3}, alpha_pattern={"embed_tokens": 12}, **options)
    )
    scatter(model)
    assert {(layer.r["default"], layer.scaling["default"]) for layer in model.lora_layers().values()} == {(3, 4.0)}
    expected = output(model)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert close({"": output(merged)}, {"": expected}, 1e-5)


def _product(embedding: Any) -> torch.Tensor:
    product: torch.Tensor = embedding.lora_embedding_B["default"] @ embedding.lora_embedding_A["default"]
    return product


def test_half_precision_models_stay_tied() -> None:
    """In PEFT the cast to float32 parts them."""
    base = llama(tie_word_embeddings=True, dtype=torch.bfloat16)
    model = LoraModel(base, LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))
    embedding, head = model.model.model.embed_tokens, model.model.lm_head
    with torch.no_grad():
        embedding.lora_embedding_A["default"].normal_()
    assert torch.equal(head.lora_B["default"].weight, embedding.lora_embedding_A["default"].T)
    assert head.lora_B["default"].weight.dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ],
)
def test_unload_ties_as_before(options: dict[str, Any]) -> None:
    base = tied()
    before, plain = picture(base), output(base)
    config = LoraConfig(**({"target_modules": ["q_proj"]} | options), r=2, ensure_weight_tying=True)
    model = LoraModel(base, config, adapter_name="one")
    scatter(model)
    one = output(model)
    model.add_adapter("two", config)
    model.set_adapter("two")
    assert close({"": output(model)}, {"": plain})
    scatter(model)
    with pytest.warns(UserWarning, match="'two', which was active, is deleted; 'one' is now"):
        model.delete_adapter("two")
    assert torch.equal(output(model), one)
    model.unload()
    assert picture(base) == before


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            tied,
            {"modules_to_save": ["embed_tokens"]},
            r"is tied \(model.embed_tokens, lm_head\)",
        ),
        (tied, {"target_modules": ["lm_head"]}, "set ensure_weight_tying=True to keep them one"),
        (
            llama,
            {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
            "ties nothing to its input",
        ),
        (
            tied,
            {"ensure_weight_tying": True},
            "neither modules_to_save nor target_modules names",
        ),
    ],
)
def test_warnings_are_where_pefts_are(make: Any, options: dict[str, Any], message: str) -> None:
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj"]} | options
    with pytest.warns(UserWarning, match=message) as ours:
        LoraModel(make(), LoraConfig(**options))
    assert len(ours) == 1
    with pytest.warns(UserWarning, match="tying|tied"):
        peft.get_peft_model(make(), peft.LoraConfig(**options))


def test_adapters_away_from_tied_layers_are_not_warned_of() -> None:
    LoraModel(tied(), LoraConfig(target_modules="all-linear"))
    LoraModel(tied(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3], ensure_weight_tying=True))


def test_a_layer_cannot_be_saved_and_adapted() -> None:
    base = tied()
    before = picture(base)
    with pytest.raises(ConfigError, match="at 'lm_head': there is a LoRA layer of adapter 'default'"):
        LoraModel(
            base,
            LoraConfig(target_modules=["lm_head"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        )
    assert picture(base) == before


def test_the_callers_configuration_is_not_written_to() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    model = LoraModel(tied(), config)
    assert config.modules_to_save == ["lm_head"]
    assert model.config_of("default").modules_to_save == ["lm_head", EMBEDDING]
