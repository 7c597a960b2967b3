"""A store shared by ranks: what one world size left, another finds; what one rank lacks, all compute."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from reuse_cases import FORWARD, hit, lora, new_batches, new_model

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
    FORWARD.clear()
    place = f"{folder}-{dist.get_rank()}" if order == "apart" else folder
    artefact = si.compute(new_model(), lora(method, rank), shared(order), store=place, **QUIET)
    return hit(artefact), len(FORWARD), {name: pair.a for name, pair in artefact.factors.items()}


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


def uneven(folder: str | None, case: str) -> Any:
    """On ranks that have unequal shares, or one of which has something that cannot be named."""
    rank = dist.get_rank()
    rows = {name: torch.cat([batch[name] for batch in new_batches()]) for name in new_batches()[0]}
    sizes = {"rows": ([4, 2], [4, 4]), "batches": ([4, 4], [4, 4, 4]), "nameless": ([4, 4], [4, 4])}[case][rank]
    ends = [sum(sizes[: i + 1]) + 12 * rank for i in range(len(sizes))]
    batches = [
        {name: value[end - size : end] for name, value in rows.items()} for end, size in zip(ends, sizes, strict=True)
    ]
    options: dict[str, Any] = {}
    if case == "nameless":

        def forward(model: Any, batch: Any) -> Any:
            return model(input_ids=batch["input_ids"])

        forward.store_key = "ids"  # type: ignore[attr-defined]
        options["forward_fn"] = forward
        if rank == 1:
            batches[1]["odd"] = object()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        artefact = si.compute(new_model(), lora(rank=2), batches, store=folder, **options, **QUIET)
    return artefact.provenance.get("store", {}).get("hit"), {name: pair.a for name, pair in artefact.factors.items()}


@pytest.mark.parametrize("case", ["rows", "batches", "nameless"])
def test_unequal_shares_are_named_as_they_were_read(two_ranks: Ranks, tmp_path: Path, case: str) -> None:
    fresh = two_ranks.run(uneven, None, case)
    for expected in (None, None if case == "nameless" else "artefact"):
        for (found, rows), (_, wanted) in zip(two_ranks.run(uneven, str(tmp_path), case), fresh, strict=True):
            assert found == expected
            assert all(torch.equal(rows[name], wanted[name]) for name in wanted)
    if case == "rows":  # what both ranks read is not what one of them has twice
        rows = {name: torch.cat([batch[name] for batch in new_batches()])[:12] for name in new_batches()[0]}
        assert hit(si.compute(new_model(), lora(rank=2), [rows], store=tmp_path, **QUIET)) is None
