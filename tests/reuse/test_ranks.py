"""A store shared by ranks: what one world size left, another finds; what one rank lacks, all compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from reuse_cases import hit, lora, new_batches, new_model

import smartinit as si

if TYPE_CHECKING:
    from pathlib import Path

    from ranks import Ranks

QUIET = dict(show_progress_bar=False)
ORDERS = ("row by row", "batch by batch", "one block after the other")


def shared(order: str) -> list[dict[str, torch.Tensor]]:
    """This rank's part of the 24 rows of `new_batches`, in six (of all ranks) batches of four."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = {name: torch.cat([batch[name] for batch in new_batches()]) for name in new_batches()[0]}
    if order in ("batch by batch", "apart"):
        return new_batches()[rank::world]
    count = 24 // world
    mine = slice(rank, None, world) if order == "row by row" else slice(rank * count, (rank + 1) * count)
    return [{name: value[mine][start : start + 4] for name, value in whole.items()} for start in range(0, count, 4)]


def computed(folder: str, order: str, method: str, rank: int = 4) -> tuple[Any, int, dict[str, torch.Tensor]]:
    """On each rank: what was a hit, how often the model ran, and the rows of A."""
    model, calls = new_model(), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    place = f"{folder}-{dist.get_rank()}" if order == "apart" else folder
    artefact = si.compute(model, lora(method, rank), shared(order), store=place, **QUIET)
    return hit(artefact), len(calls), {name: pair.a for name, pair in artefact.factors.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_ranks_find_what_one_process_left(two_ranks: Ranks, tmp_path: Path, order: str) -> None:
    alone = si.compute(new_model(), lora(), new_batches(), store=tmp_path / "s", **QUIET)
    for found, calls, rows in two_ranks.run(computed, str(tmp_path / "s"), order, "eva"):
        assert (found, calls) == ("artefact", 0)
        assert all(torch.equal(rows[name], pair.a) for name, pair in alone.factors.items())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", ["eva", "corda"])
def test_one_process_finds_what_ranks_left(two_ranks: Ranks, tmp_path: Path, order: str, method: str) -> None:
    first = two_ranks.run(computed, str(tmp_path / "s"), order, method)
    assert [found for found, _, _ in first] == [None, None]
    assert all(calls for _, calls, _ in first)
    alone = si.compute(new_model(), lora(method), new_batches(), store=tmp_path / "s", **QUIET)
    assert hit(alone) == "artefact"
    assert all(torch.equal(first[0][2][name], pair.a) for name, pair in alone.factors.items())
    again = two_ranks.run(computed, str(tmp_path / "s"), order, method, 2)
    assert [(found, calls) for found, calls, _ in again] == [("spectra", 0)] * 2


def test_what_one_rank_lacks_is_computed_by_all(two_ranks: Ranks, tmp_path: Path) -> None:
    alone = si.compute(new_model(), lora(), new_batches(), store=tmp_path / "s-0", **QUIET)
    results = two_ranks.run(computed, str(tmp_path / "s"), "apart", "eva")  # rank 1 has a store of its own, empty
    assert [found for found, _, _ in results] == [None, None]
    assert all(calls for _, calls, _ in results)
    assert all(torch.equal(results[0][2][name], rows) for name, rows in results[1][2].items())
    assert results[0][2].keys() == alone.factors.keys()
