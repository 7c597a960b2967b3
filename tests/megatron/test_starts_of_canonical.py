"""Every method beside the projections of fused layers: each starts as a layer of its own would, on all ranks alike."""

from __future__ import annotations

import warnings
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from starting import FFN, METHODS, RANK, VOCABULARY, H, Model, batches, loss, relative, whole_weight
from torch import nn
from torch.nn import functional

import smartinit
from smartinit.adapters.parallel.collectives import total
from smartinit.adapters.parallel.split import SplitAdapter
from smartinit.errors import ConfigError, ModelError
from smartinit.formats.rows import join_rows
from smartinit.megatron import CanonicalLoRA, LoRA
from smartinit.megatron.moe_stand_ins import SequentialMLP, TEGroupedMLP
from smartinit.megatron.stand_ins import ColumnParallelLinear
from smartinit.megatron.walk import adapted_layers

if TYPE_CHECKING:
    from pathlib import Path

    from ranks import Ranks
    from starting import Options

HEADS, GROUPS, WIDTH, ALPHA = 8, 4, 2, 8
CONFIG = SimpleNamespace(num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=WIDTH, gated_linear_unit=True)
TARGETS = ["linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1_gate", "linear_fc1_up", "linear_fc2"]
SEPARABLE = [name for name, kind in METHODS.items() if kind.effect != "quantises"]


def rows_of(part: str) -> list[int]:
    """The rows of the fused weight, of one process, that are a projection's, in its own order."""
    if part in ("adapter_gate", "adapter_up"):
        first = 0 if part == "adapter_gate" else FFN
        return list(range(first, first + FFN))
    per_group, found = HEADS // GROUPS, []
    units = {"adapter_q": [*range(per_group)], "adapter_k": [per_group], "adapter_v": [per_group + 1]}[part]
    for group in range(GROUPS):
        found += [(group * (per_group + 2) + unit) * WIDTH + i for unit in units for i in range(WIDTH)]
    return found


PARTS = {"linear_qkv": ("adapter_q", "adapter_k", "adapter_v"), "linear_fc1": ("adapter_gate", "adapter_up")}


def attentive(group: Any = None, sequence: bool = False) -> Model:
    model = Model(group, sequence)
    model.config = CONFIG
    return model


class Separate(nn.Module):
    """The same model with plain layers, one for each projection; batch first inside."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.embedding = model.embedding
        self.layers = nn.ModuleList([nn.ModuleDict(self.block(block)) for block in model.layers])

    @staticmethod
    def block(block: Any) -> dict[str, nn.Module]:
        made: dict[str, nn.Module] = {}
        for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "plain"):
            layer = getattr(block, name)
            pieces = {part: rows_of(part) for part in PARTS.get(name, ())}
            linears = {part: linear(layer.weight[rows], layer.bias[rows]) for part, rows in pieces.items()}
            made[name] = nn.ModuleDict(linears) if linears else linear(layer.weight, layer.bias)
        return made

    @staticmethod
    def fused(parts: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.new_zeros(*x.shape[:-1], sum(part.out_features for part in parts.values()))
        for name, part in parts.items():
            y = y.index_copy(-1, torch.tensor(rows_of(name)), part(x))
        return y

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer["linear_proj"](torch.tanh(self.fused(layer["linear_qkv"], x)))
            gate, up = self.fused(layer["linear_fc1"], x).chunk(2, -1)
            x = x + layer["linear_fc2"](functional.silu(gate) * up)
            x = x + layer["plain"](x)
        return x.transpose(0, 1)


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.load_state_dict({"weight": weight.detach().clone(), "bias": bias.detach().clone()})
    return made


def adapt(model: nn.Module, method: Any, data: Any = None, **options: Any) -> tuple[CanonicalLoRA, Any]:
    """The configuration, and the artefact if there is one."""
    targets = options.pop("targets", TARGETS)
    canonical = CanonicalLoRA(targets, dim=RANK, alpha=ALPHA, lora_A_init_method=method, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        canonical(model)
    if not METHODS[method].needs:
        return canonical, None
    return canonical, canonical.initialize(model, data or batches(), loss_fn=loss, show_progress_bar=False)


def factors_of(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for place, layer in adapted_layers(model):
        if isinstance(layer.adapter, SplitAdapter):
            found.update({f"{place.whole_name}.{part}": own.whole() for part, own in layer.adapter.items()})
        else:
            found[place.whole_name] = layer.adapter.whole()
    return found


def started(method: str, sequence: bool, parallel: bool = True) -> Options:
    """What one method makes of the model on this rank: whole factors and weights, and outputs before and after."""
    torch.manual_seed(0)
    model = attentive(dist.group.WORLD if parallel else None, sequence)
    probe = batches(1, seed=9)[0]
    with torch.no_grad():
        before = model(**probe)
        adapt(model, method)
        after = model(**probe)
    weights = {place.whole_name: whole_weight(layer) for place, layer in adapted_layers(model)}
    return {"factors": factors_of(model), "weights": weights, "before": before, "after": after}


@cache
def alone(method: str) -> Options:
    return started(method, False, parallel=False)


def same_start(method: str, ours: Any, theirs: Any, allowed: float = 1e-5) -> bool:
    """Whether two pairs are one start: the same factors where B or A is zero, else the same product."""
    if METHODS[method].effect == "keeps":
        return all(relative(one, other) < allowed for one, other in zip(ours, theirs, strict=True))
    return relative(ours[1].double() @ ours[0].double(), theirs[1].double() @ theirs[0].double()) < allowed


@pytest.mark.parametrize("method", SEPARABLE)
def test_projections_start_as_layers_of_their_own(method: str) -> None:
    model = attentive()
    plain = Separate(model)
    names = [f"layers.0.{layer}.{part}" for layer, parts in PARTS.items() for part in parts]
    names += ["layers.0.linear_proj", "layers.0.linear_fc2"]
    config = smartinit.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)
    options: Options = dict(planner="uniform", loss_fn=loss, show_progress_bar=False)
    found = alone(method)
    if METHODS[method].needs is None and not METHODS[method].needs_weight:
        expected = None  # random numbers, of another seed
    else:
        expected = smartinit.compute(plain, config, batches(), method=method, **options)
    originals = dict(attentive().named_parameters())
    assert sorted(found["factors"]) == sorted(names)
    for name, (a, b) in found["factors"].items():
        if expected is not None:
            pair = expected.factors[name]
            assert same_start(method, (a, b), (pair.a, pair.b), 2e-4), name
        layer, _, part = name.partition(".adapter_")
        rows = rows_of(f"adapter_{part}") if part else slice(None)
        original, now = originals[f"{layer}.weight"].detach()[rows], found["weights"][layer][rows]
        given = ALPHA / RANK * b @ a if METHODS[method].effect == "splits" else torch.zeros_like(original)
        torch.testing.assert_close(now + given, original, rtol=1e-5, atol=1e-5)
        assert torch.equal(now, original) == (METHODS[method].effect != "splits"), name
    if METHODS[method].effect == "shifts":
        assert relative(found["after"], found["before"]) > 1e-3
    else:
        torch.testing.assert_close(found["after"], found["before"], rtol=1e-4, atol=1e-5)


CENTRAL = ["gaussian", "pissa", "eva", "corda", "lora_ga", "lora_one"]


def central(sequence: bool) -> dict[str, Options]:
    return {method: started(method, sequence) for method in CENTRAL}


@pytest.mark.parametrize(("world", "sequence"), [("two", False), ("two", True), ("four", True)])
def test_any_number_of_ranks_starts_as_one_process(request: pytest.FixtureRequest, world: str, sequence: bool) -> None:
    ranks: Ranks = request.getfixturevalue(f"{world}_ranks")
    results = ranks.run(central, sequence)
    for method in CENTRAL:
        expected, first = alone(method), results[0][method]
        for result in results:
            found = result[method]
            torch.testing.assert_close(found["after"], expected["after"], rtol=1e-4, atol=1e-4)
            for name, pair in expected["factors"].items():
                assert all(map(torch.equal, found["factors"][name], first["factors"][name])), (method, name)
                assert same_start(method, found["factors"][name], pair), (method, name)
            for name, weight in expected["weights"].items():
                assert relative(found["weights"][name], weight) < 1e-5, (method, name)


def test_q_k_and_v_read_one_statistic() -> None:
    model = attentive()
    _, artefact = adapt(model, "eva")
    shared = {tuple(name.removeprefix("layers.0.") for name in site) for site in artefact.sites}
    of_layers = {layer: tuple(f"{layer}.{part}" for part in parts) for layer, parts in PARTS.items()}
    assert shared == {*of_layers.values(), ("linear_proj",), ("linear_fc2",)}
    factors = factors_of(model)
    for part in ("adapter_k", "adapter_v"):
        assert torch.equal(factors[f"layers.0.linear_qkv.{part}"][0], factors["layers.0.linear_qkv.adapter_q"][0])


def test_projections_without_adapter_stay_and_splits_are_given_back_once() -> None:
    model = attentive()
    originals = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    canonical, _ = adapt(model, "pissa", targets=["linear_k", "linear_v", "linear_fc1_up"])
    for layer, parts in (("linear_qkv", ("adapter_k", "adapter_v")), ("linear_fc1", ("adapter_up",))):
        now, before = model.layers[0].get_submodule(layer).to_wrap.weight, originals[f"layers.0.{layer}.weight"]
        changed = [row for part in parts for row in rows_of(part)]
        others = [row for row in range(len(before)) if row not in changed]
        assert torch.equal(now[others], before[others])
        assert relative(now[changed], before[changed]) > 0.1
    model.layers[0].linear_qkv.adapter["adapter_k"].linear_in.weight.data[0, 0] += 1  # as if trained
    with pytest.raises(
        ModelError, match=r"'layers.0.linear_qkv.adapter_k' has given up an earlier start.*restore_base"
    ):
        canonical.initialize(model, show_progress_bar=False)
    assert not any("given_up" in key for key in model.state_dict())
    canonical.restore_base(model)
    canonical.restore_base(model)  # there is nothing more to give back
    for name, weight in originals.items():
        if name.endswith(".weight") and "embedding" not in name:
            layer = model.get_submodule(name.removesuffix(".weight"))
            assert relative(getattr(layer, "to_wrap", layer).weight.detach(), weight) < 1e-6
    canonical.initialize(model, show_progress_bar=False)


def applied(folder: str) -> Options:
    """A stored start, on this many ranks; and what the base is once it was given back."""
    model = attentive(dist.group.WORLD if dist.is_initialized() else None)
    canonical = CanonicalLoRA(TARGETS, dim=RANK, alpha=ALPHA)
    canonical(model)
    canonical.apply(model, smartinit.Artefact.load(folder))
    found = {"factors": factors_of(model), "weights": weights_of(model)}
    canonical.restore_base(model)
    return {**found, "restored": weights_of(model)}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {place.whole_name: whole_weight(layer).clone() for place, layer in adapted_layers(model)}


def test_a_start_is_saved_and_applied_at_another_number_of_ranks(two_ranks: Ranks, tmp_path: Path) -> None:
    model = attentive()
    originals = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    _, artefact = adapt(model, "corda")
    assert "layers.0.linear_qkv.adapter_v" in artefact.factors
    artefact.save(tmp_path / "start")
    factors, weights = factors_of(model), weights_of(model)
    for found in two_ranks.run(applied, str(tmp_path / "start")):
        for name, (a, b) in factors.items():
            assert relative(found["factors"][name][0], a) < 1e-6
            assert relative(found["factors"][name][1], b) < 1e-6
        for name, weight in weights.items():
            assert relative(found["weights"][name], weight) < 1e-6
            assert relative(found["restored"][name], originals[f"{name}.weight"]) < 1e-6


def test_a_part_of_a_weight_is_not_quantised() -> None:
    model = attentive()
    with pytest.raises(
        ConfigError, match=r"'loftq' quantises base weights, but that of 'layers.0.linear_qkv.adapter_q'"
    ):
        CanonicalLoRA(TARGETS, dim=RANK, lora_A_init_method="loftq")(model)
    assert not any(True for _ in adapted_layers(model))
    CanonicalLoRA(["linear_proj"], dim=RANK, lora_A_init_method="loftq")(model)  # which is a layer of its own
    said = r"rank 12 of 'layers.0.linear_qkv.adapter_k'.* is above min\(out, in\) = 8"
    with pytest.raises(ConfigError, match=said):
        CanonicalLoRA(["linear_k"], dim=12, lora_A_init_method="pissa")(attentive())
    with pytest.raises(ConfigError, match="'eva', which starts B as well"):
        CanonicalLoRA(["linear_k"], lora_A_init_method="eva", lora_B_init_method="xavier")(attentive())


class Routed(nn.Module):
    """Tokens to experts by their numbers: each token has one."""

    def __init__(self, kind: str, group: Any = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.embedding = nn.Embedding(VOCABULARY, H)
        nn.init.normal_(self.embedding.weight, generator=generator)
        make = SequentialMLP if kind == "sequential" else TEGroupedMLP
        self.mlp = nn.ModuleDict({"experts": make(2, H, FFN, config=CONFIG, tp_group=group, generator=generator)})
        self.group = group
        if kind == "grouped":  # with the weights of the other kind
            for i, expert in enumerate(Routed("sequential", group).mlp["experts"].local_experts):
                for name in ("linear_fc1", "linear_fc2"):
                    weight = getattr(expert, name).weight.data
                    getattr(self.mlp["experts"], name).get_parameter(f"weight{i}").data.copy_(weight)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids).reshape(-1, H)
        order = (input_ids.reshape(-1) % 2).argsort(stable=True)
        counts = torch.bincount(input_ids.reshape(-1) % 2, minlength=2)
        y = total(self.mlp["experts"](x[order], counts, torch.ones(len(x)))[0], self.group)
        return torch.empty_like(y).index_copy(0, order, y)


def experts_started(kind: str, parallel: bool = True) -> Options:
    """By method: factors of each expert's gate and up, outputs before and after, names in the artefact."""
    out = {}
    tokens = {"input_ids": torch.arange(200).reshape(4, 50) % VOCABULARY}
    for method in ("pissa", "eva", "lora_ga"):
        model = Routed(kind, dist.group.WORLD if parallel else None)
        before = model(**tokens).detach()
        targets = ["linear_fc1_gate", "linear_fc1_up"]
        _, artefact = adapt(model, method, [tokens], targets=targets)
        pairs = {}
        for name, pair in factors_of(model).items():
            part = name.rpartition(".")[2]
            if kind == "sequential":
                pairs[part, int(name.split("local_experts.")[1][0])] = pair
            else:
                pairs.update({(part, i): (pair[0][i], pair[1][i]) for i in range(2)})
        names = [] if artefact is None else sorted(artefact.factors)
        out[method] = {"pairs": pairs, "before": before, "after": model(**tokens).detach(), "names": names}
    return out


def test_each_expert_starts_by_its_own_rows_and_tokens(two_ranks: Ranks) -> None:
    expected = experts_started("sequential", parallel=False)
    found = [experts_started("grouped", parallel=False)]
    found += [result for kind in ("sequential", "grouped") for result in two_ranks.run(experts_started, kind)]
    assert found[0]["eva"]["names"] == [
        f"mlp.experts.linear_fc1.weight{i}.adapter_{part}" for i in range(2) for part in ("gate", "up")
    ]
    for method, one in expected.items():
        assert len(one["pairs"]) == 4
        for result in found:
            torch.testing.assert_close(result[method]["after"], one["before"], rtol=1e-4, atol=1e-5)
            for key, pair in one["pairs"].items():
                assert same_start(method, result[method]["pairs"][key], pair), (method, key)


class Gathering(nn.Module):
    """A gated layer whose output every rank has as a whole, in the order of the ranks."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(VOCABULARY, H)
        options: Options = dict(tp_group=group, stride=2, config=CONFIG, gather_output=True)
        self.linear_fc1 = ColumnParallelLinear(H, 2 * FFN, **options)
        self.size = dist.get_world_size() if group is not None else 1

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        y = self.linear_fc1(self.embedding(input_ids).transpose(0, 1))[0]
        gate, up = join_rows(y.chunk(self.size, -1), gated=True, dim=-1).chunk(2, -1)
        return functional.silu(gate) * up


def gathering() -> list[Options]:
    out = []
    for kind, targets in ((LoRA, ["linear_fc1"]), (CanonicalLoRA, ["linear_fc1_gate", "linear_fc1_up"])):
        model = Gathering(dist.group.WORLD if dist.is_initialized() else None)
        peft = kind(targets, dim=RANK, alpha=ALPHA, lora_A_init_method="lora_ga")
        with pytest.warns(UserWarning, match="reads data"):
            peft(model)
        peft.initialize(model, batches(), loss_fn=loss, show_progress_bar=False)
        out.append(factors_of(model))
    return out


def test_gradients_of_a_gathered_gated_output_are_in_the_order_of_one_process(two_ranks: Ranks) -> None:
    for expected, *found in zip(gathering(), *two_ranks.run(gathering), strict=True):
        for one in found:
            for name, pair in expected.items():
                assert same_start("lora_ga", one[name], pair), name


def test_a_fused_layer_that_is_not_parallel_starts_as_well() -> None:
    fused = nn.Linear(H, (HEADS + 2 * GROUPS) * WIDTH)
    fused.config = CONFIG
    before = fused.weight.detach().clone()
    layer: Any = CanonicalLoRA(["linear_v"], dim=RANK, lora_A_init_method="pissa").transform(fused, "linear_qkv")
    a, b = layer.adapter["adapter_v"].whole()
    u, s, v = torch.linalg.svd(before[rows_of("adapter_v")].double())
    best = u[:, :RANK] * s[:RANK] @ v[:RANK]
    assert relative(layer.adapter["adapter_v"].scaling * b @ a, best) < 1e-5
    assert relative(fused.weight.detach()[rows_of("adapter_v")], before[rows_of("adapter_v")].double() - best) < 1e-5
