"""Every method of initialisation beside parallel layers: computed for whole layers, and shared out."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from starting import (
    METHODS,
    RANK,
    TARGETS,
    Model,
    adapt,
    alone,
    batches,
    loss,
    original_weights,
    relative,
    started,
    whole_weight,
)
from torch import nn
from torch.nn import functional

import smartinit
from smartinit.convert import convert_adapter
from smartinit.errors import ArtefactError, ConfigError, DataError, ModelError, NonFiniteError, TargetError
from smartinit.megatron import DoRA, LoRA, load_adapter, save_adapter
from smartinit.megatron.walk import adapted_layers
from smartinit.methods.corda import Corda
from smartinit.methods.gaussian import Gaussian

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ranks import Ranks
    from starting import Options


def with_and_without_sequence_parallelism(method: str) -> list[Options]:
    return [started(method, sequence, precision(method)) for sequence in (False, True)]


def precision(method: str) -> torch.dtype:
    """Directions with least energy hang on the last digits of the model's own sums, whose order is another one here."""
    return torch.float64 if method == "lora_null" else torch.float32


# One of each kind of input and effect: nothing else that sets methods apart has to do with ranks.
AT_FOUR = ["gaussian", "eva", "pissa", "corda", "lora_ga", "lora_one", "loftq"]


@pytest.mark.parametrize(
    ("world", "method"), [*((2, method) for method in METHODS), *((4, method) for method in AT_FOUR)]
)
def test_the_start_is_that_of_one_process_and_the_same_on_all_ranks(
    request: pytest.FixtureRequest, world: int, method: str
) -> None:
    ranks: Ranks = request.getfixturevalue("two_ranks" if world == 2 else "four_ranks")
    expected = alone(method, precision(method))
    results = ranks.run(with_and_without_sequence_parallelism, method)
    for by_rank in zip(*results, strict=True):
        for name, (a, b) in expected["factors"].items():
            for found in by_rank:
                assert all(map(torch.equal, found["factors"][name], by_rank[0]["factors"][name]))
            ours, theirs = by_rank[0]["factors"][name]
            if METHODS[method].effect == "keeps":
                assert relative(ours, a) < 1e-5, name
                assert relative(theirs, b) < 1e-5, name
            else:
                assert relative(theirs.double() @ ours.double(), b.double() @ a.double()) < 1e-5, name
            assert relative(by_rank[0]["weights"][name], expected["weights"][name]) < 1e-5, name
        for found in by_rank:
            torch.testing.assert_close(found["before"], expected["before"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found["after"], expected["after"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_starts_where_its_base_is(method: str) -> None:
    found = alone(method)
    error = relative(found["after"], found["before"])
    if METHODS[method].effect in ("keeps", "splits"):
        assert error < 1e-5
    else:
        assert 1e-3 < error < 0.5
    changed = any(not torch.equal(found["weights"][n], w) for n, w in original_weights().items())
    assert changed == (METHODS[method].effect in ("splits", "quantises"))


class Plain(nn.Module):
    """The same layers as plain linear ones, batch first."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.embedding = model.embedding
        self.layers = nn.ModuleList(
            [nn.ModuleDict({name: linear(getattr(b, name)) for name in TARGETS}) for b in model.layers]
        )

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer["linear_proj"](torch.tanh(layer["linear_qkv"](x)))
            gate, up = layer["linear_fc1"](x).chunk(2, -1)
            x = x + layer["linear_fc2"](functional.silu(gate) * up)
            x = x + layer["plain"](x)
        return x


def linear(layer: Any) -> nn.Linear:
    made = nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
    made.load_state_dict(layer.state_dict())
    return made


@pytest.mark.parametrize("method", ["eva", "pissa", "corda"])
def test_the_start_is_that_of_plain_linear_layers(method: str) -> None:
    # As many tokens as sequences: nothing but their order tells which dimension is which.
    data = [{k: v[:, :12].repeat(4, 1) for k, v in batch.items()} for batch in batches(4)]
    for batch in data:
        batch["attention_mask"] = (torch.rand(12, 12, generator=torch.Generator().manual_seed(1)) < 0.6).long()
    model = Model()
    plain = Plain(model)
    config = smartinit.LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS, init_lora_weights=method)
    expected = smartinit.compute(plain, config, data, planner="uniform", show_progress_bar=False)
    adapt(model, method, data)
    for place, layer in adapted_layers(model):
        a, b = layer.adapter.whole()
        pair = expected.factors[place.whole_name]
        if method == "eva":
            assert relative(a, pair.a) < 1e-4, place.name
        else:
            assert relative(b @ a, pair.b @ pair.a) < 1e-4, place.name


def of_replicas(method: str, size: int) -> tuple[Options, float]:
    """Tensor parallelism in groups of ``size``; each group reads its own batches."""
    group = groups_of(size)
    number = dist.get_rank() // size
    model = Model(group, sequence=True)
    data = batches(4)
    _, artefact = adapt(model, method, data[number :: dist.get_world_size() // size])
    weights = {place.whole_name: layer.adapter.whole() for place, layer in adapted_layers(model)}
    rows = artefact.certificate["layers.0.linear_qkv"].rows
    return weights, rows


def groups_of(size: int) -> Any:
    groups = [dist.new_group(range(i, i + size)) for i in range(0, dist.get_world_size(), size)]
    return groups[dist.get_rank() // size]


@pytest.mark.parametrize("method", ["eva", "corda", "lora_ga"])
def test_ranks_that_see_the_same_data_count_once(four_ranks: Ranks, method: str) -> None:
    model = Model()
    data = batches(4)
    _, artefact = adapt(model, method, data)
    for found, rows in four_ranks.run(of_replicas, method, 2):
        assert rows == artefact.certificate["layers.0.linear_qkv"].rows
        for name, (a, b) in found.items():
            pair = artefact.factors[name]
            if method == "eva":
                assert relative(a, pair.a) < 1e-5
            else:
                assert relative(b.double() @ a.double(), pair.b.double() @ pair.a.double()) < 1e-5


def in_bfloat16(method: str) -> float:
    found = started(method, True, torch.bfloat16)
    exact = original_weights()
    worst = 0.0
    for name, (a, b) in found["factors"].items():
        original, stored = exact[name].bfloat16().double(), found["weights"][name].double()
        error = original - 2 * b.double() @ a.double() - stored
        worst = max(worst, float((error.abs() / stored.abs()).max()))
    return worst


def test_a_split_in_half_precision_is_rounded_once(two_ranks: Ranks) -> None:
    # Half a unit in the last place of eight bits, and the round-off of the product in float32.
    for worst in two_ranks.run(in_bfloat16, "pissa"):
        assert worst < 2**-8 * 1.01


def applied(folder: str) -> Options:
    """A stored start, on this many ranks."""
    model = Model(dist.group.WORLD if dist.is_initialized() else None)
    lora = LoRA(TARGETS, dim=RANK, alpha=8)
    lora(model)
    lora.apply(model, smartinit.Artefact.load(folder))
    return {p.whole_name: (*layer.adapter.whole(), whole_weight(layer)) for p, layer in adapted_layers(model)}


@pytest.mark.parametrize("method", ["eva", "corda", "loftq"])
def test_a_start_is_saved_and_applied_at_another_number_of_ranks(two_ranks: Ranks, tmp_path: Path, method: str) -> None:
    model = Model()
    lora, artefact = adapt(model, method)
    if artefact is None:  # it has started as it was made, and gives what it gave
        model = Model()
        with warnings.catch_warnings():
            lora.lora_A_init_method = "xavier"
            lora(model)
        lora.lora_A_init_method = method
        artefact = lora.initialize(model, show_progress_bar=False)
    artefact.save(tmp_path / "start")
    expected = {p.whole_name: (*layer.adapter.whole(), whole_weight(layer)) for p, layer in adapted_layers(model)}
    for found in two_ranks.run(applied, str(tmp_path / "start")):
        for name, tensors in expected.items():
            for ours, theirs in zip(found[name], tensors, strict=True):
                assert relative(ours, theirs) < 1e-6


def test_what_a_method_does_not_train_stays_frozen() -> None:
    model = Model()
    lora, _ = adapt(model, "mica")
    lora(model)  # nothing new
    for _, layer in adapted_layers(model):
        assert layer.adapter.linear_in.weight.requires_grad
        assert not layer.adapter.linear_out.weight.requires_grad
    lora.lora_A_init_method = "gaussian"
    lora.initialize(model, show_progress_bar=False)
    assert all(p.requires_grad for _, layer in adapted_layers(model) for p in layer.adapter.parameters())


def test_a_method_comes_with_its_options() -> None:
    with_option, without = Model(), Model()
    adapt(with_option, Corda(corda_method="kpm"))
    adapt(without, "corda")
    (_, one), (_, other) = next(adapted_layers(with_option)), next(adapted_layers(without))
    assert relative(one.adapter.whole()[0], other.adapter.whole()[0]) > 0.1
    LoRA(lora_A_init_method="pissa_niter_4").check()


def test_a_split_is_given_back_and_not_taken_twice() -> None:
    model = Model()
    lora, _ = adapt(model, "pissa")
    first = model.layers[0].linear_qkv.adapter.linear_out.weight
    first.data[0, 0] += 1  # as if trained
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"has given up an earlier start.*restore_base"):
        lora.initialize(model, show_progress_bar=False)
    assert unchanged(model, before)
    first.data[0, 0] -= 1
    assert not any("given_up" in key for key in model.state_dict())
    lora.restore_base(model)
    for name, weight in original_weights().items():
        assert relative(dict(model.named_modules())[name].to_wrap.weight.detach(), weight) < 1e-6
    lora.initialize(model, show_progress_bar=False)
    adapt_again = LoRA(TARGETS, dim=RANK, lora_A_init_method="loftq")
    lora.restore_base(model)
    adapt_again.initialize(model, show_progress_bar=False)
    with pytest.raises(ModelError, match="was quantised by its start"):
        adapt_again.restore_base(model)


def trained(model: nn.Module) -> torch.Tensor:
    """Outputs after one step, which changes every adapter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-3)
    probe = batches(1, seed=9)[0]
    loss(model(**probe), probe).backward()
    optimizer.step()
    return outputs(model)


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model(**batches(1, seed=9)[0])


def resumed(method: str, kind: Any, folder: str, parallel: bool, other: str) -> list[bool]:
    """Whether what was trained from a start goes on from its folder, beside a fresh model that starts by itself."""

    def fresh(word: str = method) -> tuple[nn.Module, Any]:
        model = Model(dist.group.WORLD if parallel else None)
        lora = kind(TARGETS, dim=RANK, alpha=8, lora_A_init_method=word)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lora(model)
        return model, lora

    model, lora = fresh()
    before = snapshot(model)
    artefact = lora.initialize(model, batches() if METHODS[method].needs else None, show_progress_bar=False)
    same = [METHODS[method].needs is not None or METHODS[method].effect == "quantises" or unchanged(model, before)]
    if not parallel or dist.get_rank() == 0:
        artefact.save(f"{folder}/start")
    after = trained(model)
    save_adapter(model, f"{folder}/adapter", lora)
    if parallel:
        dist.barrier()
    stored = smartinit.Artefact.load(f"{folder}/start")
    again, lora = fresh(other)
    lora.apply(again, stored)
    same.append(all(map(close, snapshot(again).values(), before.values())) or METHODS[method].needs is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the base has given up
        load_adapter(again, f"{folder}/adapter")
    same.append(relative(outputs(again), after) < 1e-5)
    with pytest.raises(ModelError, match="has been trained or loaded since"):
        lora.apply(again, stored)
    return same


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "kind", "other"),
    [
        ("pissa", LoRA, "pissa"),
        ("pissa", LoRA, "xavier"),
        ("pissa", LoRA, "olora"),
        ("pissa", DoRA, "pissa"),
        ("olora", LoRA, "olora"),
        ("corda", LoRA, "pissa"),
        ("corda", LoRA, "corda"),
    ],
)
def test_training_goes_on_from_a_start_that_is_applied_again(
    tmp_path: Path, method: str, kind: Any, other: str
) -> None:
    assert resumed(method, kind, str(tmp_path), False, other) == [True] * 3


@pytest.mark.parametrize("other", ["pissa", "olora"])
def test_training_goes_on_from_a_start_on_two_ranks(two_ranks: Ranks, tmp_path: Path, other: str) -> None:
    assert two_ranks.run(resumed, "pissa", LoRA, str(tmp_path), True, other) == [[True] * 3] * 2


def test_the_start_of_a_model_is_returned_and_is_applied_without_a_change() -> None:
    (model, lora), (second, other) = adapted_by("pissa"), adapted_by("pissa")
    before = snapshot(model)
    artefact = lora.initialize(model, provenance={"run": 7}, show_progress_bar=False)
    assert unchanged(model, before)
    assert artefact.provenance["run"] == 7
    assert artefact.recipe.method == "pissa"
    for place, layer in adapted_layers(model):
        pair = artefact.factors[place.whole_name]
        assert all(map(torch.equal, (pair.a, pair.b), layer.adapter.whole()))
    other.apply(second, artefact)
    assert unchanged(second, before)


def test_a_start_that_takes_the_place_of_another_and_fails_leaves_the_first() -> None:
    model, lora = adapted_by("pissa")
    before = snapshot(model)
    corda = LoRA(TARGETS, dim=RANK, lora_A_init_method="corda")
    with pytest.raises(DataError, match="the dataloader is empty"):
        corda.initialize(model, [], show_progress_bar=False)
    assert unchanged(model, before)
    artefact = lora.initialize(model, show_progress_bar=False)
    corda.initialize(model, batches(), show_progress_bar=False)
    assert not unchanged(model, before)
    lora.apply(model, artefact)
    assert all(map(close, snapshot(model).values(), before.values()))


def test_magnitudes_that_were_trained_stay_when_the_base_gets_its_weights_back() -> None:
    model = Model()
    lora = DoRA(TARGETS, dim=RANK, lora_A_init_method="pissa")
    lora(model)
    layer = model.layers[0].linear_fc2
    layer.adapter.weight_magnitude.data *= 1.5
    before = snapshot(layer.adapter)
    lora.restore_base(model)
    assert unchanged(layer.adapter, before)
    assert relative(layer.to_wrap.weight.detach(), original_weights()["layers.0.linear_fc2"]) < 1e-6


def test_a_single_module_is_started_as_well() -> None:
    block = Model().layers[0]
    before = block.linear_qkv.weight.detach().clone()
    lora = LoRA(["linear_qkv"], dim=RANK, lora_A_init_method="pissa")
    layer: Any = lora.transform(block.linear_qkv, "linear_qkv")
    a, b = layer.adapter.whole()
    torch.testing.assert_close(layer.to_wrap.weight + layer.adapter.scaling * b @ a, before)
    assert relative(layer.to_wrap.weight.detach(), before) > 0.1


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


WRONG = [
    ({"lora_A_init_method": "pisa"}, r"lora_A_init_method='pisa' is not known.*closest: 'pissa'"),
    ({"lora_A_init_method": "eva", "lora_B_init_method": "xavier"}, r"'eva', which starts B as well"),
    ({"lora_A_init_method": "pissa", "dim": 20}, r"rank 20 of 'layers.0.linear_qkv'.* is above min\(out, in\) = 16"),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG)
def test_what_cannot_be_leaves_the_model_as_it_was(options: Options, sentence: str) -> None:
    model = Model().eval()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=sentence):
        LoRA(TARGETS, **options)(model)
    assert unchanged(model, before)
    assert not any(True for _ in adapted_layers(model))
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training


def test_a_weight_that_is_not_finite_leaves_the_model_as_it_was() -> None:
    model = Model()
    model.layers[0].linear_fc2.weight.data[3, 2] = torch.inf
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"weight of 'layers.0.linear_fc2' holds NaN or Inf"):
        LoRA(TARGETS, dim=RANK, lora_A_init_method="pissa")(model)
    assert unchanged(model, before)
    assert not any(True for _ in adapted_layers(model))


def bad_shard() -> bool:
    """Only the last rank's shard has an Inf."""
    model = Model(dist.group.WORLD)
    if dist.get_rank() == dist.get_world_size() - 1:
        model.layers[0].linear_fc2.weight.data[3, 2] = torch.inf
    with pytest.raises(ModelError, match=r"weight of 'layers.0.linear_fc2' holds NaN or Inf"):
        LoRA(TARGETS, dim=RANK, lora_A_init_method="pissa")(model)
    return any(True for _ in adapted_layers(model))


def bad_option() -> bool:
    """Only the last rank's lora_B_init_method is wrong."""
    model = Model(dist.group.WORLD)
    word = "xavier" if dist.get_rank() == dist.get_world_size() - 1 else "zero"
    with pytest.raises(ConfigError, match="lora_B_init_method='xavier' beside lora_A_init_method='pissa'"):
        LoRA(TARGETS, dim=RANK, lora_A_init_method="pissa", lora_B_init_method=word)(model)
    return any(True for _ in adapted_layers(model))


@pytest.mark.parametrize("case", [bad_shard, bad_option])
def test_what_is_wrong_on_one_rank_is_an_error_on_every_rank(two_ranks: Ranks, case: Callable[[], bool]) -> None:
    assert two_ranks.run(case) == [False, False]


def adapted_by(method: str, **options: Any) -> tuple[nn.Module, LoRA]:
    model = Model()
    lora = LoRA(TARGETS, dim=RANK, lora_A_init_method=method, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora(model)
    return model, lora


def bad_initialize(parallel: bool) -> None:
    """Data that cannot be used, on one process or on several."""
    model = Model(dist.group.WORLD if parallel else None)
    lora = LoRA(TARGETS, dim=RANK, lora_A_init_method="corda")
    with pytest.warns(UserWarning, match=r"lora_A_init_method='corda' reads data: until lora.initialize\(model, data"):
        lora(model)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="the method 'corda' needs activations: pass a dataloader"):
        lora.initialize(model)
    with pytest.raises(DataError, match="the dataloader is empty"):
        lora.initialize(model, [], show_progress_bar=False)
    broken = model.embedding.weight.data[7].clone()
    model.embedding.weight.data[7] = torch.nan
    batch = {"input_ids": torch.arange(24).reshape(3, 8)}
    with pytest.raises(NonFiniteError, match=r"layers\.0\.linear_qkv"):
        lora.initialize(model, [batch], show_progress_bar=False)
    model.embedding.weight.data[7] = broken
    assert unchanged(model, before)
    assert all("adapted" not in vars(layer) for _, layer in adapted_layers(model))
    lora.initialize(model, batches(), show_progress_bar=False)
    assert not unchanged(model, before)


def test_bad_data_leave_the_model_as_it_was() -> None:
    bad_initialize(parallel=False)


def test_bad_data_leave_the_model_as_it_was_on_all_ranks(two_ranks: Ranks) -> None:
    two_ranks.run(bad_initialize, True)


class Failing:
    """Data whose second batch cannot be read."""

    def __iter__(self) -> Any:
        yield batches()[0]
        raise OSError("the second batch cannot be read")


def bad_data_on_the_last_rank(method: str, fault: str, parallel: bool) -> tuple[str, bool]:
    """What `initialize` says on this rank, and whether the model is as it was."""
    last = dist.get_rank() == dist.get_world_size() - 1
    model, lora = Model(dist.group.WORLD if parallel else None), LoRA(TARGETS, dim=RANK, lora_A_init_method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora(model)
    before, data, options = snapshot(model), batches(), {}
    if last and fault == "raises":
        data = Failing()
    elif last and fault == "empty":
        data = []
    elif last and fault == "none":
        data = None
    elif last and fault == "nan":
        options["forward_fn"] = spoilt
    said = ""
    try:
        lora.initialize(model, data, loss_fn=loss, show_progress_bar=False, **options)
    except (smartinit.errors.SmartinitError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    return said, unchanged(model, before)


def spoilt(model: Any, batch: Any) -> Any:
    """NaN in what one rank's layers get, but not in what other ranks get."""
    handle = model.layers[0].linear_qkv.register_forward_pre_hook(lambda _, args: (args[0] * torch.nan,))
    with handle:
        return model(**batch)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    ("method", "fault", "sentence"),
    [
        ("eva", "raises", "OSError: the second batch cannot be read"),
        ("corda", "raises", "OSError: the second batch cannot be read"),
        ("lora_ga", "raises", "OSError: the second batch cannot be read"),
        ("eva", "empty", "DataError: the dataloader is empty"),
        ("lora_ga", "empty", "DataError: the dataloader is empty"),
        ("eva", "none", "ConfigError: the method 'eva' needs activations: pass a dataloader"),
        ("eva", "nan", "NonFiniteError: the input of layer 'layers.0.linear_qkv' holds NaN"),
    ],
)
def test_data_that_fail_on_one_rank_fail_on_all(
    two_ranks: Ranks, method: str, fault: str, sentence: str, parallel: bool
) -> None:
    (other, kept), (own, own_kept) = two_ranks.run(bad_data_on_the_last_rank, method, fault, parallel)
    assert own.startswith(sentence)
    if fault == "nan" and parallel:  # of which the other rank gets some by the sum after the next layer
        assert other.startswith("NonFiniteError: the input of layer 'layers.0.linear_proj' holds NaN")
    else:
        assert other == "DataError: another rank failed; the message of rank 1 says why"
    assert kept
    assert own_kept


def streamed() -> int:
    """How often rank 0 reads data that rank 1 can read only once."""
    torch.manual_seed(1)
    model, passes = nn.Sequential(nn.Linear(192, 192), nn.Linear(192, 192)), 0

    class Counted:
        def __iter__(self) -> Any:
            nonlocal passes
            passes += 1
            return iter([torch.randn(64, 192) for _ in range(2)])

    smartinit.compute(
        model,
        smartinit.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="lora_ga"),
        Counted() if dist.get_rank() == 0 else iter(Counted()),
        forward_fn=lambda model, batch: model(batch),
        loss_fn=loss,
        show_progress_bar=False,
    )
    return passes


def test_a_stream_on_one_rank_gives_all_of_them_one_pass(two_ranks: Ranks) -> None:
    assert two_ranks.run(streamed) == [1, 1]


def test_what_initialize_refuses() -> None:
    model, lora = adapted_by("eva")
    with pytest.raises(ConfigError, match=r"cut into pieces \(pipeline parallelism"):
        lora.initialize([model, nn.Linear(2, 2)], batches())
    with pytest.raises(TargetError, match=r"the model has no adapters to start; adapt it first: LoRA"):
        lora.initialize(Model(), batches())
    with pytest.raises(ConfigError, match=r"'xavier' is a start that adapters have as they are made"):
        LoRA(TARGETS).initialize(model)


def test_a_start_for_something_else_is_refused() -> None:
    model, lora = adapted_by("corda")
    artefact = lora.initialize(model, batches(), show_progress_bar=False)
    (other, _), (louder, loud) = adapted_by("xavier"), adapted_by("xavier", alpha=16)
    before = snapshot(other)
    with pytest.raises(ArtefactError, match=r"was computed for alpha/dim = 8, but its adapter has 4; use the alpha"):
        loud.apply(louder, artefact)
    few = Model()
    some = LoRA(["linear_qkv"], dim=RANK, lora_A_init_method="orthogonal")
    some(few)
    with pytest.raises(ArtefactError, match=r"the start has a layer .*, which the model has not"):
        some.apply(few, artefact)
    little = some.initialize(few, show_progress_bar=False)
    with pytest.raises(ArtefactError, match=r"the model has a layer 'layers.0.linear_fc1', which the start has not"):
        lora.apply(other, little)
    assert unchanged(other, before)
    lora.apply(other, artefact)
    assert unchanged(other, snapshot(model))


class Uncertain(Gaussian):
    """Finds other signs on other ranks, as decompositions may on other devices."""

    def factors(self, spectrum: Any, rank: int, scaling: float) -> Any:
        pair = super().factors(spectrum, rank, scaling)
        return replace(pair, a=pair.a * (-1) ** dist.get_rank() if dist.is_initialized() else pair.a)


def uncertain() -> Options:
    torch.manual_seed(0)
    model = Model(dist.group.WORLD if dist.is_initialized() else None)
    LoRA(TARGETS, dim=RANK, lora_A_init_method=Uncertain())(model)
    return {place.whole_name: layer.adapter.whole()[0] for place, layer in adapted_layers(model)}


def test_signs_agree_where_ranks_find_different_ones(two_ranks: Ranks) -> None:
    expected = uncertain()
    for found in two_ranks.run(uncertain):
        for name, a in expected.items():
            assert torch.equal(found[name], a)


def test_what_was_trained_from_a_split_is_converted_for_the_original_base(tmp_path: Path) -> None:
    model, lora = adapted_by("corda")
    artefact = lora.initialize(model, batches(), show_progress_bar=False)
    artefact.save(tmp_path / "start")
    # Trained: every B is twice what it was.
    trained = replace(artefact, factors={n: replace(p, b=2 * p.b) for n, p in artefact.factors.items()})
    trained.save(tmp_path / "trained")
    convert_adapter(tmp_path / "trained", tmp_path / "start", tmp_path / "out")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        for name, pair in artefact.factors.items():
            a, b = (file.get_tensor(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
            assert relative(b @ a, pair.b @ pair.a) < 1e-5
