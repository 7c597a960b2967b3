"""What one computation takes from the store and leaves there; see `smartinit.computation.Kept`."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from smartinit.distributed.reduce import any_rank
from smartinit.errors import NotStoredError
from smartinit.observation import Observed
from smartinit.reuse.data import Watched
from smartinit.reuse.runs import Runs
from smartinit.reuse.spectra import StoredSpectra
from smartinit.reuse.statistics import StoredStatistics, assemble_observed, enough, is_settled

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from smartinit.distributed.passes import RanksInStep
    from smartinit.job import Job
    from smartinit.reuse.data import OfferedData
    from smartinit.reuse.identity import Identity
    from smartinit.reuse.keeping import Keeper
    from smartinit.reuse.statistics import Found, Run


class Session:
    """One computation of some jobs.

    Args:
        keeper: the store.
        identity: of the model and the caller's functions.
        data: what may be read; None without data.
        ranks: of the process group.
        has_weights: whether the model can run.
    """

    def __init__(
        self,
        keeper: Keeper,
        identity: Identity,
        data: OfferedData | None,
        ranks: RanksInStep,
        *,
        has_weights: bool,
    ) -> None:
        self._keeper, self._identity, self._data, self._ranks = keeper, identity, data, ranks
        self._has_weights = has_weights
        self._origins: dict[int, str] = {}
        self._runs: dict[int, Run] = {}
        self._watched: _Watched | None = None
        self._settled: dict[int, bool] = {}
        self._bases: dict[int, str] = {}
        self.spectra = StoredSpectra(keeper, identity, self._origins)
        self.reason: str | None = None
        """Why statistics that are there were not enough."""

    def known(self, jobs: Sequence[Job]) -> Observed:
        """Statistics of the jobs' layers that earlier passes left, if they are what a new pass would find."""
        out = Observed()
        if self._data is None:
            return out
        for group in _groups(jobs):
            gradients = group[0].method.needs == "gradients"
            found = self._search(group, self._data)
            names = [name for name in _names(group) if name in found]
            part = assemble_observed(names, found, gradients=gradients)
            out.sites, out.gradients = [*out.sites, *part.sites], {**out.gradients, **part.gradients}
            absent = {name for name in names if found[name].statistic is None}
            if gradients:
                out.without_gradient = absent
            else:
                out.never_ran = absent
            self._origins |= {id(one.statistic): one.origin for one in found.values() if one.statistic is not None}
            if found and len(names) == len(_names(group)):
                run = min((one.run for one in found.values()), key=lambda run: run.rows)
                out.batches, out.tokens = int(run.meta["batches"]), int(run.meta["tokens"])
                out.bad_batches = [int(index) for index in run.meta["bad_batches"]]
                out.settled |= _settled(group, out)
                for job in group:
                    self._note(job, run, out)
        return out

    def watched(self, dataloader: Iterable[Any] | None) -> Iterable[Any] | None:
        """The data, whose digests are taken while they are used."""
        if self._data is None:
            return dataloader
        self._watched = _Watched(self._data, dataloader if dataloader is not None else [], self._has_weights)
        return self._watched

    def keep(self, jobs: Sequence[Job], observed: Observed) -> None:
        """Store what passes found, and remember which rows they read."""
        if self._data is None or self._watched is None or not self._watched.log.batches:
            return
        counts = {
            "batches": observed.batches,
            "tokens": observed.tokens,
            "bad_batches": list(observed.bad_batches),
        }
        for group in _groups([job for job in jobs if id(job) not in self._runs]):
            passes = None
            if group[0].method.needs != "gradients":  # an early end leaves a batch that was fetched and not used
                passes = observed.batches + len(observed.bad_batches)
            policy, unit = self._identity.policy(group[0]), self._identity.unit(group[0])
            rows = self._data.used(self._watched, passes, unit, self._ranks.device)
            run = None if rows is None else Runs(self._keeper, policy, self._data, unit).keep(rows, counts)
            if run is None:
                continue
            stored = StoredStatistics(self._keeper, policy)
            for job in group:
                self._origins |= stored.keep(job, observed, run, known=self._origins)
                self._note(job, run, observed)

    def run_of(self, job: Job) -> Run | None:
        """Which rows a job's statistics are of; None if it read none, or such as cannot be named."""
        return self._runs.get(id(job))

    def basis(self, job: Job) -> str:
        """Digest of the statistics that a job was made from; empty if it needs none."""
        return self._bases.get(id(job), "")

    def settled(self, job: Job) -> bool:
        """Whether more data would not have been read for a job."""
        return job.method.needs is None or self._settled.get(id(job), False)

    def saved(self, job: Job) -> bool:
        """Whether the store spared a job something: its passes, or else all its decompositions."""
        if job.method.needs is not None:
            return self._watched is None or not self._watched.log.batches
        return self.spectra.found > 0 and self.spectra.computed == 0

    def _note(self, job: Job, run: Run, observed: Observed) -> None:
        self._runs[id(job)] = run
        used = [observed.statistic(job, target.name) for target in job.targets]
        digests = [self._origins.get(id(statistic), "") for statistic in used]
        self._bases[id(job)] = hashlib.sha256(" ".join(digests).encode()).hexdigest()
        leaders = {site.names[0] for site in observed.sites}
        ran = {target.name for target in job.targets} <= observed.site_of.keys()
        self._settled[id(job)] = ran and job.method.needs == "activations" and leaders <= observed.settled

    def _search(self, jobs: Sequence[Job], data: OfferedData) -> dict[str, Found]:
        """Layer -> what is stored and good enough for all jobs of a group, on every rank."""
        policies = [self._identity.policy(job) for job in jobs]
        if any(policy != policies[0] for policy in policies):
            return {}
        names = _names(jobs)
        runs = Runs(self._keeper, policies[0], data, self._identity.unit(jobs[0])).matching()
        stored = StoredStatistics(self._keeper, policies[0])
        found: dict[str, Found] = {}
        for name in names:
            for run in runs:
                one = stored.find(jobs, name, run)
                why = None if one is None else enough(jobs, name, one)
                if why is not None:
                    self.reason = f"{why}; they are computed again, with more"
                elif one is not None:
                    found[name] = one
                    break
        demands: list[Mapping[str, int]] = []
        if not all(one.complete and one.run.ended for one in found.values()):
            demands = [self._demand(job, found) for job in jobs if job.method.needs == "activations"]
        found = {name: one for name, one in found.items() if self._final(jobs, one, demands)}
        # A layer whose siblings must be looked at again is looked at with them: they may share an input.
        families = {name.rpartition(".")[0] for name in names if name not in found}
        found = {name: one for name, one in found.items() if name.rpartition(".")[0] not in families}
        if self._ranks.exchange:
            lacking = any_rank([name not in found for name in names], self._ranks.device)
            found = {name: found[name] for name, lacks in zip(names, lacking, strict=True) if not lacks}
        return found

    def _final(self, jobs: Sequence[Job], one: Found, demands: Sequence[Mapping[str, int]]) -> bool:
        """Whether a new pass could not tell more about a layer: it has seen all rows, or settled before."""
        if one.complete and one.run.ended:
            return True
        if any(job.method.needs != "activations" for job in jobs):
            self.reason = "what is stored was computed from fewer rows than there are now"
            return False
        for job, demand in zip(jobs, demands, strict=True):
            if one.statistic is not None and not is_settled(one.statistic, job, one.names, demand):
                self.reason = (
                    f"what is stored of '{one.names[0]}' had not settled to tau={job.request.eva.tau:g}, and there are "
                    "more rows"
                )
                return False
        return one.statistic is not None

    def _demand(self, job: Job, found: Mapping[str, Found]) -> Mapping[str, int]:
        """Directions that each layer of a job would get just now."""
        names = [target.name for target in job.targets if target.name in found]
        return job.request.demand(assemble_observed(names, found, gradients=False).sites)


class _Watched(Watched):
    """Refuses to begin where the model cannot run."""

    def __init__(self, data: OfferedData, loader: Iterable[Any], has_weights: bool) -> None:
        super().__init__(data, loader)
        self._has_weights = has_weights

    def __iter__(self) -> Iterator[Any]:
        if not self._has_weights:
            raise NotStoredError(
                "what the data do in the model is not in the store, and finding it out takes the model's weights, "
                "which are not loaded"
            )
        return super().__iter__()


def _groups(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that read activations, and jobs that read gradients; each kind has passes of its own."""
    reading = [job for job in jobs if job.method.needs in ("activations", "covariance")]
    learning = [job for job in jobs if job.method.needs == "gradients"]
    return [group for group in (reading, learning) if group]


def _settled(jobs: Sequence[Job], observed: Observed) -> set[str]:
    """Leaders of sites that have reached every job's ``tau``."""
    if any(job.method.needs != "activations" for job in jobs):
        return set()
    demands = [(job, job.request.demand(observed.sites)) for job in jobs]
    return {
        site.names[0]
        for site in observed.sites
        if all(is_settled(site.statistic, job, site.names, demand) for job, demand in demands)
    }


def _names(jobs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(target.name for job in jobs for target in job.targets))
