"""Adapters saved at one number of ranks load at another, bitwise."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smartinit.errors import ArtefactError, ConfigError, MissingFileError, ModelError, OutputError, VerificationError
from smartinit.formats.megatron_folder import MARKER, ShardedFolder
from smartinit.megatron import CanonicalLoRA, DoRA, LoRA, load_adapter, save_adapter
from smartinit.megatron.shards import adapter_shards
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear
from smartinit.megatron.walk import adapted_layers

if TYPE_CHECKING:
    from ranks import Ranks

HIDDEN, FFN, RANK, EXPERTS = 16, 24, 8, 4
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


class Config:
    gated_linear_unit = True
    hidden_size = HIDDEN
    ffn_hidden_size = FFN
    moe_router_topk = 2


class Layer(nn.Module):
    """A layer of a decoder with attention, dense MLP and both kinds of experts, as far as adapters see it."""

    def __init__(self, number: int, tp: Any, ep: Any, parallel: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer_number = number
        both: dict[str, Any] = dict(tp_group=tp, config=Config())

        def mlp(**more: Any) -> dict[str, nn.Module]:
            fc1 = ColumnParallelLinear(HIDDEN, 2 * FFN, stride=2, **both, **more)
            return {"linear_fc1": fc1, "linear_fc2": RowParallelLinear(FFN, HIDDEN, **both, **more)}

        qkv = ColumnParallelLinear(HIDDEN, 2 * HIDDEN, tp_group=tp).to(dtype)
        proj = RowParallelLinear(HIDDEN, HIDDEN, tp_group=tp)
        self.self_attention = nn.ModuleDict({"linear_qkv": qkv, "linear_proj": proj})
        local = EXPERTS // parallel
        grouped = nn.ModuleDict(mlp(is_expert=True, num_gemms=local))
        sequential = nn.ModuleDict({"local_experts": nn.ModuleList(nn.ModuleDict(mlp()) for _ in range(local))})
        for experts in (grouped, sequential):
            experts.ep_group, experts.num_local_experts = ep, local
        self.mlp = nn.ModuleDict({**mlp(), "moe": nn.ModuleDict({"experts": grouped}), "experts": sequential})


class Model(nn.Module):
    def __init__(self, layers: range, *args: Any) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Layer(i + 1, *args) for i in layers)


def group_of(size: int, stride: int = 1) -> Any:
    """This rank's group of `size` ranks, `stride` apart; None for one alone."""
    if not dist.is_initialized():
        return None
    mine = None
    world = dist.get_world_size()
    for start in range(world):
        if start // stride % size == 0:
            members = [start + i * stride for i in range(size)]
            group = dist.new_group(members)
            mine = group if dist.get_rank() in members else mine
    return mine if size > 1 else None


def build(tp: int, ep: int, pp: int, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    """This rank's part of the model: neighbours are tensor-parallel, then expert-parallel, then stages."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    stage = (dist.get_rank() if world > 1 else 0) // (world // pp)
    layers = range(stage * 2 // pp, (stage + 1) * 2 // pp)
    model = Model(layers, group_of(tp), group_of(ep, tp), ep, dtype)
    return LoRA(**{"target_modules": TARGETS, "dim": RANK, **options})(model)


def set_random(model: nn.Module, options: dict[str, Any]) -> None:
    """Every factor from its name in the whole model: what a rank has does not depend on how many there are."""
    for place, layer in adapted_layers(model):
        base, adapter = layer.base, layer.adapter
        shared = adapter.expert and options.get("share_expert_adapters", True)
        name = place.experts_name if shared else place.whole_name
        generator = torch.Generator().manual_seed(sum(map(ord, name)) * 7919 % 2**31 + len(name))
        a_shape, b_shape = adapter.whole_shapes()
        if len(a_shape) == 3:
            every = [(EXPERTS, *shape[1:]) for shape in (a_shape, b_shape)]
            a, b = (torch.randn(shape, generator=generator) for shape in every)
            own = slice(place.first_expert, place.first_expert + base.experts)
            a, b = a[own], b[own]
        else:
            a, b = (torch.randn(shape, generator=generator) for shape in (a_shape, b_shape))
        adapter.set_whole(a, b)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".adapter." in name}


def save(folder: str, shape: tuple[int, int, int], options: dict[str, Any]) -> list[str]:
    options = dict(options)
    model = build(*shape, **options)
    set_random(model, options)
    options.pop("dtype", None)
    save_adapter(model, folder, LoRA(**{"target_modules": TARGETS, "dim": RANK, **options}))
    return sorted(model.state_dict())


def load(folder: str, shape: tuple[int, int, int], options: dict[str, Any]) -> int:
    """How many tensors were compared, all equal."""
    model = build(*shape, **options)
    set_random(model, options)
    expected = values(model)
    for p in model.parameters():
        p.data.zero_()
    config = load_adapter(model, folder)
    assert config["dim"] == RANK
    found = values(model)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    return len(found)


SHAPES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 1, 1)]
OPTIONS = [dict(), dict(share_expert_adapters=False), dict(normalize_moe_lora=True, alpha=16, dtype=torch.bfloat16)]


def ranks_for(request: pytest.FixtureRequest, shape: tuple[int, int, int]) -> Ranks:
    return request.getfixturevalue("four_ranks" if max(shape) == 4 or shape.count(2) == 2 else "two_ranks")


@pytest.mark.parametrize("options", OPTIONS, ids=["shared", "own", "normalised"])
def test_shards_load_at_any_number_of_ranks(
    request: pytest.FixtureRequest, tmp_path: Path, options: dict[str, Any]
) -> None:
    saved = []
    for i, shape in enumerate(SHAPES):
        folder = str(tmp_path / str(i))
        if i == 0:
            save(folder, shape, options)  # a single process
        else:
            ranks_for(request, shape).run(save, folder, shape, options)
        saved.append(ShardedFolder.open(folder))
        assert sorted(path.name[:6] for path in Path(folder).iterdir() if path.name != MARKER) == ["shard-"] * len(
            list(Path(folder).glob("*.safetensors"))
        )
    for other in saved[1:]:
        assert list(other.keys()) == list(saved[0].keys())
        for key in other.keys():  # noqa: SIM118 - not a dict
            assert torch.equal(other.read(key), saved[0].read(key)), key
            assert other.shape(key) == saved[0].shape(key)
    for i, shape in enumerate(SHAPES[1:], 1):
        ranks_for(request, shape).run(load, str(tmp_path / str(len(SHAPES) - i)), shape, options)
    for i in range(len(SHAPES)):
        assert load(str(tmp_path / str(i)), (1, 1, 1), options) > 0


def outcome(case: str, folder: str) -> tuple[str, str, bool]:
    """Class and text of what a rank raises, and whether its weights are what they were."""
    rank = dist.get_rank()
    options = {"dim16": dict(dim=16), "alpha": dict(alpha=8), "experts": dict(share_expert_adapters=False)}.get(
        case, {}
    )
    options |= {"fewer": dict(target_modules=["linear_qkv"]), "more": dict()}.get(case, {})
    model = build(2, 1, 1, **options)
    set_random(model, options)
    if case == "nan" and rank == 1:
        next(layer for _, layer in adapted_layers(model)).adapter.linear_in.weight.data[0, 0] = float("nan")
    if case == "merged" and rank == 1:
        next(layer for _, layer in adapted_layers(model)).merged = True
    if case == "unlike" and rank == 1:
        layer = next(layer for _, layer in adapted_layers(model))
        layer.adapter.linear_in.weight.data = layer.adapter.linear_in.weight.data.double()
    before = values(model)
    try:
        if case in {"nan", "there", "unlike"}:
            save_adapter(model, folder)
        else:
            load_adapter(model, folder)
        found = ("", "")
    except Exception as error:  # noqa: BLE001 - the test looks at its class
        found = (type(error).__name__, str(error))
    after = values(model)
    return *found, all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)


@pytest.fixture(scope="module")
def saved_folder(two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    two_ranks.run(save, str(folder), (2, 1, 1), {})
    return folder


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("dim16", ConfigError, "has dim 8 in .*, and 16 in the model; adapt the model with dim=8"),
        ("alpha", ConfigError, "has alpha 32.* in .*, and 8 in the model"),
        ("experts", ConfigError, r"is \(8, 16\) in .*, and \(4, 8, 16\) in the model"),
        ("fewer", ConfigError, "which the model has no place for"),
        ("merged", ConfigError, "rank 1: .*is merged into its base weight"),
        ("nan", VerificationError, "rank 1: .*holds NaN or Inf; it is not written"),
        ("there", OutputError, "exists already"),
        ("unlike", ModelError, "is .* of float64 on rank 1, and .* of float32 before it"),
    ],
)
def test_an_error_on_one_rank_is_an_error_on_all_and_changes_nothing(
    two_ranks: Ranks, saved_folder: Path, tmp_path: Path, case: str, error: type[Exception], words: str
) -> None:
    folder = tmp_path / "new" if case in {"nan", "unlike"} else saved_folder
    before = sorted(path.name for path in saved_folder.iterdir())
    results = two_ranks.run(outcome, case, str(folder))
    assert [kind for kind, _, _ in results] == [error.__name__] * 2
    assert all(unchanged for _, _, unchanged in results)
    assert re.search(words, " ".join(text for _, text, _ in results))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob(".*"))
    assert sorted(path.name for path in saved_folder.iterdir()) == before


def test_a_folder_that_lost_something_changes_nothing(saved_folder: Path, tmp_path: Path) -> None:
    model = build(1, 1, 1)
    before = values(model)

    def broken(name: str) -> Path:
        return Path(shutil.copytree(saved_folder, tmp_path / name))

    lost = broken("lost")
    (lost / "shard-00001-of-00002.safetensors").unlink()
    short = broken("short")
    file = short / "shard-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    unfinished = broken("unfinished")
    (unfinished / MARKER).unlink()
    fewer = broken("fewer")
    listed = json.loads((fewer / MARKER).read_text())
    gone = listed["tensors"].popitem()[0]
    (fewer / MARKER).write_text(json.dumps(listed))
    for folder, error, words in (
        (lost, MissingFileError, "copy the whole folder"),
        (short, ArtefactError, "copy the whole folder again"),
        (unfinished, MissingFileError, "is not finished"),
        (fewer, ConfigError, f"holds no '{gone}'"),
        (tmp_path / "none", MissingFileError, "there is no folder"),
    ):
        with pytest.raises(error, match=words):
            load_adapter(model, folder)
    after = values(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_without_adapters_there_is_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapters"):
        save_adapter(nn.Linear(2, 2), tmp_path / "adapter")


def test_options_are_noted(tmp_path: Path) -> None:
    lora = LoRA(target_modules=["linear_fc1"], dim=4, alpha=8, dropout=0.1, lora_dtype=torch.bfloat16)
    model = lora(Model(range(1), None, None, 1, torch.float32))
    save_adapter(model, tmp_path / "named", lora)
    save_adapter(model, tmp_path / "bare")
    save_adapter(model, tmp_path / "bare", force=True)
    named, bare = (ShardedFolder.open(tmp_path / name).config for name in ("named", "bare"))
    assert (named["dropout"], named["lora_dtype"], named["share_expert_adapters"]) == (0.1, "bfloat16", True)
    for config in (named, bare):
        assert (config["peft_type"], config["dim"], config["alpha"]) == ("lora", 4, 8)
        assert config["target_modules"] == ["linear_fc1"]
        assert config["gated_linear_unit"] is True
    assert load_adapter(model, tmp_path / "bare") == bare
    with pytest.raises(OutputError, match="force=True"):
        save_adapter(model, tmp_path / "bare")


def drift(folder: str) -> list[str]:
    """Warnings of a rank whose replica has other numbers than the first rank's."""
    torch.manual_seed(0)
    model = LoRA(["linear_fc1"], dim=RANK)(Model(range(1), None, None, 1, torch.float32))
    next(layer for _, layer in adapted_layers(model)).adapter.linear_in.weight.data += dist.get_rank()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_adapter(model, folder)
    return [str(one.message) for one in caught]


def test_replicas_are_saved_once_and_their_drift_is_told(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(drift, str(tmp_path / "adapter"))
    assert not first
    assert len(second) == 1
    assert "on rank 1 than on rank 0, whose are saved" in second[0]
    assert [path.name for path in (tmp_path / "adapter").glob("*.safetensors")] == ["shard-00000-of-00002.safetensors"]


def save_other(folder: str, kind: str) -> None:
    """Weights that depend on nothing but their name, in shards."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    peft = DoRA(TARGETS, dim=RANK) if kind == "dora" else CanonicalLoRA(["linear_fc1_up", "linear_proj"], dim=RANK)
    model = peft(Model(range(2), group_of(size), None, 1, torch.float32))
    for key, shard in adapter_shards(model).items():
        name = re.sub(r"local_experts\.\d+", "local_experts", key)  # they share one adapter
        whole = torch.randn(shard.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
        for ranges, at in shard.parts:
            into = tuple(slice(first, first + b - a) for first, (a, b) in zip(at, ranges, strict=True))
            shard.parameter.data[into] = whole[tuple(slice(*pair) for pair in ranges)]
    before = values(model)
    save_adapter(model, folder, peft)
    for parameter in model.parameters():
        parameter.data.zero_()
    load_adapter(model, folder)
    after = values(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["dora", "canonical_lora"])
def test_other_kinds_of_adapters_load_at_another_number_of_ranks(two_ranks: Ranks, tmp_path: Path, kind: str) -> None:
    save_other(str(tmp_path / "one"), kind)
    two_ranks.run(save_other, str(tmp_path / "two"), kind)
    one, two = (ShardedFolder.open(tmp_path / name) for name in ("one", "two"))
    assert one.config["peft_type"] == two.config["peft_type"] == kind
    assert list(one.keys()) == list(two.keys())
    for key in one.keys():  # noqa: SIM118 - not a dict
        assert torch.equal(one.read(key), two.read(key)), key
