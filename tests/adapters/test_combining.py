"""Weighted combinations of adapters against PEFT's, on linear layers, Conv1D, convolutions and embeddings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from smartinit.adapters import LoraModel
from smartinit.adapters.start import Start
from smartinit.config import LoraConfig
from smartinit.errors import ArgumentError, ConfigError, ModelError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from smartinit.errors import SmartinitError

# PEFT asks every transformers model for a property that transformers has renamed, and warns where one module has
# several adapters.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]

FACTORWISE = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
PRUNED = tuple(kind for kind in FACTORWISE if kind != "linear")
KINDS = (*FACTORWISE, "cat", "svd", *(f"{kind}_svd" for kind in PRUNED))
WEIGHTS = [0.7, -1.3, 2]


class Pictures(nn.Module):
    """An embedding, convolutions with a large and with a point-sized kernel, a linear layer: (b, 36) -> (b, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Embedding(20, 8)
        self.wide = nn.Conv2d(8, 10, 3, padding=1)
        self.point = nn.Conv2d(10, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        x = self.colours(input_ids).unflatten(1, (3, -1)).permute(0, 3, 1, 2)
        return self.head(self.point(self.wide(x).relu()).mean((2, 3)))


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Callable[[str], nn.Module]:
    """A model by the name of its kind, with equal weights in every call."""

    def made(kind: str) -> nn.Module:
        if kind != "pictures":
            return request.getfixturevalue(f"tiny_{kind}")()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Pictures().eval()

    return made


TARGETS = {
    "llama": [["q_proj", "v_proj"], ["q_proj", "up_proj"], ["q_proj", "v_proj"]],
    "gpt2": [["c_attn", "c_fc"], ["c_attn"], ["c_fc", "c_attn"]],
    "pictures": [["colours", "wide", "head"], ["wide", "point"], ["colours", "point", "head"]],
}


def configs_of(kind: str, ranks: tuple[int, ...] = (4, 4, 4), **options: object) -> list[dict[str, Any]]:
    """Options of three adapters with different targets and scalings."""
    alphas = (4, 10, 3)
    return [
        {"r": r, "lora_alpha": alpha, "target_modules": targets, "fan_in_fan_out": kind == "gpt2"} | options
        for r, alpha, targets in zip(ranks, alphas, TARGETS[kind], strict=True)
    ]


def both(
    kind: str, make: Callable, fill: Callable, ranks: tuple[int, ...] = (4, 4, 4), **options: object
) -> tuple[LoraModel, Any]:
    """Ours and PEFT's model with the same three adapters "0", "1", "2", "0" being active."""
    peft = pytest.importorskip("peft")
    first, *more = configs_of(kind, ranks, **options)
    ours = LoraModel(make(kind), LoraConfig(**first), "0")
    theirs = peft.get_peft_model(make(kind), peft.LoraConfig(**first), "0")
    for number, config in enumerate(more, 1):
        ours.add_adapter(str(number), LoraConfig(**config))
        theirs.add_adapter(str(number), peft.LoraConfig(**config))
    for model in (ours, theirs):
        fill(model)
    return ours, theirs


@pytest.fixture
def fill(seed: int) -> Callable[[nn.Module], None]:
    """Random values in all matrices, by the rest of the name after the base model's, ours and PEFT's alike."""

    def filled(model: nn.Module) -> None:
        found = {n[n.index("model.") :].removeprefix("model."): p for n, p in model.named_parameters() if "lora_" in n}
        found = {name.removeprefix("model."): p for name, p in found.items()}
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name in sorted(found):
                values = torch.randn(found[name].shape, generator=generator, dtype=torch.float64)
                found[name].copy_(values / 4)

    return filled


def _with(model: nn.Module, adapter: str) -> list[tuple[str, Any]]:
    return [
        (name.removeprefix("base_model.").removeprefix("model."), layer)
        for name, layer in model.named_modules()
        if any(adapter in getattr(layer, part, ()) for part in ("lora_A", "lora_embedding_A"))
    ]


def products(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """``s·B A`` of one adapter by the name of its module, (out, in) in float64, of ours and of PEFT's."""
    found = {}
    for name, layer in _with(model, adapter):
        part = "lora_" if adapter in layer.lora_A else "lora_embedding_"
        pair = [getattr(layer, part + side)[adapter] for side in "AB"]
        a, b = ((p.weight if isinstance(p, nn.Module) else p).detach().double().flatten(1) for p in pair)
        found[name] = b @ a * layer.scaling[adapter]
    return found


def assert_same(
    ours: nn.Module, theirs: nn.Module, adapter: str, tolerance: float, gaps: dict[str, float] | None = None
) -> None:
    """Every product, relative to its norm; where it is a truncated one, in float32, as far as the gap allows."""
    mine, other = products(ours, adapter), products(theirs, adapter)
    assert mine.keys() == other.keys()
    for name, product in mine.items():
        allowed = tolerance + 1e-6 / gaps[name] if gaps else tolerance
        assert torch.linalg.norm(product - other[name]) <= allowed * torch.linalg.norm(other[name]), name


@pytest.fixture
def add_to_both(seed: int, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """Combines in ours and in PEFT's model, from the same seed; gives the relative gaps behind what PEFT keeps."""

    def add(ours: LoraModel, theirs: Any, *arguments: object, **options: object) -> dict[str, float]:
        torch.manual_seed(seed)
        ours.add_weighted_adapter(*arguments, **options)
        spectra, svd = [], torch.linalg.svd

        def recorded(*matrix: object, **more: object) -> tuple[torch.Tensor, ...]:
            found = svd(*matrix, **more)
            spectra.append(found[1])
            return found

        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "svd", recorded)
            torch.manual_seed(seed)
            theirs.add_weighted_adapter(*arguments, **options)
        if not spectra:
            return {}
        gaps = {}
        for (name, layer), sigma in zip(_with(theirs, "new"), spectra, strict=True):
            after = sigma[layer.r["new"] : layer.r["new"] + 1].sum()
            gaps[name] = max(float(((sigma[: layer.r["new"]][-1] - after) / sigma[0]).detach()), 1e-7)
        return gaps

    return add


def picture(model: LoraModel) -> tuple[Any, ...]:
    """Everything that combining might change."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    weights = [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()]
    layers = [(dict(layer.r), dict(layer.scaling), layer.active_adapters) for layer in model.lora_layers().values()]
    return modules, weights, layers, list(model.peft_config), model.active_adapters


# -- beside PEFT ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("combination", KINDS)
@pytest.mark.parametrize("model", TARGETS)
def test_the_same_products_as_pefts(
    model: str, combination: str, count: int, make: Callable, fill: Callable, add_to_both: Callable
) -> None:
    ours, theirs = both(model, make, fill)
    names = [str(number) for number in range(count)]
    gaps = add_to_both(ours, theirs, names, WEIGHTS[:count], "new", combination, density=0.6)
    assert bool(gaps) == combination.endswith("svd")
    assert_same(ours, theirs, "new", 1e-6, gaps)


@pytest.mark.parametrize("combination", ["linear", "cat", "dare_ties"])
def test_factors_are_pefts_bit_for_bit(combination: str, make: Callable, fill: Callable, seed: int) -> None:
    ours, theirs = both("llama", make, fill)
    for wrapped in (ours, theirs):
        torch.manual_seed(seed)
        wrapped.add_weighted_adapter(["0", "1"], [0.7, -1.3], "new", combination, density=0.5)
    name = "model.layers.0.self_attn.q_proj"
    mine = ours.lora_layers()[name].matrices("new")
    layer = theirs.base_model.model.get_submodule(name)
    assert torch.equal(mine[0], layer.lora_A["new"].weight)
    assert torch.equal(mine[1], layer.lora_B["new"].weight)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_equal_seeds_drop_the_same_entries_whatever_the_start(
    init: bool | str, make: Callable, fill: Callable, seed: int
) -> None:
    ours, theirs = both("pictures", make, fill, init_lora_weights=init)
    for wrapped in (ours, theirs):
        torch.manual_seed(seed)
        wrapped.add_weighted_adapter(["0", "2"], [1.0, 0.5], "new", "dare_linear", density=0.3)
    assert_same(ours, theirs, "new", 1e-6)
    assert ours.peft_config["new"].init_lora_weights is True, "it has been made, and is not made again"


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("combination", ["ties", "ties_svd", "dare_ties_svd"])
def test_both_elections_are_pefts(
    combination: str, method: str, make: Callable, fill: Callable, add_to_both: Callable
) -> None:
    ours, theirs = both("gpt2", make, fill)
    options = {"density": 0.8, "majority_sign_method": method}
    gaps = add_to_both(ours, theirs, ["0", "1", "2"], WEIGHTS, "new", combination, **options)
    assert_same(ours, theirs, "new", 1e-6, gaps)


@pytest.mark.parametrize("combination", ["cat", "svd", "ties_svd"])
def test_adapters_of_different_ranks(combination: str, make: Callable, fill: Callable, add_to_both: Callable) -> None:
    ours, theirs = both("llama", make, fill, ranks=(2, 5, 3))
    gaps = add_to_both(ours, theirs, ["0", "1", "2"], WEIGHTS, "new", combination, density=0.5)
    assert_same(ours, theirs, "new", 1e-6, gaps)
    ranks = {name.rpartition(".")[2]: layer.r["new"] for name, layer in ours.lora_layers().items()}
    # PEFT's are 10 and 5 everywhere, filled up with zeros: here no rank is wasted.
    assert (
        ranks
        == {
            "cat": {"q_proj": 10, "v_proj": 5, "up_proj": 5},
            "svd": {"q_proj": 5, "v_proj": 5, "up_proj": 5},
            "ties_svd": {"q_proj": 5, "v_proj": 5, "up_proj": 5},
        }[combination]
    )


@pytest.mark.parametrize("combination", ["svd", "dare_linear_svd"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_rank_of_ones_own(combination: str, rank: int, make: Callable, fill: Callable, add_to_both: Callable) -> None:
    ours, theirs = both("gpt2", make, fill)
    options = {"svd_rank": rank, "density": 0.9, "svd_full_matrices": False}
    gaps = add_to_both(ours, theirs, ["0", "2"], [0.5, 1.5], "new", combination, **options)
    assert_same(ours, theirs, "new", 1e-6, gaps)
    assert {layer.r["new"] for layer in ours.lora_layers().values()} == {rank}


def test_one_adapter_is_only_scaled(make: Callable, fill: Callable) -> None:
    ours, theirs = both("llama", make, fill)
    for wrapped in (ours, theirs):
        wrapped.add_weighted_adapter(["1"], [-0.4], "new", "ties_svd")
    assert_same(ours, theirs, "new", 1e-6)
    for name, product in products(ours, "new").items():
        torch.testing.assert_close(product, -0.4 * products(ours, "1")[name])


@pytest.mark.parametrize("combination", ["svd", "cat", "linear"])
def test_rank_stabilised_adapters(combination: str, make: Callable, fill: Callable) -> None:
    """PEFT multiplies their combination by √r once more: it keeps ``use_rslora`` and sets ``alpha = r``."""
    ours, theirs = both("llama", make, fill, use_rslora=True)
    for wrapped in (ours, theirs):
        wrapped.add_weighted_adapter(["0", "1"], [0.5, 1.5], "new", combination)
    mine, other = products(ours, "new"), products(theirs, "new")
    rank = 8 if combination == "cat" else 4
    for name, product in mine.items():
        torch.testing.assert_close(product * math.sqrt(rank), other[name], rtol=1e-4, atol=1e-5)
    assert {layer.scaling["new"] for layer in ours.lora_layers().values()} == {1.0}


@pytest.mark.parametrize("share", [0.9, 0.99, 1.0])
def test_clamping(share: float, make: Callable, fill: Callable) -> None:
    ours, _ = both("llama", make, fill)
    ours.add_weighted_adapter(["0", "1"], [1.0, 0.5], "new", "svd", svd_clamp=share)
    ours.add_weighted_adapter(["0", "1"], [1.0, 0.5], "free", "svd")
    for layer in ours.lora_layers().values():
        if not layer.has("new"):
            continue
        free = [matrix.detach().double().numpy() for matrix in layer.matrices("free")]
        entries = np.concatenate([matrix.ravel() for matrix in free])
        limit = np.quantile(np.concatenate([entries, -entries]), share)
        for matrix, unclamped in zip(layer.matrices("new"), free, strict=True):
            np.testing.assert_allclose(matrix.detach().numpy(), np.clip(unclamped, -limit, limit), atol=1e-6)


def test_clamping_is_nearly_pefts(make: Callable, fill: Callable) -> None:
    """Not exactly: PEFT's limit depends on the signs that LAPACK happens to give singular vectors."""
    ours, theirs = both("llama", make, fill)
    for wrapped in (ours, theirs):
        wrapped.add_weighted_adapter(["0", "2"], [1.0, 0.5], "new", "svd", svd_clamp=0.95)
        wrapped.add_weighted_adapter(["0", "2"], [1.0, 0.5], "free", "svd")
    clamped, free = (products(ours, name) for name in ("new", "free"))
    for name, expected in products(theirs, "new").items():
        assert torch.linalg.norm(clamped[name] - expected) < 0.3 * torch.linalg.norm(free[name] - expected), name


def test_dropping_at_random_keeps_the_expectation(make: Callable, fill: Callable, seed: int) -> None:
    model, _ = both("llama", make, fill)
    torch.manual_seed(seed)
    name = "model.layers.0.self_attn.q_proj"
    total, runs, sizes = torch.zeros(32, 32, dtype=torch.float64), 60, []
    for _ in range(runs):
        model.add_weighted_adapter(["0", "1"], [0.7, -1.3], "new", "dare_linear_svd", density=0.5, svd_rank=32)
        drawn = products(model, "new")[name]
        sizes.append(torch.linalg.norm(drawn).item() ** 2)
        total += drawn / runs
        model.delete_adapter("new")
    parts = [products(model, adapter)[name] * weight for adapter, weight in (("0", 0.7), ("1", -1.3))]
    expected, spread = sum(parts), math.sqrt(sum(float((part**2).sum()) for part in parts))
    # At density 1/2 an entry is 0 or twice itself, so its variance is its square.
    assert torch.linalg.norm(total - expected).item() == pytest.approx(spread / math.sqrt(runs), rel=0.15)
    assert np.mean(sizes) == pytest.approx(torch.linalg.norm(expected).item() ** 2 + spread**2, rel=0.1)


# -- what the new adapter is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_saved_for_peft_with_equal_logits(
    model: str, combination: str, make: Callable, fill: Callable, tokens: torch.Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    patterns = {"rank_pattern": {"c_fc": 2, "v_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    ours = LoraModel(make(model), LoraConfig(**configs_of(model)[0] | patterns), "0")
    ours.add_adapter("2", LoraConfig(**configs_of(model)[2] | patterns, use_rslora=True))
    fill(ours)
    ours.add_weighted_adapter(["0", "2"], [0.5, -0.5], "new", combination, density=0.5)
    ours.set_adapter("new")
    ours.save_pretrained(tmp_path, selected_adapters=["new"])
    theirs = peft.PeftModel.from_pretrained(make(model), tmp_path / "new")
    again = LoraModel.from_pretrained(make(model), tmp_path / "new")
    with torch.no_grad():
        expected = ours(input_ids=tokens).logits
        assert torch.equal(theirs(input_ids=tokens).logits, expected)
        assert torch.equal(again(input_ids=tokens).logits, expected)


def test_neither_active_nor_trained(make: Callable, fill: Callable, tokens: torch.Tensor) -> None:
    model, _ = both("llama", make, fill, lora_dropout=0.5)
    model.set_adapter(["1", "0"], inference_mode=True)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "new", "cat")
    assert model.active_adapters == ["1", "0"]
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, before)
        model.set_adapter("new")
        torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad == ("new" in name) for name, p in model.named_parameters() if "lora_" in name)


def test_its_configuration(make: Callable, fill: Callable) -> None:
    model, _ = both("llama", make, fill, lora_dropout=0.25, task_type="CAUSAL_LM")
    before = model.peft_config["0"].to_dict()
    model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "new", "cat")
    config = model.peft_config["new"]
    assert model.peft_config["0"].to_dict() == before
    assert config.target_modules == {"q_proj", "v_proj", "up_proj"}
    assert (config.lora_dropout, config.task_type, config.use_rslora) == (0.25, "CAUSAL_LM", False)
    assert (config.r, config.lora_alpha) == (8, 8)
    # Only q_proj has both adapters.
    assert {name.rpartition(".")[2]: layer.r["new"] for name, layer in model.lora_layers().items()} == {
        "q_proj": 8,
        "v_proj": 4,
        "up_proj": 4,
    }


@pytest.mark.parametrize("other", [r".*\.(q|v)_proj", ["model.layers.1.self_attn.v_proj"], "all-linear"])
def test_targets_of_any_form(other: str | list[str], make: Callable, fill: Callable) -> None:
    """A set and an expression, restricted layers: PEFT refuses the one, and forgets the other."""
    model = LoraModel(make("llama"), LoraConfig(r=2, target_modules=["k_proj"], layers_to_transform=[1]), "0")
    model.add_adapter("1", LoraConfig(r=2, target_modules=other))
    fill(model)
    expected = {name for name, layer in model.lora_layers().items() if layer.adapters()}
    model.add_weighted_adapter(["0", "1"], [1.0, 2.0], "new", "svd")
    assert products(model, "new").keys() == expected
    twin = LoraModel(make("llama"), model.peft_config["new"])
    assert products(twin, "default").keys() == expected


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_layers_of_different_ranks_stay_so(make: Callable, fill: Callable) -> None:
    """PEFT gives the matrices the layer's rank and the configuration the largest: its file cannot be loaded."""
    ours, theirs = both("llama", make, fill, rank_pattern={"v_proj": 2})
    for wrapped in (ours, theirs):
        wrapped.add_weighted_adapter(["0", "2"], [1.0, 0.5], "new", "linear")
    assert_same(ours, theirs, "new", 1e-6)
    assert {name.rpartition(".")[2]: layer.r.get("new") for name, layer in ours.lora_layers().items()} == {
        "q_proj": 4,
        "v_proj": 2,
        "up_proj": None,
    }
    twin = LoraModel(make("llama"), ours.peft_config["new"])
    for name, layer in twin.lora_layers().items():
        assert (layer.r["default"], layer.scaling["default"]) == (ours.lora_layers()[name].r["new"], 1.0)


@pytest.mark.parametrize("combination", ["cat", "svd", "linear", "ties"])
def test_biases_of_adapters_add_up(combination: str, make: Callable, fill: Callable) -> None:
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn"]}
    model = LoraModel(make("gpt2"), LoraConfig(**config), "0")
    model.add_adapter("1", LoraConfig(**config, lora_bias=True))
    model.add_adapter("2", LoraConfig(**config, lora_bias=True, use_rslora=True))
    fill(model)
    model.add_weighted_adapter(["0", "1", "2"], [0.5, 2.0, -1.0], "new", combination, density=0.5)
    layer = model.lora_layers()["transformer.h.0.attn.c_attn"]
    one, two, new = (layer.lora_B[name].bias for name in ("1", "2", "new"))
    torch.testing.assert_close(new, 2.0 * 3 * one - 6 / math.sqrt(2) * two)


# -- starts that have changed the base, or are subtracted -----------------------------------------------------------


def subtract_starts(model: LoraModel, adapter: str, seed: int) -> None:
    """Give all layers of one adapter a start of rank 2 that they subtract."""
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in model.lora_layers().values():
        if layer.has(adapter):
            a, b = (
                torch.randn(shape, generator=generator) / 4
                for shape in ((2, layer.in_features), (layer.out_features, 2))
            )
            layer.start[adapter] = Start(a, b, 1.5, "offset")


@pytest.mark.parametrize("names", [["0"], ["0", "1"]])
@pytest.mark.parametrize("combination", ["cat", "svd", "magnitude_prune_svd"])
def test_the_start_that_a_layer_subtracts_counts(
    combination: str, names: list[str], make: Callable, fill: Callable, tokens: torch.Tensor, seed: int
) -> None:
    model, _ = both("llama", make, fill)
    subtract_starts(model, "0", seed)
    model.set_adapter(names)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        model.add_weighted_adapter(
            names, [1.0] * len(names), "new", combination, svd_rank=2 + 4 * len(names), density=1.0
        )
        model.set_adapter("new")
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_factors_cannot_be_added_where_a_start_is_subtracted(make: Callable, fill: Callable, seed: int) -> None:
    model, _ = both("llama", make, fill)
    subtract_starts(model, "1", seed)
    before = picture(model)
    with pytest.raises(
        ConfigError, match=r"'linear' .* subtracts a start, as '.*q_proj' does for adapter '1': use 'cat'"
    ):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "new", "linear")
    assert picture(model) == before


@pytest.mark.parametrize("combination", ["svd", "linear"])
def test_the_base_weight_is_not_decomposed_again(combination: str, make: Callable, fill: Callable) -> None:
    model = LoraModel(make("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "0")
    model.add_adapter("1", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora"))
    fill(model)
    weights = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "new", combination)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    assert model.peft_config["new"].init_lora_weights is True
    assert model.peft_config["0"].init_lora_weights == "pissa"


# -- what cannot be ---------------------------------------------------------------------------------------------------

TWO = {"adapters": ["0", "1"], "weights": [1.0, 1.0], "adapter_name": "new"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"combination_type": "tie"}, ConfigError, r"'tie' is not known: .*'linear', 'cat', 'svd'.*closest: 'ties'"),
        ({"weights": [1.0]}, ConfigError, "2 adapters and 1 weights"),
        ({"adapters": [], "weights": []}, ConfigError, "adapters is empty"),
        ({"adapters": "01"}, ArgumentError, "'01' is one string; expected a list"),
        ({"adapters": ["0", "3"]}, UnknownNameError, "no adapter '3'; it has: 0, 1, 2"),
        ({"adapter_name": "2"}, ConfigError, "already has an adapter '2'"),
        ({"weights": [1.0, math.nan]}, ConfigError, "weight of adapter '1' is nan"),
        ({"weights": [-math.inf, 1.0]}, ConfigError, "weight of adapter '0' is -inf"),
        ({"weights": [1.0, "much"]}, ArgumentError, "weight of adapter '1' must be a number, not 'much'"),
        ({"combination_type": "ties"}, ConfigError, "density=None cannot be: combination_type='ties' drops"),
        ({"combination_type": "dare_linear_svd", "density": 0.0}, ConfigError, "density=0.0 cannot be"),
        ({"combination_type": "magnitude_prune", "density": 1.5}, ConfigError, "density=1.5 cannot be"),
        ({"combination_type": "ties", "density": math.nan}, ConfigError, "density=nan cannot be"),
        ({"svd_rank": 0}, ConfigError, "svd_rank=0 cannot be"),
        ({"svd_rank": 9}, ConfigError, "svd_rank=9 is more than there is: .* above 8; give at most that"),
        (
            {"svd_rank": 33, "combination_type": "ties_svd", "density": 0.5},
            ConfigError,
            "svd_rank=33 is more .* above 32",
        ),
        ({"svd_clamp": 0.4}, ConfigError, "svd_clamp=0.4 cannot be"),
        ({"svd_driver": "gesdd"}, ConfigError, "svd_driver='gesdd' is not known"),
        ({"majority_sign_method": "mean"}, ConfigError, "majority_sign_method='mean' is not known"),
        ({"weights": [1e30, 1e30], "combination_type": "cat"}, None, ""),
        ({"weights": [1e300, 1.0]}, ModelError, r"not finite in layer '.*q_proj': give smaller weights"),
    ],
)
def test_bad_input(
    arguments: dict[str, Any], error: type[SmartinitError] | None, message: str, make: Callable, fill: Callable
) -> None:
    model, _ = both("llama", make, fill)
    before = picture(model)
    if error is None:
        model.add_weighted_adapter(**TWO | arguments)
        return
    with pytest.raises(error, match=message):
        model.add_weighted_adapter(**TWO | arguments)
    assert picture(model) == before


@pytest.mark.parametrize("combination", FACTORWISE)
def test_different_ranks_are_named(combination: str, make: Callable, fill: Callable) -> None:
    model, _ = both("llama", make, fill, ranks=(4, 3, 4))
    before = picture(model)
    with pytest.raises(ConfigError, match=r"'.*0.self_attn.q_proj' adapter '0' has rank 4 and adapter '1' rank 3: use"):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "new", combination, density=0.5)
    assert picture(model) == before
    model.add_weighted_adapter(["0", "2"], [1.0, 1.0], "new", combination, density=0.5)


@pytest.mark.parametrize("matrix", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(value: float, matrix: int, make: Callable, fill: Callable) -> None:
    model, _ = both("llama", make, fill)
    layer = model.lora_layers()["model.layers.1.self_attn.q_proj"]
    with torch.no_grad():
        layer.matrices("1")[matrix][3, 1] = value
    before = picture(model)
    with pytest.raises(ModelError, match=r"adapter '1' holds NaN or Inf in layer 'model.layers.1.self_attn.q_proj'"):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "new")
    assert picture(model) == before


def test_weights_that_are_not_loaded_are_named(make: Callable, fill: Callable) -> None:
    model, _ = both("llama", make, fill)
    model.add_adapter("empty", LoraConfig(r=2, target_modules=["q_proj"]), low_cpu_mem_usage=True)
    before = picture(model)
    with pytest.raises(ModelError, match=r"adapter 'empty' has no weights yet in layer .* load them first"):
        model.add_weighted_adapter(["0", "empty"], [1.0, 1.0], "new")
    assert picture(model) == before


def test_a_failure_on_the_way_leaves_nothing_behind(
    make: Callable, fill: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smartinit.adapters import combining

    model, _ = both("llama", make, fill)
    before, calls, real = picture(model), [], combining.combined_factors

    def fails_late(*args: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(combining, "combined_factors", fails_late)
    with pytest.raises(KeyboardInterrupt):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "new")
    assert picture(model) == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"use_dora": True}, "'1' cannot be combined, because it has use_dora=True"),
        ({"bias": "lora_only"}, "'1' cannot be combined, because it has bias='lora_only'"),
    ],
)
def test_adapters_that_have_no_combination(
    option: dict[str, Any], message: str, make: Callable, fill: Callable
) -> None:
    model, _ = both("gpt2", make, fill)
    model.delete_adapter("1")
    model.add_adapter("1", LoraConfig(r=4, target_modules=["c_attn"], **option))
    before = picture(model)
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "new")
    assert picture(model) == before


class Experts(nn.Module):
    """A bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, 6) -> (3, b, 6)."""
        return x @ self.weight


def test_bare_parameters_have_no_combination() -> None:
    model = LoraModel(nn.Sequential(nn.Linear(6, 6), Experts()), LoraConfig(r=2, target_modules=["0"]), "0")
    model.add_adapter("1", LoraConfig(r=2, target_parameters=["1.weight"]))
    before = picture(model)
    with pytest.raises(ConfigError, match=r"adapter '1' cannot be combined, because it has target_parameters=.'1.wei"):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "new", "cat")
    assert picture(model) == before


# -- whole modules and tokens -----------------------------------------------------------------------------------------

OTHERS = {"modules": {"modules_to_save": ["lm_head"]}, "tokens": {"trainable_token_indices": [3, 5]}}


@pytest.mark.parametrize("owner", ["0", "1"])
@pytest.mark.parametrize("others", OTHERS)
def test_what_one_adapter_trains_beside_its_matrices_is_taken_over(
    others: str, owner: str, make: Callable, fill: Callable, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """PEFT gives the new adapter the base model's, whatever the old one has learned."""
    peft = pytest.importorskip("peft")
    configs = configs_of("llama")
    configs[int(owner)] |= OTHERS[others]
    model = LoraModel(make("llama"), LoraConfig(**configs[0]), "0")
    model.add_adapter("1", LoraConfig(**configs[1]))
    fill(model)
    part = next(part for part in model.parts().values() if part.has(owner) and not hasattr(part, "lora_A"))
    with torch.no_grad():
        for parameter in part.parameters_of(owner):
            parameter.add_(1)
    model.set_adapter(["0", "1"])
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "new", "cat")
        assert not any(parameter.requires_grad for parameter in part.parameters_of("new"))
        model.set_adapter("new")
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
        expected = model(input_ids=tokens).logits
        for parameter in part.parameters_of(owner):
            parameter.zero_()
        assert torch.equal(model(input_ids=tokens).logits, expected), "it has a copy of its own"
        model.save_pretrained(tmp_path, selected_adapters=["new"])
        theirs = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "new")
        assert torch.equal(theirs(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("others", OTHERS)
def test_two_adapters_with_the_same_module_are_refused(others: str, make: Callable) -> None:
    model = LoraModel(make("llama"), LoraConfig(r=2, target_modules=["q_proj"], **OTHERS[others]), "0")
    model.add_adapter("1", LoraConfig(r=2, target_modules=["q_proj"], **OTHERS[others]))
    before = picture(model)
    with pytest.raises(ConfigError, match=r"'0' and '1' both have trained weights of their own for '.*(lm_head|embed)"):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "new", "cat")
    assert picture(model) == before
