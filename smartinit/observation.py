"""What a model does with data, gathered once for any number of methods and ranks."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from smartinit.activations.rows import label_mask_options
from smartinit.activations.state import model_device
from smartinit.collect import collect
from smartinit.distributed.passes import RanksInStep
from smartinit.distributed.reduce import world_size
from smartinit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

    from smartinit.activations.sites import Site
    from smartinit.config import LoraConfig
    from smartinit.corda_files import CordaFiles
    from smartinit.job import Job
    from smartinit.targets.weight import Target

_ACTIVATIONS = ("activations", "covariance")
# Above every cosine: a second moment is only as good as the data it has seen, so its sites stay open.
_NEVER = 2.0


@dataclass
class Observed:
    """What the passes over the data left behind.

    Attributes:
        sites: with their statistics, in the order in which they ran first.
        gradients: target -> its sketch.
        batches: forward passes that were used.
        tokens: tokens that counted, on this rank.
        bad_batches: indices of batches skipped for NaN or Inf.
        seconds: wall time of the passes.
        settled: names of leaders of sites that reached ``tau``.
        never_ran: targets that are known not to run on these data.
        without_gradient: targets that no loss of these data is known to depend on.
    """

    sites: list[Site] = field(default_factory=list)
    gradients: Mapping[str, Any] = field(default_factory=dict)
    batches: int = 0
    tokens: int = 0
    bad_batches: list[int] = field(default_factory=list)
    seconds: float = 0.0
    settled: set[str] = field(default_factory=set)
    never_ran: set[str] = field(default_factory=set)
    without_gradient: set[str] = field(default_factory=set)

    @property
    def site_of(self) -> dict[str, Site]:
        """Target -> the site that it reads."""
        return {name: site for site in self.sites for name in site.names}

    def statistic(self, job: Job, name: str) -> Any:  # noqa: ANN401 - its kind depends on the method
        """What the job's method reads of one target; None if it reads nothing or the target never ran."""
        if job.method.needs == "gradients":
            return self.gradients.get(name)
        if job.method.needs in _ACTIVATIONS:
            site = self.site_of.get(name)
            return None if site is None else site.statistic
        return None


def observe(
    model: nn.Module,
    jobs: Sequence[Job],
    dataloader: Iterable[Any] | None,
    *,
    loss_fn: Any = None,  # noqa: ANN401 - (outputs, batch) -> scalar
    max_batches: int | None,
    seed: int,
    show_progress_bar: bool,
    skip_bad_batches: bool,
    merge_ranks: bool,
    files: CordaFiles | None = None,
    known: Observed | None = None,
    **capture_options: Any,  # noqa: ANN401 - handed on to Capture
) -> Observed:
    """Run the data through the model once for all activations and, if a method needs them, once for gradients.

    Args:
        model: left exactly as it was.
        jobs: what is wanted.
        dataloader: iterated once per kind of statistic; None if no method reads data.
        loss_fn: see `smartinit.gradients.collect_gradients`.
        max_batches: bound on the passes.
        seed: of random sketches.
        show_progress_bar: tqdm on stderr.
        skip_bad_batches: count and skip batches with NaN or Inf.
        merge_ranks: with several ranks, merge their statistics.
        files: where second moments may lie already, and are kept.
        known: statistics that are there already; only the other targets are looked at.
        capture_options: see `smartinit.activations.capture.Capture`.

    Raises:
        ConfigError: data is needed and there is none.
        DataError: see `smartinit.collect.collect`; too few tokens.
    """
    hungry = [job for job in jobs if job.method.needs is not None]
    if not hungry:
        return Observed()
    ranks = RanksInStep(model_device(model) or torch.device("cpu"), merge_ranks and world_size() > 1)
    with ranks.failing_together():
        if dataloader is None:
            job = hungry[0]
            what = "gradients" if job.method.needs == "gradients" else "activations"
            raise ConfigError(f"the method '{job.method.name}' needs {what}: pass a dataloader")
    out = _begun(known)
    reading = [job for job in hungry if job.method.needs in _ACTIVATIONS]
    learning = [job for job in hungry if job.method.needs == "gradients"]
    if reading and learning and iter(dataloader) is dataloader:
        raise ConfigError(
            "activations and gradients take one pass over the data each, and this dataloader can be iterated only "
            "once; pass a list or a DataLoader, or compute the methods one after the other"
        )
    in_file = None if files is None else files.sites(target.name for target in _union(reading))
    there = out.site_of.keys() | out.never_ran
    unread = [target for target in _union(reading) if target.name not in there]
    if in_file is not None:
        out.sites = in_file
    elif unread:
        wants_matrix = any(job.method.needs == "covariance" for job in reading)
        before = list(out.sites)
        collected = collect(
            model,
            unread,
            dataloader,
            _most(job.request.components for job in reading),
            demand=lambda sites: _most(job.request.demand([*before, *sites]) for job in reading),
            tau=_NEVER if wants_matrix else max(job.request.eva.tau for job in reading),
            centred=any(job.method.centred for job in reading),
            matrices=wants_matrix,
            merge_ranks=merge_ranks,
            skip_bad_batches=skip_bad_batches,
            config=_one_mask(reading),
            max_batches=max_batches,
            seed=seed,
            show_progress_bar=show_progress_bar,
            **capture_options,
        )
        out.sites = [*before, *collected.sites]
        out.batches, out.tokens = collected.batches, collected.tokens
        out.bad_batches, out.seconds = collected.bad_batches, collected.seconds
        out.settled |= collected.settled
        if files is not None:
            files.keep_sites(out.sites)
    for job in reading:
        _check_rows(job, out.site_of)
    there = out.gradients.keys() | out.without_gradient
    unlearnt = [target for target in _union(learning) if target.name not in there]
    if unlearnt:
        from smartinit.gradients import collect_gradients

        sketched = collect_gradients(
            model,
            unlearnt,
            dataloader,
            _most(job.request.components for job in learning),
            loss_fn=loss_fn,
            forward_fn=capture_options["forward_fn"],
            merge_ranks=merge_ranks,
            skip_bad_batches=skip_bad_batches,
            max_batches=max_batches,
            seed=seed,
            show_progress_bar=show_progress_bar,
        )
        out.gradients = {**out.gradients, **sketched.sketches}
        out.seconds += sketched.seconds
        if not reading:
            out.batches, out.tokens, out.bad_batches = sketched.batches, sketched.tokens, sketched.bad_batches
    return out


def _begun(known: Observed | None) -> Observed:
    """What is known already, to be added to."""
    if known is None:
        return Observed()
    return replace(known, sites=list(known.sites), settled=set(known.settled))


def _one_mask(jobs: Sequence[Job]) -> LoraConfig:
    """The configuration whose label mask the pass has.

    Raises:
        ConfigError: the requests mask differently.
    """
    masks = [label_mask_options(job.request.config) for job in jobs]
    if any(mask != masks[0] for mask in masks):
        raise ConfigError(
            "the requests mask labels differently (use_label_mask, label_mask_value in eva_config), but one pass has "
            "one mask; give all of them the same eva_config, or compute them one after the other"
        )
    return jobs[0].request.config


def _union(jobs: Sequence[Job]) -> list[Target]:
    """Every target once; the first job's order leads."""
    return list({target.name: target for job in jobs for target in job.targets}.values())


def _most(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for name, count in itertools.chain.from_iterable(one.items() for one in counts):
        out[name] = max(count, out.get(name, 0))
    return out


def _check_rows(job: Job, site_of: Mapping[str, Site]) -> None:
    """Too few rows for a rank is an error, unless most layers have enough: then only some experts starve."""
    asked = job.request.asked
    short = {
        t.name: site_of[t.name].statistic.rows if t.name in site_of else 0
        for t in job.targets
        if t.name not in site_of or site_of[t.name].statistic.rows <= asked[t.name]
    }
    if not short:
        return
    name, rows = max(short.items(), key=lambda item: item[1])
    if len(short) == len(job.targets):
        raise DataError(
            f"too few tokens: layer '{name}' saw {rows}, but {asked[name]} centred directions need at least "
            f"{asked[name] + 1}; pass more data or lower the rank"
        )
    warnings.warn(
        f"{len(short)} of {len(job.targets)} layers saw too few tokens for their rank "
        f"(the most: {rows} at '{name}'); "
        "those that never ran start as LoRA does by default (not at all under an explicit budget), the others with "
        "what they saw",
        stacklevel=4,
    )
