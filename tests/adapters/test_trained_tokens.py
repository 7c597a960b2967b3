"""Single rows of an embedding that are trained."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from smartinit.adapters import LoraModel
from smartinit.adapters.trained_tokens import TrainedTokens
from smartinit.config import LoraConfig
from smartinit.errors import ArgumentError, ArtefactError, ConfigError, TargetError
from tests.adapters.beside_peft import (
    bert,
    both,
    close,
    dtypes,
    gpt2,
    gradients,
    llama,
    others_in_file,
    output,
    pefts_others,
    picture,
    same_step,
    scatter,
    tokens,
    trained,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SOME = sorted({int(token) for token in tokens()[1, [4, 0, 2]]}, reverse=True)  # all of them in the batch
Q = {"target_modules": ["q_proj"]}


def tied_llama() -> nn.Module:
    """A Llama whose head is its embedding."""
    return llama(tie_word_embeddings=True)


def padded_bert(kind: str = "BertForMaskedLM") -> nn.Module:
    """BERT with a tied decoder that has a bias."""
    return bert(kind)


def scaled() -> nn.Module:
    """A Gemma 3, whose embedding multiplies what it gives."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForCausalLM(
            Gemma3TextConfig(**shape, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
        ).eval()


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "list": (llama, Q | {"trainable_token_indices": SOME}),
    "padding": (llama, Q | {"trainable_token_indices": [0, *SOME]}),
    "half": (lambda: llama(dtype=torch.bfloat16), Q | {"trainable_token_indices": SOME}),
    "dict": (llama, Q | {"trainable_token_indices": {"embed_tokens": SOME, "lm_head": [1, 39]}}),
    "tied": (tied_llama, Q | {"trainable_token_indices": SOME}),
    "tied by the same rows": (tied_llama, Q | {"trainable_token_indices": {"embed_tokens": SOME, "lm_head": SOME}}),
    "untied by others": (tied_llama, Q | {"trainable_token_indices": {"embed_tokens": SOME, "lm_head": [1, 39]}}),
    "GPT-2": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "trainable_token_indices": SOME}),
    "positions": (
        gpt2,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "trainable_token_indices": {"wpe": [2]}},
    ),
    "scaled": (scaled, Q | {"trainable_token_indices": SOME}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    """A model and options."""
    pytest.importorskip("peft")
    return CASES[request.param]


def test_names_outputs_and_gradients_are_pefts(case: tuple[Callable[[], nn.Module], dict[str, Any]]) -> None:
    make, options = case
    ours, theirs = both(make, train=False, **options)
    assert close({"": output(ours)}, {"": output(make())})
    assert dtypes(ours) == dtypes(theirs)
    for model in (ours, theirs):
        scatter(model)
    assert not torch.equal(output(ours), output(make()))
    half = next(make().parameters()).dtype == torch.bfloat16
    if half:  # PEFT adds up the gradients of rows that occur several times in bfloat16, ours too but in another order
        assert close({"": output(ours)}, {"": output(theirs)})
        assert close(gradients(ours), gradients(theirs), 2e-2)
    else:
        assert same_step(ours, theirs)
    assert close(others_in_file(ours), pefts_others(theirs, ours), 0)


def test_folders_load_in_each_other(case: tuple[Callable[[], nn.Module], dict[str, Any]], tmp_path: Path) -> None:
    import peft

    make, options = case
    ours, theirs = both(make, **options)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert close({"": output(LoraModel.from_pretrained(make(), tmp_path / "theirs"))}, {"": output(theirs)})
    assert close({"": output(peft.PeftModel.from_pretrained(make(), tmp_path / "ours"))}, {"": output(ours)})
    lean = LoraModel.from_pretrained(make(), tmp_path / "ours", low_cpu_mem_usage=True)
    assert close({"": output(lean)}, {"": output(ours)})


def tuned(make: Callable[[], nn.Module] = tied_llama, **more: Any) -> LoraModel:
    """A model some rows of whose embedding are trained, from the start."""
    return LoraModel(make(), LoraConfig(**({"r": 2, "trainable_token_indices": SOME} | Q | more)))


def test_a_tied_head_with_a_bias_keeps_it() -> None:
    """PEFT leaves the bias of a tied head out."""
    model = tuned(padded_bert, target_modules=["query"])
    assert close({"": output(model)}, {"": output(padded_bert())})
    scatter(model)
    decoder = model.model.cls.predictions.decoder
    assert isinstance(decoder, TrainedTokens)
    x = torch.randn(2, 16)
    assert close({"": decoder(x)}, {"": functional.linear(x, decoder.weight, decoder.base_layer.bias)})
    merged = output(model)
    assert close({"": output(model.merge_and_unload())}, {"": merged}, 1e-5)


def test_gradients_of_frequent_rows_are_scaled_as_the_embedding_says() -> None:
    base = nn.Sequential(nn.Embedding(10, 4, padding_idx=3, scale_grad_by_freq=True), nn.Linear(4, 4))
    x = torch.tensor([[1, 2, 1, 3], [3, 5, 1, 9]])
    expected = copy.deepcopy(base)
    (expected(x) ** 2).sum().backward()
    model = LoraModel(base, LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [9, 3, 1]}))
    (model(x) ** 2).sum().backward()
    rows = model.model[0].token_adapter.trainable_tokens_delta["default"]
    assert close({"": rows.grad}, {"": expected[0].weight.grad[[9, 3, 1]]})
    assert torch.equal(rows.grad[1], torch.zeros(4))  # that of the padding


class Positions(nn.Embedding):
    """An embedding that counts its rows itself."""

    def forward(self, x: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """Rows of the positions."""
        return super().forward(torch.arange(x.shape[1], device=x.device) + offset)


class Table(nn.Module):
    """A model with such an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.at, self.out = Positions(9, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Positions from 2."""
        y: torch.Tensor = self.out(self.at(x, offset=2))
        return y


def test_an_embedding_with_a_forward_pass_of_its_own_runs_it() -> None:
    base, x = Table(), torch.zeros(1, 5)
    model = LoraModel(base, LoraConfig(r=2, target_modules=["out"], trainable_token_indices={"at": [8, 2, 4]}))
    scatter(model)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.at.base_layer.weight.copy_(model.model.at.weight)
        changed.model.at.remove("default")
    assert close({"": model(x)}, {"": changed(x)})
    model(x).sum().backward()
    grads = model.model.at.token_adapter.trainable_tokens_delta["default"].grad
    assert [bool(row.any()) for row in grads] == [False, True, True]


def test_the_wrapper_answers_for_the_embedding() -> None:
    model = tuned()
    part, head = model.model.model.embed_tokens, model.model.lm_head
    assert (part.num_embeddings, part.embedding_dim, part.padding_idx, head.out_features) == (40, 16, 0, 40)
    scatter(model)
    assert torch.equal(part.weight[SOME], part.token_adapter.trainable_tokens_delta["default"])
    others = [row for row in range(40) if row not in SOME]
    assert torch.equal(part.weight[others], part.base_layer.weight[others])
    assert torch.equal(head.weight, part.weight)
    with model.disable_adapter():
        assert part.weight is part.base_layer.weight
    assert len(trained(model)) == 3
    assert not [name for name in model.state_dict() if "lm_head.token_adapter" in name]


def test_several_adapters() -> None:
    model = tuned()
    scatter(model)
    one = output(model)
    other = [row for row in range(1, 40) if row not in SOME][:2]
    model.add_adapter("two", LoraConfig(r=2, **Q, trainable_token_indices=other))
    model.add_adapter("three", LoraConfig(r=2, **Q, trainable_token_indices=[SOME[0]]))
    assert torch.equal(output(model), one)
    model.set_adapter("two")
    assert {name.rpartition(".")[2] for name in trained(model) if "token_adapter" in name} == {"two"}
    scatter(model)
    rows = [output(model)]
    model.set_adapter(["default", "two"])
    assert torch.equal(
        model.model.lm_head.weight[other], model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["two"]
    )
    with pytest.raises(ConfigError, match=rf"'default' and 'three' both train row {SOME[0]} of an embedding"):
        model.set_adapter(["default", "three"])
    with pytest.raises(ConfigError, match="both train row"):
        model.merge_adapter(["default", "three"])
    assert model.active_adapters == ["default", "two"]
    mixed = output(model, adapter_names=["two", "default", "__base__"])
    with model.disable_adapter():
        base = output(model)
    assert close({"0": mixed[0], "1": mixed[1], "2": mixed[2]}, {"0": rows[0][0], "1": one[1], "2": base[2]}, 1e-5)
    with pytest.raises(ArgumentError, match="2 entries for a batch of 3 rows"):
        output(model, adapter_names=["two", "default"])
    model.delete_adapter("two")
    model.delete_adapter("three")
    model.set_adapter("default")
    assert torch.equal(output(model), one)


@pytest.mark.parametrize("make", [llama, tied_llama])
def test_merging_writes_the_rows_and_unloading_gives_the_model_back(make: Callable[[], nn.Module]) -> None:
    base = make()
    before, plain = picture(base), output(base)
    model = tuned(lambda: base)
    scatter(model)
    expected = output(model)
    model.merge_adapter()
    assert close({"": output(model)}, {"": expected}, 1e-5)
    rows = model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    assert torch.equal(model.model.model.embed_tokens.base_layer.weight[SOME], rows)
    with model.disable_adapter():
        assert torch.equal(output(model), plain)
    assert torch.equal(output(model), expected)
    model.merge_adapter()
    for part in model.parts().values():
        part.disable_adapters = True
    assert torch.equal(output(model), plain)
    model.enable_adapter_layers()
    model.merge_adapter()
    model.unload()
    assert picture(base) == before
    again = tuned(lambda: base)
    scatter(again)
    assert close({"": output(again.merge_and_unload())}, {"": expected}, 1e-5)
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == (make is tied_llama)


def test_deep_copies_and_state_dicts_are_whole() -> None:
    model = tuned()
    scatter(model)
    expected = output(model)
    twin = copy.deepcopy(model)
    fresh = tuned()
    fresh.load_state_dict(model.state_dict())
    scatter(model)
    assert torch.equal(output(twin), expected)
    assert torch.equal(output(fresh), expected)
    assert twin.model.lm_head.holder("default") is twin.model.model.embed_tokens.token_adapter


def test_meta_rows_take_no_memory_until_they_are_filled() -> None:
    model = LoraModel(tied_llama(), LoraConfig(**Q, trainable_token_indices=SOME), low_cpu_mem_usage=True)
    part = model.model.model.embed_tokens
    (rows,) = part.parameters_of("default")
    assert rows.is_meta
    with pytest.raises(ArtefactError, match=r"has shape \(2, 16\) in the file, where this model takes \(3, 16\)"):
        part.load_others("default", {"token_adapter.trainable_tokens_delta": torch.ones(2, 16)})
    part.load_others("default", {"token_adapter.trainable_tokens_delta": torch.ones(3, 16)})
    assert next(part.parameters_of("default")) is rows
    assert torch.equal(part(torch.tensor([SOME[1]])), torch.ones(1, 16))
    assert torch.equal(model.model.lm_head.weight[SOME], torch.ones(3, 16))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trainable_token_indices": [40]}, ConfigError, "row 40 of 'model.embed_tokens', which has rows 0 to 39"),
        ({"trainable_token_indices": {"embed_token": [4]}}, TargetError, "'embed_token', .* closest: 'embed_tokens'"),
        ({"trainable_token_indices": {"mlp": [4]}}, ConfigError, "'model.layers.0.mlp', a LlamaMLP: rows can be"),
        (
            {"trainable_token_indices": [4], "target_modules": ["embed_tokens"]},
            ConfigError,
            "cannot have rows trained alone .* there is a LoRA layer of adapter 'default'",
        ),
    ],
)
def test_what_cannot_be_leaves_the_model_as_it_was(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    base = llama()
    before = picture(base)
    with pytest.raises(error, match=message):
        LoraModel(base, LoraConfig(**(Q | options)))
    assert picture(base) == before


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([3, -1], ConfigError, "an entry of trainable_token_indices=-1 cannot be: expected an integer of at least 0"),
        ([3, 4, 3], ConfigError, "trainable_token_indices names 3 twice"),
        ({"embed_tokens": [3, 3]}, ConfigError, r"trainable_token_indices\['embed_tokens'\] names 3 twice"),
        ([], ConfigError, "trainable_token_indices is empty"),
        ([1.5], ConfigError, "an entry of trainable_token_indices=1.5"),
        ("3", ArgumentError, "is a str, but a list of integers was expected"),
    ],
)
def test_indices_that_cannot_be(indices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LoraConfig(trainable_token_indices=indices)


def test_an_embedding_that_rewrites_itself_is_refused() -> None:
    base = nn.Sequential(nn.Embedding(10, 4, max_norm=1.0), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="'0', an embedding with max_norm"):
        LoraModel(base, LoraConfig(target_modules=["1"], trainable_token_indices={"0": [1]}))


def test_tied_layers_with_different_rows_cannot_be_kept_tied() -> None:
    base = tied_llama()
    before = picture(base)
    with pytest.raises(ConfigError, match=r"gives 'model.embed_tokens' the rows \[3\] and 'lm_head', .* rows \[4\]"):
        LoraModel(
            base,
            LoraConfig(**Q, trainable_token_indices={"embed_tokens": [3], "lm_head": [4]}, ensure_weight_tying=True),
        )
    assert picture(base) == before
