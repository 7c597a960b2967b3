"""Run the data through the model until every statistic has what it needs, or the data or ``max_batches`` end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from smartinit.activations.capture import Capture
from smartinit.activations.sites import Site
from smartinit.activations.state import model_device
from smartinit.distributed.passes import RanksInStep, expected_passes, length_of, most_passes
from smartinit.distributed.reduce import is_first_rank, merge_over_ranks, world_size
from smartinit.errors import DataError
from smartinit.statistics.cost import plan_statistic
from smartinit.statistics.gram import GramStatistic
from smartinit.statistics.settling import settle_full
from smartinit.statistics.subspace import SubspacePCA

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from smartinit.activations.selection import HookTarget
    from smartinit.statistics.base import Statistic


@dataclass
class Collected:
    """What the passes over the data left behind.

    Attributes:
        sites: with their statistics, in the order in which they ran first.
        batches: forward passes that were used.
        tokens: tokens that counted, on this rank.
        bad_batches: indices of batches skipped for NaN or Inf.
        seconds: wall time of the passes.
        settled: names of leaders of sites that reached ``tau``.
    """

    sites: list[Site]
    batches: int = 0
    tokens: int = 0
    bad_batches: list[int] = field(default_factory=list)
    seconds: float = 0.0
    settled: set[str] = field(default_factory=set)


Demand = Callable[[Sequence[Site]], Mapping[str, int]]


def collect(
    model: nn.Module,
    targets: Sequence[HookTarget],
    batches: Iterable[Any],
    components: Mapping[str, int],
    *,
    demand: Demand,
    tau: float,
    centred: bool = True,
    matrices: bool = False,
    max_batches: int | None = None,
    seed: int = 0,
    merge_ranks: bool = True,
    show_progress_bar: bool = True,
    **capture_options: Any,  # noqa: ANN401 - handed on to Capture
) -> Collected:
    """One bounded pass over the data.

    Args:
        model: run as is.
        targets: whose inputs are wanted.
        batches: iterated once, never restarted.
        components: directions each target will be asked for, at most.
        demand: from the sites so far, how many leading directions each target needs just now; asked whenever
            estimates changed. A site is closed once ``tau`` holds for the most that one of its targets needs,
            and opened again when that grows.
        tau: see `Statistic.settled`.
        centred: remove means.
        matrices: keep whole second moments, whatever is cheaper.
        max_batches: bound on forward passes; None: one pass over the data, of a stream without a length at most
            10,000 batches.
        seed: of the random sketches.
        merge_ranks: with several ranks, merge their statistics at the end.
        show_progress_bar: tqdm on stderr, on the first rank only.
        capture_options: see `Capture`.

    Raises:
        DataError: no batch at all, or none that was usable.
        NonFiniteError: see `Capture.run`.
    """

    def new_statistic(target: HookTarget, device: torch.device) -> Statistic:
        wanted = components[target.name]
        if matrices or plan_statistic(target.in_features, wanted).kind == "gram":
            return GramStatistic(target.in_features, centred=centred, device=device, moments_only=matrices)
        return SubspacePCA(target.in_features, wanted, centred=centred, seed=seed, device=device)

    capture = Capture(model, targets, new_statistic, components=components, **capture_options)
    device = model_device(model) or torch.device("cpu")
    ranks = RanksInStep(device, merge_ranks and world_size() > 1)
    with ranks.failing_together():
        if length_of(batches) == 0:
            msg = "the dataloader is empty: it has no batch to compute activations from"
            raise DataError(msg)
    start = time.perf_counter()
    progress = tqdm(
        total=expected_passes(batches, max_batches),
        desc="activations",
        unit="batch",
        disable=not (show_progress_bar and is_first_rank()),
    )
    names = [target.name for target in targets]
    with capture, progress:
        for batch in ranks.together(batches, most_passes(batches, max_batches)):
            with ranks.failing_together():
                if capture.run(batch):
                    with torch.autocast(device.type, enabled=False):
                        _close_settled(capture.sites, demand, tau)
            needed = ranks.agree_on_open(capture.sites, names)
            _show(progress, capture, start)
            if not needed:
                break
    collected = Collected(
        sites=capture.sites,
        batches=capture.passes - len(capture.bad_batches),
        tokens=capture.tokens,
        bad_batches=capture.bad_batches,
        settled={site.names[0] for site in capture.sites if not site.open},
    )
    with ranks.failing_together():
        _check_usable(collected, capture.passes)
    with torch.autocast(device.type, enabled=False):
        settle_full([site.statistic for site in collected.sites], everything=True)
    if ranks.exchange:
        ordered = sorted(collected.sites, key=lambda site: names.index(site.names[0]))
        counts = {target.name: target.counts for target in targets}
        merged = merge_over_ranks(
            [site.statistic for site in ordered],
            [",".join(site.names) for site in ordered],
            device,
            [counts[site.names[0]] for site in ordered],
        )
        for site, statistic in zip(ordered, merged, strict=True):
            site.statistic = statistic
    collected.seconds = time.perf_counter() - start
    return collected


def _close_settled(sites: Sequence[Site], demand: Demand, tau: float) -> None:
    if not settle_full([site.statistic for site in sites if site.open]):
        return
    needed = demand(sites)
    for site in sites:
        site.open = not site.statistic.settled(tau, max(needed.get(name, 0) for name in site.names))


def _show(bar: tqdm[Any], capture: Capture, start: float) -> None:
    closed = sum(not site.open for site in capture.sites)
    rate = capture.tokens / max(time.perf_counter() - start, 1e-9)
    bar.update()
    bar.set_postfix_str(f"{closed}/{len(capture.sites)} sites settled, {rate:,.0f} tokens/s", refresh=False)


def _check_usable(collected: Collected, passes: int) -> None:
    if passes == 0:
        msg = "the dataloader gave no batch to compute activations from"
        raise DataError(msg)
    if not collected.batches:
        msg = f"all {passes} batches hold NaN or Inf in some layer's input; check the data and the model's weights"
        raise DataError(msg)
    if not collected.sites:
        msg = f"no target layer ran in {passes} batches; check forward_fn and target_modules"
        raise DataError(msg)
    if not any(site.statistic.rows for site in collected.sites):
        msg = f"no token counts in any of {passes} batches: every one is padding or masked out by the labels"
        raise DataError(msg)
