"""Run the data through the model until every statistic has what it needs, or the data or ``max_batches`` end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from smartinit.activations.capture import Capture
from smartinit.activations.sites import Site
from smartinit.activations.state import model_device
from smartinit.distributed.reduce import any_rank, is_first_rank, merge_over_ranks, world_size
from smartinit.errors import DataError
from smartinit.statistics.cost import plan_statistic
from smartinit.statistics.gram import GramStatistic
from smartinit.statistics.settling import settle_full
from smartinit.statistics.subspace import SubspacePCA

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from smartinit.activations.selection import HookTarget
    from smartinit.statistics.base import Statistic

_NO_BATCH = object()
_MOST_BATCHES = 10_000


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
    if _length(batches) == 0:
        msg = "the dataloader is empty: it has no batch to compute activations from"
        raise DataError(msg)

    def new_statistic(target: HookTarget, device: torch.device) -> Statistic:
        wanted = components[target.name]
        if matrices or plan_statistic(target.in_features, wanted).kind == "gram":
            return GramStatistic(target.in_features, centred=centred, device=device, moments_only=matrices)
        return SubspacePCA(target.in_features, wanted, centred=centred, seed=seed, device=device)

    capture = Capture(model, targets, new_statistic, components=components, **capture_options)
    device = model_device(model) or torch.device("cpu")
    ranks = _Ranks(device, merge_ranks and world_size() > 1)
    start = time.perf_counter()
    progress = tqdm(
        total=_expected(batches, max_batches),
        desc="activations",
        unit="batch",
        disable=not (show_progress_bar and is_first_rank()),
    )
    names = [target.name for target in targets]
    with capture, progress:
        for batch in ranks.together(islice(batches, _bound(batches, max_batches))):
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
        merged = merge_over_ranks(
            [site.statistic for site in ordered], [",".join(site.names) for site in ordered], device
        )
        for site, statistic in zip(ordered, merged, strict=True):
            site.statistic = statistic
    collected.seconds = time.perf_counter() - start
    return collected


@dataclass(frozen=True)
class _Ranks:
    """Keeps the ranks of a data-parallel run in step, so that none waits for another for ever.

    What is exchanged per pass has one length on all ranks: one flag per target, whatever sites a rank has seen.
    """

    device: torch.device
    exchange: bool

    def together(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, until the first rank has none left."""
        stream = iter(batches)
        while True:
            batch = next(stream, _NO_BATCH)
            over = batch is _NO_BATCH
            if any_rank([over], self.device)[0] if self.exchange else over:
                return
            yield batch

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """If the block fails on one rank, it fails on all: the others must not wait in the next exchange.

        Raises:
            DataError: on the ranks that did not fail themselves.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            elsewhere = self.exchange and any_rank([failed], self.device)[0] and not failed
        if elsewhere:
            raise DataError("another rank failed; its message says why")

    def agree_on_open(self, sites: Sequence[Site], names: Sequence[str]) -> bool:
        """A site stays open while any rank needs it: all ranks end their passes at the same layer.

        Returns:
            Whether any target needs more data; one that has not run yet does.
        """
        is_open = dict.fromkeys(names, True) | {name: site.open for site in sites for name in site.names}
        if self.exchange:
            is_open = dict(zip(names, any_rank([is_open[name] for name in names], self.device), strict=True))
            for site in sites:
                site.open = any(is_open[name] for name in site.names)
        return any(is_open.values())


def _close_settled(sites: Sequence[Site], demand: Demand, tau: float) -> None:
    if not settle_full([site.statistic for site in sites if site.open]):
        return
    needed = demand(sites)
    for site in sites:
        site.open = not site.statistic.settled(tau, max(needed.get(name, 0) for name in site.names))


def _length(batches: Iterable[Any]) -> int | None:
    """Number of batches where it is known: a `DataLoader` of a stream has ``__len__``, which raises."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def _bound(batches: Iterable[Any], max_batches: int | None) -> int | None:
    """Most passes: as asked, or the data's own length; a stream of unknown length may have no end."""
    return _MOST_BATCHES if max_batches is None and _length(batches) is None else max_batches


def _expected(batches: Iterable[Any], max_batches: int | None) -> int | None:
    bounds = [bound for bound in (_length(batches), max_batches) if bound is not None]
    return min(bounds, default=None)


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
