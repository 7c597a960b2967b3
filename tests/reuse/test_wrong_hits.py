"""Requests that look alike and are not: each of these was served another one's result once."""

from __future__ import annotations

import tempfile
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from reuse_cases import SEED, assert_equal, hit, lora, new_batches, new_model
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, IterableDataset

import smartinit as si

if TYPE_CHECKING:
    from pathlib import Path

QUIET = dict(show_progress_bar=False)
ALL_ROWS = dict(prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None)


def both(tmp_path: Path, model: Any, config: Any, batches: Any, **options: Any) -> tuple[Any, Any]:
    """With the store, and without."""
    return (
        si.compute(model, config, batches, store=tmp_path / "s", **options, **QUIET),
        si.compute(model, config, batches, **options, **QUIET),
    )


class Heads(torch.nn.Module):
    """Two heads that both run, of which the loss sees one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.a, self.b = torch.nn.Linear(24, 24), torch.nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> Any:
        return self.a(x), self.b(x)


def head_loss(output: Any, batch: Any) -> torch.Tensor:
    del batch
    return output[0].square().mean()


head_loss.store_key = "a"


def test_a_layer_without_gradient_still_has_inputs(tmp_path: Path) -> None:
    rows = [dict(x=torch.randn(16, 24, generator=torch.Generator().manual_seed(i))) for i in range(4)]
    options = dict(loss_fn=head_loss, store=tmp_path, **ALL_ROWS, **QUIET)
    targets = dict(target_modules=["a", "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that b has no gradient
        si.compute(Heads(), lora("lora_ga", 8, **targets), rows, **options)
        wanted = [lora("eva", 4, **targets), lora("lora_ga", 4, **targets)]
        eva, _ = si.compute_many(Heads(), wanted, rows, loss_fn=head_loss, store=tmp_path, **ALL_ROWS, **QUIET)
    assert eva.layers["b"].ratios


def test_a_loss_is_a_mean_over_a_batch(tmp_path: Path) -> None:
    batches = new_batches(2, 8)
    for batch in batches:
        batch["labels"] = batch["labels"].clone()
        batch["labels"][1:, 2:] = -100
    single = [{name: value[i : i + 1] for name, value in batch.items()} for batch in batches for i in range(8)]
    si.compute(new_model(), lora("lora_ga"), batches, store=tmp_path / "s", **QUIET)
    found, fresh = both(tmp_path, new_model(), lora("lora_ga"), single)
    assert hit(found) is None
    assert_equal(found, fresh)


@pytest.mark.parametrize("options", [dict(prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None)], ids=str)
def test_padding_counts_where_all_rows_are_read(tmp_path: Path, options: dict) -> None:
    pad = torch.nn.functional.pad

    def filled(ids: int) -> list[dict[str, torch.Tensor]]:
        values = {"input_ids": ids, "attention_mask": 0, "labels": -100}
        return [{name: pad(one, (0, 4), value=values[name]) for name, one in batch.items()} for batch in new_batches()]

    si.compute(new_model(), lora(), filled(0), store=tmp_path / "s", **options, **QUIET)
    found, fresh = both(tmp_path, new_model(), lora(), filled(5), **options)
    assert hit(found) is None
    assert_equal(found, fresh)


def test_a_layer_that_has_not_run_yet_is_not_settled(tmp_path: Path) -> None:
    class Late(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(SEED)
            self.a, self.b = torch.nn.Linear(1024, 8), torch.nn.Linear(1024, 8)

        def forward(self, x: torch.Tensor, late: torch.Tensor) -> Any:
            return self.b(x) if bool(late) else self.a(x)

    shape = torch.linspace(3, 0.1, 1024)
    rows = [
        dict(x=torch.randn(4096, 1024, generator=torch.Generator().manual_seed(i)) * shape, late=torch.tensor(i >= 4))
        for i in range(6)
    ]
    config = lora(rank=2, eva=dict(tau=0.05, rho=1.0), target_modules=["a", "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that b saw nothing
        si.compute(Late(), config, rows, max_batches=4, store=tmp_path / "s", **ALL_ROWS, **QUIET)
        found, fresh = both(tmp_path, Late(), config, rows, **ALL_ROWS)
    assert found.layers["b"].certificate.rows == fresh.layers["b"].certificate.rows > 0


@pytest.mark.parametrize("generator", [False, True])
def test_random_numbers_are_drawn_as_without_a_store(tmp_path: Path, generator: bool) -> None:
    rows = [{name: value[0] for name, value in batch.items()} for batch in new_batches(16, 1)]
    results = []
    for place in (None, tmp_path / "s"):
        torch.manual_seed(3)
        own = torch.Generator().manual_seed(4) if generator else None
        loader = DataLoader(rows, batch_size=4, shuffle=True, generator=own)
        artefact = si.compute(new_model(), lora(), loader, store=place, **QUIET)
        results.append((artefact, torch.rand(1), own.get_state() if own else None))
    (one, after, state), (two, after_too, state_too) = results
    assert_equal(one, two)
    assert torch.equal(after, after_too)
    assert state is None or torch.equal(state, state_too)


def test_a_stream_that_is_gone_after_one_iteration(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __init__(self) -> None:
            self.source = iter([{n: v[0] for n, v in batch.items()} for batch in new_batches(16, 1)])

        def __iter__(self) -> Any:
            return self.source

    fresh = si.compute(new_model(), lora(), DataLoader(Stream(), batch_size=4), **QUIET)
    for expected in (None, "artefact"):
        found = si.compute(new_model(), lora(), DataLoader(Stream(), batch_size=4), store=tmp_path, **QUIET)
        assert hit(found) == expected
        assert_equal(found, fresh)


def test_a_loader_whose_iterators_are_one_object(tmp_path: Path) -> None:
    class Shared:
        """As a DataLoader with persistent workers: a new iterator resets the one that there is."""

        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Any:
            self.at = 0
            return self

        def __next__(self) -> Any:
            if self.at == 6:
                raise StopIteration
            self.at += 1
            return new_batches()[self.at - 1]

    for expected in (None, "artefact"):
        assert hit(si.compute(new_model(), lora(), Shared(), store=tmp_path, **QUIET)) == expected


def test_a_parametrised_weight_is_no_plain_one(tmp_path: Path) -> None:
    class Power(torch.nn.Module):
        def __init__(self, power: float) -> None:
            super().__init__()
            self.power = power

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * weight.abs() ** self.power

    def model(power: float) -> Any:
        torch.manual_seed(SEED)
        made = torch.nn.Sequential(torch.nn.Linear(24, 24))
        parametrize.register_parametrization(made[0], "weight", Power(power))
        return made

    config = lora("mica", 2, target_modules="0")
    si.compute(model(1.0), config, store=tmp_path / "s", **QUIET)
    found, fresh = both(tmp_path, model(2.0), config, None)
    assert hit(found) is None
    assert_equal(found, fresh)


def test_layers_that_were_looked_at_apart_are_found_together(tmp_path: Path, model: Any, forward: list) -> None:
    options = dict(store=tmp_path, **QUIET)
    for rank, targets in ((8, ["q_proj"]), (8, ["q_proj", "k_proj"])):
        si.compute(model, lora(rank=rank, target_modules=targets), new_batches(), **options)
    forward.clear()
    for rank, targets in ((4, ["q_proj", "k_proj"]), (4, ["k_proj"])):
        assert hit(si.compute(model, lora(rank=rank, target_modules=targets), new_batches(), **options)) == "spectra"
    assert not forward


def test_no_room_for_temporary_files_loses_no_result(tmp_path: Path, monkeypatch: Any) -> None:
    fresh = si.compute(new_model(), lora(), new_batches(), **QUIET)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert_equal(si.compute(new_model(), lora(), new_batches(), store=tmp_path / "s", **QUIET), fresh)


def test_a_foreign_entry_among_the_runs_is_passed_over(tmp_path: Path) -> None:
    si.compute(new_model(), lora(), new_batches(), store=tmp_path, **QUIET)
    store = si.Store(tmp_path)
    tag = next(folder.name for folder in (tmp_path / "index").iterdir() if folder.name.startswith("run-"))
    store.put("stranger", meta={"rows": "many"}, tags=[tag])
    assert hit(si.compute(new_model(), lora(), new_batches(), store=tmp_path, **QUIET)) == "artefact"
