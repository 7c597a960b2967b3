"""What makes two requests one, and what tells them apart: a hit or a miss, whatever was changed."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reuse_cases import SEED, assert_equal, hit, lora, new_batches, new_model
from torch.utils.data import DataLoader

import smartinit as si
from smartinit.errors import NotStoredError
from smartinit.targets.fingerprint import model_fingerprint

if TYPE_CHECKING:
    from pathlib import Path

QUIET = dict(show_progress_bar=False)
FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def store(tmp_path_factory: Any) -> Any:
    """With EVA and CorDA of the model and its batches."""
    place = tmp_path_factory.mktemp("requests") / "s"
    for method in ("eva", "corda"):
        si.compute(new_model(), lora(method), new_batches(), store=place, **QUIET)
    return si.Store(place)


def found(store: Any, model: Any, batches: Any, method: str = "eva", **options: Any) -> Any:
    """What the store has of a request; nothing is written, so that the next one finds the same."""
    reader = si.Store(store.local.layout.root, read_only=True)
    return hit(si.compute(model, lora(method, **options.pop("lora", {})), batches, store=reader, **options, **QUIET))


def test_the_same_is_found(store: Any) -> None:
    assert found(store, new_model(), new_batches()) == "artefact"
    assert found(store, new_model(), new_batches(), "corda") == "artefact"


@FEW
@given(st.data())
def test_one_bit_of_one_weight_is_a_miss(store: Any, data: Any) -> None:
    model = new_model()
    tensors = dict(model.named_parameters())
    name = data.draw(st.sampled_from(sorted(tensors)))
    flat = tensors[name].data.view(-1).view(torch.int32)
    at, bit = data.draw(st.integers(0, flat.numel() - 1)), data.draw(st.integers(0, 22))  # of the mantissa
    flat[at] ^= 1 << bit
    assert found(store, model, new_batches()) is None


@FEW
@given(st.integers(0, 5), st.integers(0, 3), st.integers(0, 15), st.sampled_from(["input_ids", "attention_mask"]))
def test_one_token_or_one_position_of_a_mask_is_a_miss(store: Any, batch: int, row: int, at: int, field: str) -> None:
    batches = new_batches()
    tensor = batches[batch][field] = batches[batch][field].clone()
    tensor[row, at] = 1 - tensor[row, at] if field == "attention_mask" else (tensor[row, at] + 1) % 64
    assert found(store, new_model(), batches) is None


@FEW
@given(st.permutations(range(6)))
def test_another_order_of_the_batches_is_a_miss(store: Any, order: list[int]) -> None:
    batches = [new_batches()[index] for index in order]
    assert found(store, new_model(), batches) == ("artefact" if order == sorted(order) else None)


@FEW
@given(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
def test_another_batch_size_of_the_same_rows_is_found(store: Any, size: int) -> None:
    whole = {name: torch.cat([batch[name] for batch in new_batches()]) for name in new_batches()[0]}
    batches = [{name: value[start : start + size] for name, value in whole.items()} for start in range(0, 24, size)]
    assert found(store, new_model(), batches) == "artefact"


def test_padding_behind_the_rows_is_no_difference(store: Any) -> None:
    pad = torch.nn.functional.pad
    batches = [
        {name: pad(value, (0, 3), value=-100 if name == "labels" else 0) for name, value in batch.items()}
        for batch in new_batches()
    ]
    assert found(store, new_model(), batches) == "artefact"


@pytest.mark.parametrize(
    "options",
    [
        dict(method="corda", lora=dict(init_options=dict(corda_method="kpm"))),
        dict(lora=dict(eva=dict(whiten=True))),
        dict(lora=dict(use_rslora=True)),
        dict(lora=dict(frozen_a=True)),
        dict(lora=dict(match_gain="kaiming")),
        dict(lora=dict(rank=3)),
        dict(lora=dict(lora_alpha=5)),
        dict(planner="uniform"),
        dict(budget=10),
    ],
    ids=str,
)
def test_another_option_is_another_artefact_of_the_same_statistics(store: Any, options: dict) -> None:
    assert found(store, new_model(), new_batches(), **options) == "spectra"


@pytest.mark.parametrize(
    "options",
    [
        dict(seed=1),
        dict(skip_bad_batches=True),
        dict(max_batches=5),
        dict(lora=dict(eva=dict(use_label_mask=False))),
    ],
    ids=str,
)
def test_what_changes_the_statistics_is_a_miss(store: Any, options: dict) -> None:
    assert found(store, new_model(), new_batches(), **options) is None


def test_another_precision_of_the_model_is_a_miss(store: Any) -> None:
    assert found(store, new_model().to(torch.bfloat16), new_batches()) is None


def test_precision_that_is_asked_of_torch_is_part_of_the_request(store: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert found(store, new_model(), new_batches()) is None


def test_another_configuration_of_equal_weights_is_a_miss(store: Any) -> None:
    model = new_model()
    model.config.rms_norm_eps = 1e-3
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-3
    assert found(store, model, new_batches()) is None


def test_names_of_folders_and_tasks_are_no_difference(store: Any) -> None:
    model = new_model()
    model.config._name_or_path = "elsewhere"
    options = dict(base_model_name_or_path="elsewhere", task_type="CAUSAL_LM")
    assert found(store, model.train(), new_batches(), lora=options) == "artefact"


def test_as_many_batches_as_there_are_is_no_difference(store: Any) -> None:
    assert found(store, new_model(), new_batches(), max_batches=6) == "artefact"
    assert found(store, new_model(), [*new_batches(), *new_batches(seed=9)], max_batches=6) == "artefact"


def test_more_rows_are_a_miss(store: Any) -> None:
    more = [*new_batches(), *new_batches(seed=9)]
    assert found(store, new_model(), more) is None
    assert found(store, new_model(), more, "corda") is None


def test_more_rows_than_were_read_are_a_miss_unless_the_layers_had_settled(tmp_path: Path) -> None:
    more = new_batches(12, 32, 32)
    easy, hard = lora(eva=dict(tau=0.01)), lora(eva=dict(tau=1.0))
    first = si.compute(new_model(), easy, more, store=tmp_path, **QUIET)
    assert first.provenance["batches"] < 12  # it settled before
    assert found(si.Store(tmp_path), new_model(), more, lora=dict(eva=dict(tau=0.01))) == "artefact"
    assert found(si.Store(tmp_path), new_model(), more, lora=dict(rank=2, eva=dict(tau=0.005))) == "spectra"
    strict = si.compute(new_model(), hard, more, store=tmp_path, **QUIET)
    assert hit(strict) is None
    assert "had not settled to tau=1" in strict.provenance["store"]["missed"]
    assert strict.provenance["batches"] == 12
    assert_equal(strict, si.compute(new_model(), hard, more, **QUIET))


def test_what_can_be_iterated_once_is_read_into_memory(store: Any) -> None:
    assert found(store, new_model(), iter(new_batches())) == "artefact"


def test_a_loader_that_shuffles_is_iterated_once(tmp_path: Path) -> None:
    rows = [{name: value[0] for name, value in batch.items()} for batch in new_batches(16, 1)]

    class Shuffled(torch.utils.data.Sampler):
        turn = SEED

        def __iter__(self) -> Any:
            Shuffled.turn += 1
            return iter(torch.randperm(16, generator=torch.Generator().manual_seed(Shuffled.turn)).tolist())

        def __len__(self) -> int:
            return 16

    loader = DataLoader(rows, batch_size=4, sampler=Shuffled())
    turn = Shuffled.turn
    results = []
    for place in (None, tmp_path, tmp_path):
        Shuffled.turn = turn
        results.append(si.compute(new_model(), lora(), loader, store=place, **QUIET))
        assert Shuffled.turn == turn + 1  # iterated once
    assert [hit(result) for result in results[1:]] == [None, "artefact"]
    assert_equal(results[0], results[1])
    assert hit(si.compute(new_model(), lora(), loader, store=tmp_path, **QUIET)) is None


def test_rows_that_change_between_two_passes_are_not_kept(tmp_path: Path) -> None:
    class Changing(list):
        turn = 0

        def __iter__(self) -> Any:
            self.turn += 1
            return iter(new_batches(seed=self.turn))

    with pytest.warns(UserWarning, match="gives other batches every time"):
        result = si.compute(new_model(), lora(), Changing(new_batches()), store=tmp_path, **QUIET)
    assert result.provenance["store"]["key"] is None
    assert not list(si.Store(tmp_path).keys("artefact"))


def test_a_shuffle_under_a_fixed_seed_is_found_again(tmp_path: Path) -> None:
    rows = [{name: value[0] for name, value in batch.items()} for batch in new_batches(16, 1)]
    for expected in (None, "artefact"):
        torch.manual_seed(SEED)
        result = si.compute(new_model(), lora(), DataLoader(rows, batch_size=4, shuffle=True), store=tmp_path, **QUIET)
        assert hit(result) == expected


def test_a_function_of_the_callers_own_is_kept_only_under_its_name(tmp_path: Path) -> None:
    def forward(model: Any, batch: Any) -> Any:
        return model(**batch)

    with pytest.warns(UserWarning, match="forward_fn is a function of your own"):
        result = si.compute(new_model(), lora(), new_batches(), store=tmp_path, forward_fn=forward, **QUIET)
    assert "store" not in result.provenance
    results = []
    for name in ("a", "a", "b"):
        forward.store_key = name
        results.append(si.compute(new_model(), lora(), new_batches(), store=tmp_path, forward_fn=forward, **QUIET))
    assert [hit(one) for one in results] == [None, "artefact", None]


def test_rows_without_a_name_are_computed_and_not_kept(tmp_path: Path) -> None:
    class Odd:
        """Of a class that nobody knows."""

    def forward(model: Any, batch: Any) -> Any:
        return model(**{name: value for name, value in batch.items() if name != "odd"})

    forward.store_key = "without odd"
    batches = [{**batch, "odd": Odd()} for batch in new_batches()]
    with pytest.warns(UserWarning, match="the store is not used: .*odd"):
        result = si.compute(new_model(), lora(), batches, store=tmp_path, forward_fn=forward, **QUIET)
    assert "store" not in result.provenance


def test_layers_that_never_ran_need_not_run_again(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(SEED)
            self.used, self.idle = torch.nn.Linear(24, 24), torch.nn.Linear(24, 24)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.used(x)

    model, rows = Two(), [dict(x=torch.randn(8, 24)) for _ in range(8)]
    options = dict(prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, store=tmp_path, **QUIET)
    targets = dict(target_modules=["used", "idle"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one layer saw no token
        si.compute(model, lora(**targets), rows, **options)
        model.calls = 0
        again = si.compute(model, lora(rank=2, **targets), rows, **options)
    assert hit(again) == "spectra"
    assert model.calls == 0
    assert again.plan.ranks["idle"] == 2


def test_a_model_without_weights_will_do_where_everything_is_stored(store: Any) -> None:
    fingerprint = model_fingerprint(new_model())
    bare = new_model().to("meta")
    reader = si.Store(store.local.layout.root, read_only=True)
    options = dict(store=reader, fingerprint=fingerprint, **QUIET)
    fresh = si.compute(new_model(), lora(rank=2), new_batches(), **QUIET)
    planned = si.compute(bare, lora(rank=2), new_batches(), **options)
    assert hit(planned) == "spectra"
    assert dict(planned.plan.ranks) == dict(fresh.plan.ranks)
    with pytest.raises(NotStoredError, match="weights, which are not loaded"):
        si.compute(bare, lora(rank=2), new_batches(seed=3), **options)
    with pytest.raises(NotStoredError, match="q_proj' by 'pissa'"):
        si.compute(bare, lora("pissa"), None, **options)
    with pytest.raises(NotStoredError, match="weights"):
        si.compute(bare, lora(rank=2, use_dora=True), new_batches(), **options)


def test_a_store_that_cannot_be_written_changes_no_result(tmp_path: Path) -> None:
    fresh = si.compute(new_model(), lora(), new_batches(), **QUIET)
    blocked = tmp_path / "s"
    si.Store(blocked).put("a", {"x": torch.zeros(1)})
    for folder in ("entries", "tmp"):
        place = blocked / folder
        for file in place.glob("*"):
            file.unlink()
        place.rmdir()
        place.write_text("in the way")
    with pytest.warns(UserWarning, match="the computation goes on"):
        result = si.compute(new_model(), lora(), new_batches(), store=blocked, **QUIET)
    assert_equal(result, fresh)


def test_a_broken_entry_is_computed_again(tmp_path: Path) -> None:
    first = si.compute(new_model(), lora(), new_batches(), store=tmp_path, **QUIET)
    for blob in (tmp_path / "blobs").rglob("*"):
        if blob.is_file():
            content = bytearray(blob.read_bytes())
            content[-1] ^= 1
            blob.chmod(0o644)
            blob.write_bytes(content)
    with pytest.warns(UserWarning, match="quarantine"):
        second = si.compute(new_model(), lora(), new_batches(), store=tmp_path, **QUIET)
    assert hit(second) is None
    assert_equal(first, second)
    assert hit(si.compute(new_model(), lora(), new_batches(), store=tmp_path, **QUIET)) == "artefact"


@pytest.mark.parametrize("damage", ["changed", "lost"])
def test_broken_statistics_are_mended(tmp_path: Path, damage: str) -> None:
    store = si.Store(tmp_path)
    si.compute(new_model(), lora(), new_batches(), store=store, **QUIET)
    for key in list(store.keys()):
        manifest = store.peek(key)
        for blob in manifest.blobs.values() if manifest.kind == "statistic" else ():
            path = store.local.layout.blob(blob.sha256)
            content = path.read_bytes() if path.exists() else b""
            path.unlink(missing_ok=True)
            if damage == "changed" and content:
                path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the quarantine
        assert hit(si.compute(new_model(), lora(rank=3), new_batches(), store=store, **QUIET)) is None
    assert store.verify() == []
    assert hit(si.compute(new_model(), lora(rank=2), new_batches(), store=store, **QUIET)) == "spectra"


def test_what_could_not_be_kept_says_so(store: Any, tmp_path: Path) -> None:
    reader = si.Store(store.local.layout.root, read_only=True)
    result = si.compute(new_model(), lora(rank=3), new_batches(), store=reader, **QUIET)
    assert result.provenance["store"]["kept"] is False
    assert si.compute(new_model(), lora(), new_batches(), store=reader, **QUIET).provenance["store"]["kept"]


def test_one_request_made_from_other_statistics_is_no_contradiction(tmp_path: Path) -> None:
    rows = [dict(x=torch.randn(4096, 1024, generator=torch.Generator().manual_seed(i))) for i in range(3)]
    torch.manual_seed(SEED)
    layer = torch.nn.Sequential(torch.nn.Linear(1024, 8))
    options = dict(prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, **QUIET)

    def run(model: Any, batch: Any) -> Any:
        return model(batch["x"])

    run.store_key = "x"
    small, large = (lora(rank=rank, eva=dict(rho=1.0), target_modules=["0"]) for rank in (2, 6))
    for place, requests in (("one", [small]), ("two", [large, small])):
        for request in requests:
            si.compute(layer, request, rows, store=tmp_path / place, forward_fn=run, **options)
    moved = si.Store(tmp_path / "one").push(tmp_path / "two")
    assert not moved.conflicts


def test_the_callers_values_are_left_alone(store: Any) -> None:
    batches, config = new_batches(), lora()
    kept = copy.deepcopy(batches)
    found(store, new_model(), batches)
    assert all(torch.equal(one[name], two[name]) for one, two in zip(batches, kept, strict=True) for name in one)
    assert config == lora()
