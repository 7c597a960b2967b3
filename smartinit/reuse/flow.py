"""`smartinit.compute` with a store: artefact, then statistics and spectra, then the computation itself."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from smartinit.activations.state import model_device
from smartinit.computation import compute_fresh
from smartinit.distributed.passes import RanksInStep, most_passes
from smartinit.distributed.reduce import any_rank, is_first_rank, world_size
from smartinit.errors import ArgumentError, ConfigError, ModelError, NotStoredError, StoreError
from smartinit.reuse.artefacts import artefact_key, keep_artefact, load_artefact
from smartinit.reuse.data import OfferedData
from smartinit.reuse.identity import Identity
from smartinit.reuse.keeping import LOG, Keeper
from smartinit.reuse.runs import Runs
from smartinit.reuse.session import Session
from smartinit.store.explain import describe, nearest
from smartinit.store.keys import Key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from smartinit.artefact import Artefact
    from smartinit.job import Job
    from smartinit.reuse.statistics import Run
    from smartinit.run_options import Options


def compute_or_reuse(
    model: nn.Module, jobs: Sequence[Job], dataloader: Iterable[Any] | None, options: Options
) -> list[Artefact]:
    """The artefact of each job, out of the store as far as it has them; see `smartinit.compute`.

    All ranks of a process group take the same way: what one of them lacks is computed by all.
    """
    if options.store is None:
        raise ConfigError("there is no store to look into")
    together = options.merge_ranks and world_size() > 1
    ranks = RanksInStep(model_device(model) or torch.device("cpu"), together)
    if isinstance(dataloader, Iterator):  # it is read once, and may be asked for twice
        dataloader = list(islice(dataloader, most_passes(dataloader, options.max_batches)))
    identity, data = _named(model, jobs, dataloader, options, ranks)
    if identity is None:
        return compute_fresh(model, jobs, dataloader if data is None else data.first_pass(), options)
    writes = is_first_rank() or not options.merge_ranks
    keeper = Keeper(options.store, writes=writes, replace=options.refresh)
    try:
        return _Call(model, jobs, dataloader, data, options, identity, keeper, ranks).results()
    finally:
        if data is not None:
            data.close()


def _named(
    model: nn.Module, jobs: Sequence[Job], dataloader: Iterable[Any] | None, options: Options, ranks: RanksInStep
) -> tuple[Identity | None, OfferedData | None]:
    """What the model and the data are called; no identity if one of them, on any rank, has none: with a warning."""
    reads = dataloader is not None and any(job.method.needs is not None for job in jobs)
    why, identity, data = None, None, None
    try:
        identity = Identity.of(model, options)
        why = identity.problem if reads else None
    except (ModelError, ArgumentError) as error:
        why = str(error)
    if reads and dataloader is not None:
        data = OfferedData(dataloader, options.max_batches)
        if ranks.exchange:
            data.share(ranks.device)
        else:
            data.look()
        why = why or data.problem
    if any_rank([why is not None], ranks.device)[0] if ranks.exchange else why is not None:
        warnings.warn(f"the store is not used: {why or 'another rank says why'}", stacklevel=5)
        return None, data
    return identity, data


@dataclass
class _Call:
    """One call of `smartinit.compute` or `compute_many`."""

    model: nn.Module
    jobs: Sequence[Job]
    dataloader: Iterable[Any] | None
    data: OfferedData | None
    options: Options
    identity: Identity
    keeper: Keeper
    ranks: RanksInStep
    _found: dict[int, Artefact] = field(default_factory=dict)

    def results(self) -> list[Artefact]:
        if not self.options.refresh:
            self._look_up()
        missing = [index for index in range(len(self.jobs)) if index not in self._found]
        if missing:
            with self._flight(missing) as waited:
                if waited and not self.options.refresh:
                    self._look_up()
                self._compute([index for index in missing if index not in self._found])
        return [self._found[index] for index in range(len(self.jobs))]

    def _look_up(self) -> None:
        """The first tier: finished artefacts."""
        for index, job in enumerate(self.jobs):
            if index in self._found:
                continue
            started = time.perf_counter()
            found = next((one for one in (self._stored(job, run) for run in self._runs(job)) if one), None)
            if self._all_have(found is not None) and found is not None:
                artefact, key = found
                self._found[index] = self._finished(artefact, key, "artefact", time.perf_counter() - started)

    def _stored(self, job: Job, run: Run | None) -> tuple[Artefact, Key] | None:
        key = artefact_key(job, self.identity.policy(job), run, self.options)
        artefact = load_artefact(self.keeper, key, job, ended=run is None or run.ended)
        return None if artefact is None else (artefact, key)

    def _runs(self, job: Job) -> list[Run | None]:
        """Passes that the store knows of and that may serve; [None] for a method that reads no data."""
        if job.method.needs is None:
            return [None]
        if self.data is None:
            return []
        policy, unit = self.identity.policy(job), self.identity.unit(job)
        return list(Runs(self.keeper, policy, self.data, unit).matching())

    def _compute(self, indices: Sequence[int]) -> None:
        """The other tiers, and the rest."""
        if not indices:
            return
        jobs = [self.jobs[index] for index in indices]
        meta = any(parameter.is_meta for parameter in self.model.parameters())
        if meta and any(job.request.config.use_dora for job in jobs):
            raise NotStoredError("DoRA's magnitudes are norms of the model's weights, which are not loaded")
        session = Session(self.keeper, self.identity, self.data, self.ranks, has_weights=not meta)
        artefacts = compute_fresh(self.model, jobs, self.dataloader, self.options, session)
        for index, job, artefact in zip(indices, jobs, artefacts, strict=True):
            run = session.run_of(job)
            hit = "spectra" if session.saved(job) else None
            if job.method.needs is not None and run is None:  # the data cannot be told from others
                self._found[index] = self._finished(artefact, None, hit)
                continue
            key = artefact_key(job, self.identity.policy(job), run, self.options)
            missed = session.reason or _nearest(self.keeper, key)
            LOG.info("%s is not in the store: %s", key.digest[:12], missed)
            kept = keep_artefact(self.keeper, key, artefact, settled=session.settled(job), basis=session.basis(job))
            self._found[index] = self._finished(artefact, key, hit, missed=missed, kept=kept)

    def _finished(
        self,
        artefact: Artefact,
        key: Key | None,
        hit: str | None,
        seconds: float | None = None,
        *,
        missed: str | None = None,
        kept: bool = False,
    ) -> Artefact:
        """With the note of what the store had."""
        name = None if key is None else key.digest
        note = {"hit": hit, "key": name, "missed": missed, "kept": kept or hit == "artefact"}
        provenance = {**artefact.provenance, **self.options.provenance, "store": note}
        timings = artefact.timings if seconds is None else {"store": seconds}
        return replace(artefact, provenance=provenance, timings=timings)

    def _flight(self, missing: Sequence[int]) -> AbstractContextManager[bool]:
        """One process at a time for what these jobs ask; several ranks compute together and wait for nobody."""
        if self.ranks.exchange:
            return nullcontext(False)
        first = "" if self.data is None else self.data.first("batches")
        wanted = [
            artefact_key(self.jobs[index], self.identity.policy(self.jobs[index]), None, self.options).digest
            for index in missing
        ]
        key = Key("flight", {"jobs": wanted, "first": first, "max_batches": self.options.max_batches})
        return self.keeper.store.single_flight(key, tell=LOG.warning)

    def _all_have(self, has: bool) -> bool:
        """Whether every rank found it."""
        if not self.ranks.exchange:
            return has
        return not any_rank([not has], self.ranks.device)[0]


def _nearest(keeper: Keeper, key: Key) -> str:
    """In what the request differs from the closest one that is stored."""
    try:
        found = nearest(keeper.store, key)
    except (StoreError, OSError):
        found = None
    if found is None or not found[1]:
        return "there is no artefact of anything like it"
    manifest, different = found
    return f"it differs from {manifest.key[:12]} in {describe(different)}"
