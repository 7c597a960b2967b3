"""Swapping weights in place: compiled code is used again, and computes with what the new folder says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from smartinit.adapters import LoraModel
from smartinit.config import LoraConfig
from smartinit.errors import ArtefactError, ConfigError, UnknownNameError
from smartinit.formats.peft import TENSOR_FILE
from tests.adapters.beside_peft import llama, output, picture, scatter

if TYPE_CHECKING:
    from pathlib import Path


class Net(nn.Module):
    """An embedding, a convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.emb = nn.Embedding(12, 6)
            self.conv = nn.Conv1d(6, 8, 3, padding=1)
            self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.emb(tokens).transpose(1, 2)).mean(2)
        y: torch.Tensor = self.down(self.up(x).tanh())
        return y


TOKENS = torch.arange(24).reshape(4, 6) % 12
ALL = ["emb", "conv", "up", "down"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "small": {"r": 2, "lora_alpha": 3, "target_modules": ALL},
    "large": {"r": 6, "lora_alpha": 5, "target_modules": ALL, "use_rslora": True},
    "mixed": {"r": 3, "lora_alpha": 7, "target_modules": ALL, "rank_pattern": {"up": 5}, "alpha_pattern": {"emb": 2}},
    "partial": {"r": 4, "lora_alpha": 9, "target_modules": ["up"]},
    "biased": {"r": 2, "target_modules": ["up", "down"], "lora_bias": True},
    "biased, partial": {"r": 3, "lora_alpha": 5, "target_modules": ["up"], "lora_bias": True},
    "dora": {"r": 2, "target_modules": ALL, "use_dora": True},
    "dora, large": {"r": 4, "lora_alpha": 3, "target_modules": ALL, "use_dora": True},
    "whole": {"r": 2, "target_modules": ["up"], "modules_to_save": ["down"], "bias": "all"},
    "whole, large": {"r": 4, "target_modules": ["up"], "modules_to_save": ["down"], "bias": "all"},
}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Folders of adapters with random values."""
    for number, (name, options) in enumerate(ADAPTERS.items()):
        model = LoraModel(Net(), LoraConfig(**options))
        scatter(model)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.mul_(1 + number / 4)
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in ADAPTERS}


def fresh(folder: Path) -> torch.Tensor:
    """The output of a model that loads a folder anew."""
    with torch.no_grad():
        y: torch.Tensor = LoraModel.from_pretrained(Net(), folder).eval()(TOKENS)
    return y


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything in its state dict, copied."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def test_three_swaps_compile_nothing_anew(folders: dict[str, Path]) -> None:
    model = LoraModel.from_pretrained(Net(), folders["small"]).eval()
    model.prepare_for_hotswap(6)
    assert torch.allclose(model(TOKENS), fresh(folders["small"]), 0, 1e-6)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(TOKENS)
        frames = counter.frame_count
        assert frames > 0
        for name in ("large", "mixed", "partial", "small"):
            model.hotswap_adapter(folders[name])
            assert torch.allclose(compiled(TOKENS), fresh(folders[name]), 0, 1e-6), name
            assert counter.frame_count == frames, name
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places


def test_without_preparation_a_swap_is_seen_by_compiled_code_as_well(folders: dict[str, Path]) -> None:
    """The reason for tensors as scalings: a number in the code costs another compilation, but is never a wrong one."""
    model = LoraModel.from_pretrained(Net(), folders["large"]).eval()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(TOKENS)
        frames = counter.frame_count
        model.hotswap_adapter(folders["small"])
        assert torch.allclose(compiled(TOKENS), fresh(folders["small"]), 0, 1e-6)
    assert counter.frame_count > frames


@pytest.mark.parametrize(
    ("first", "then"),
    [("biased", "biased, partial"), ("biased, partial", "biased, partial"), ("dora", "dora, large"),
     ("whole", "whole, large"), ("mixed", "small"), ("small", "partial")],
)  # fmt: skip
def test_a_swapped_adapter_is_the_one_of_the_folder(
    first: str, then: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = LoraModel.from_pretrained(Net(), folders[first], is_trainable=True).eval()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.prepare_for_hotswap(6)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert torch.allclose(model(TOKENS), fresh(folders[first]), 0, 1e-6)
    model.hotswap_adapter(folders[then])
    wanted = fresh(folders[then])
    assert torch.allclose(model(TOKENS), wanted, 0, 1e-6)
    given = {key: tensor for key, tensor in load_file(folders[then] / TENSOR_FILE).items() if "_A" in key}
    for name, layer in model.lora_layers().items():
        rank = next((len(tensor) for key, tensor in given.items() if key.split(".")[2] == name), 0)
        a, b = layer.matrices("default")
        assert a[:rank].any() == (rank > 0)
        assert not a[rank:].any()
        assert not b[:, rank:].any()
    # It is an adapter of the larger rank from now on, wherever it goes.
    model.save_pretrained(tmp_path / "out")
    assert torch.allclose(fresh(tmp_path / "out"), wanted, 0, 1e-6)
    assert {tensor.shape[0] for key, tensor in load_file(tmp_path / "out" / TENSOR_FILE).items() if "_A" in key} == {6}
    if not first.startswith(("dora", "biased", "whole")):
        model.merge_adapter()
        assert torch.allclose(model(TOKENS), wanted, 0, 1e-5)
        model.unmerge_adapter()
    before = model(TOKENS)
    for layer in model.lora_layers().values():
        layer.scale_layer(2.0)
        layer.unscale_layer()
    assert torch.allclose(model(TOKENS), before, 0, 1e-6)


def test_zeros_stay_zeros_in_training(folders: dict[str, Path]) -> None:
    model = LoraModel.from_pretrained(Net(), folders["small"], is_trainable=True)
    model.prepare_for_hotswap(5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(TOKENS).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    for layer in model.lora_layers().values():
        a, b = layer.matrices("default")
        assert a[:2].any()
        assert not a[2:].any()
        assert not b[:, 2:].any()


def test_pefts_folders_swap_to_pefts_outputs(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for number, rank in enumerate((2, 5)):
        options = {"r": rank, "lora_alpha": 3 + rank, "target_modules": ["q_proj", "v_proj"]}
        theirs = peft.get_peft_model(llama(), peft.LoraConfig(**options, init_lora_weights=False))
        theirs.save_pretrained(tmp_path / str(number))
    model = LoraModel.from_pretrained(llama(), tmp_path / "0")
    model.prepare_for_hotswap(8)
    model.hotswap_adapter(tmp_path / "1")
    assert torch.allclose(output(model), output(theirs), 0, 1e-6)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ("partial", "small", "has layer 'conv', where adapter 'default' of this model has none"),
        ("small", "dora", "has use_dora=False, but the one in .* has True"),
        ("small", "biased", "has lora_bias=False, but the one in .* has True"),
        ("partial", "whole", "has bias='none', but the one in .* has 'all'"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    first: str, then: str, message: str, prepared: bool, folders: dict[str, Path]
) -> None:
    model = LoraModel.from_pretrained(Net(), folders[first])
    if prepared:
        model.prepare_for_hotswap(6)
    before, wanted = values(model), picture(model)
    with pytest.raises(ArtefactError, match=message):
        model.hotswap_adapter(folders[then])
    assert picture(model) == wanted
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_rank_without_room_and_a_layer_of_another_shape(folders: dict[str, Path], tmp_path: Path) -> None:
    model = LoraModel.from_pretrained(Net(), folders["small"])
    before = values(model)
    with pytest.raises(
        ArtefactError, match=r"rank 6 in layer 'emb', .* room for 2; call prepare_for_hotswap\(target_rank=6"
    ):
        model.hotswap_adapter(folders["large"])
    other = Net()
    other.up = nn.Linear(8, 12)
    other.down = nn.Linear(12, 4)
    LoraModel(other, LoraConfig(r=2, target_modules=ALL)).save_pretrained(tmp_path / "other")
    with pytest.raises(ArtefactError, match=r"\(2, 8\) and \(12, 2\) for layer 'up', .* \(2, 8\) and \(10, 2\)"):
        model.hotswap_adapter(tmp_path / "other")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_whole_modules_must_be_the_same_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["up"], "bias": "all", "modules_to_save": ["conv"]}
    LoraModel(Net(), LoraConfig(**options)).save_pretrained(tmp_path / "other")
    model = LoraModel.from_pretrained(Net(), folders["whole"])
    before = values(model)
    with pytest.raises(ArtefactError, match=r"'base_model\.model\..*' is only in one of adapter 'default' and"):
        model.hotswap_adapter(tmp_path / "other")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_what_cannot_be_prepared_or_swapped(folders: dict[str, Path]) -> None:
    model = LoraModel.from_pretrained(Net(), folders["mixed"])
    before = picture(model)
    with pytest.raises(ConfigError, match="has rank 5 in layer 'up', above target_rank=4"):
        model.prepare_for_hotswap(4)
    with pytest.raises(UnknownNameError, match="no adapter 'two'"):
        model.hotswap_adapter(folders["small"], "two")
    assert picture(model) == before
    model.merge_adapter()
    for swap in (lambda: model.prepare_for_hotswap(8), lambda: model.hotswap_adapter(folders["small"])):
        with pytest.raises(ConfigError, match="is merged into the base weights"):
            swap()
    model.unmerge_adapter()
    model.compile(backend="eager")
    with pytest.raises(ConfigError, match="is compiled already"):
        model.prepare_for_hotswap(8)


def test_an_adapter_that_was_split_from_its_base_is_not_swapped(folders: dict[str, Path], tmp_path: Path) -> None:
    from smartinit.adapters.attach import write_factors
    from smartinit.factors import Factors
    from smartinit.planning.plan import Plan

    split = LoraModel(Net(), LoraConfig(r=2, lora_alpha=2, target_modules=["up"]))
    pair = Factors(torch.randn(2, 8) / 8, torch.randn(10, 2) / 8, effect="splits")
    write_factors(split, {"up": pair}, Plan({"up": 2}, {"up": 2}))
    split.save_pretrained(tmp_path / "split")
    plain = LoraModel.from_pretrained(Net(), folders["partial"])
    with pytest.raises(ConfigError, match="split' was split from its base"):
        plain.hotswap_adapter(tmp_path / "split")
    with pytest.raises(ConfigError, match="layer 'up' of adapter 'default' was split from its base"):
        split.hotswap_adapter(folders["partial"])


TIED = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}


def tied(rank: int, seed: int, **options: Any) -> LoraModel:
    """A model whose head shares its embedding's weight, with an adapter on it of random values."""
    adapted = LoraModel(llama(tie_word_embeddings=True), LoraConfig(r=rank, lora_alpha=3, **(TIED | options)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.normal_(std=0.3)
    return adapted


def test_tied_factors_stay_tied(tmp_path: Path) -> None:
    model = tied(2, 1)
    wanted, size = output(model), model.get_nb_trainable_parameters()[0]
    model.prepare_for_hotswap(4)
    assert model.get_nb_trainable_parameters()[0] == 2 * size
    assert torch.allclose(output(model), wanted, 0, 1e-6)
    embedding, head = model.lora_layers().values()
    assert head.r == embedding.r == {"default": 4}
    for one, other in zip(head.matrices("default"), reversed(embedding.matrices("default")), strict=True):
        assert one.data_ptr() == other.data_ptr()
        assert torch.equal(one, other.T)
    for rank in (4, 3):
        other_model = tied(rank, rank)
        other_model.save_pretrained(tmp_path / str(rank))
        model.hotswap_adapter(tmp_path / str(rank))
        assert torch.allclose(output(model), output(other_model), 0, 1e-6)
    model.save_pretrained(tmp_path / "again")
    loaded = LoraModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "again")
    assert torch.allclose(output(loaded), output(model), 0, 1e-6)


@pytest.mark.parametrize(
    ("mine", "theirs", "option"),
    [
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": [5, 7]}, "trainable_token_indices"),
        ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": [2, 1]}, "trainable_token_indices"),
        (
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
            {"trainable_token_indices": {"embed_tokens": [2], "lm_head": [1]}},
            "trainable_token_indices",
        ),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({"target_parameters": ["q_proj.weight"]}, {"target_parameters": ["k_proj.weight"]}, "target_parameters"),
        ({"ensure_weight_tying": True, "trainable_token_indices": [1]}, {"trainable_token_indices": [1]}, "ensure_"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_adapters_that_train_something_else_are_not_swapped(
    mine: dict[str, Any], theirs: dict[str, Any], option: str, turned: bool, tmp_path: Path
) -> None:
    if turned:
        mine, theirs = theirs, mine
    tie = "ensure_weight_tying" in mine | theirs
    make = (lambda: llama(tie_word_embeddings=True)) if tie else llama
    targets = {"r": 2, "target_modules": ["v_proj"]}
    LoraModel(make(), LoraConfig(**targets, **theirs)).save_pretrained(tmp_path)
    model = LoraModel(make(), LoraConfig(**targets, **mine))
    before, wanted = values(model), picture(model)
    with pytest.raises(ArtefactError, match=f"has {option}.*, but the one in"):
        model.hotswap_adapter(tmp_path)
    assert picture(model) == wanted
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_same_rows_may_be_named_in_two_ways(tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["v_proj"]}
    other = LoraModel(llama(), LoraConfig(**options, trainable_token_indices={"embed_tokens": [4, 2]}))
    scatter(other)
    other.save_pretrained(tmp_path)
    model = LoraModel(llama(), LoraConfig(**options, trainable_token_indices=[4, 2]))
    model.hotswap_adapter(tmp_path)
    assert torch.equal(output(model), output(other))
