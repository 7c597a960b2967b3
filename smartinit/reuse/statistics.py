"""Statistics of sites in the store: one entry for each layer, so that any choice of layers finds what there is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smartinit.activations.sites import Site
from smartinit.gradients import TRIPLETS_PER_RANK
from smartinit.observation import Observed
from smartinit.statistics.gradient import GradientSketch
from smartinit.statistics.gram import GramStatistic
from smartinit.statistics.subspace import SubspacePCA
from smartinit.store.keys import Key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smartinit.job import Job
    from smartinit.reuse.keeping import Keeper
    from smartinit.store.manifest import Manifest

_CLASSES: Mapping[str, Any] = {"gram": GramStatistic, "subspace": SubspacePCA, "gradient": GradientSketch}
_NAMES = {kind: name for name, kind in _CLASSES.items()}
_FORMS = {"activations": "principal", "covariance": "moments", "gradients": "gradient"}


@dataclass(frozen=True)
class Run:
    """A pass over data that left statistics.

    Attributes:
        rows: how many rows were read, by all ranks.
        data: their digest, as it stands in keys.
        ended: whether these are all the rows that the call at hand may read.
        meta: what the pass counted.
    """

    rows: int
    data: str
    ended: bool
    meta: Mapping[str, Any] = field(default_factory=dict)

    def leaves(self) -> dict[str, Any]:
        """As part of a key."""
        return {"rows": self.rows, "digest": self.data}


@dataclass
class Found:
    """A statistic out of the store.

    Attributes:
        statistic: itself; None for a layer that the data never reached.
        names: the layers of its site, the leader first.
        index: place of the site in the order in which they ran.
        complete: whether it has seen every row of its run.
        origin: digest of its content.
        run: where it is from.
    """

    statistic: Any
    names: tuple[str, ...]
    index: int
    complete: bool
    origin: str
    run: Run


class StoredStatistics:
    """Statistics of one model under one policy.

    Args:
        keeper: the store.
        policy: see `smartinit.reuse.identity.Identity.policy`.
    """

    def __init__(self, keeper: Keeper, policy: Mapping[str, Any]) -> None:
        self._keeper = keeper
        self._policy = policy
        self._found: dict[str, Found | None] = {}

    def find(self, jobs: Sequence[Job], name: str, run: Run) -> Found | None:
        """What a run left of one layer that all the jobs' methods can read: of their form, or a whole second moment."""
        forms = list(dict.fromkeys(_FORMS[job.method.needs or ""] for job in jobs))
        if len(forms) > 1 or forms == ["moments"]:
            forms = ["moments"]  # which serves methods that read directions as well
        elif forms == ["principal"]:
            forms.append("moments")
        centred = any(job.method.centred for job in jobs)
        found = (self._entry(name, run, form, centred) for form in forms)
        return next((one for one in found if one is not None), None)

    def keep(self, job: Job, observed: Observed, run: Run, *, known: Mapping[int, str]) -> dict[int, str]:
        """Store what a pass found for a job's layers.

        Args:
            job: whose layers and form.
            observed: statistics of the pass.
            run: which rows it read.
            known: identity of a statistic -> digest of its content: of those that are in the store already.

        Returns:
            The same for those that are in the store now.
        """
        origins: dict[int, str] = {}
        form = _FORMS[job.method.needs or ""]
        if form == "gradient":
            ran = set(observed.gradients)
            for index, (name, sketch) in enumerate(observed.gradients.items()):
                if id(sketch) not in known:
                    self._put(Found(sketch, (name,), index, True, "", run), form, origins)
        else:
            ran = set(observed.site_of)
            for index, site in enumerate(observed.sites):
                if id(site.statistic) not in known:
                    complete = site.names[0] not in observed.settled
                    found = Found(site.statistic, tuple(site.names), index, complete, "", run)
                    self._put(found, _form(site.statistic), origins)
        for target in job.targets:
            if target.name not in ran:
                self._keeper.put(self._key(target.name, run, form), meta={"absent": True}, basis="absent")
        return origins

    def _put(self, found: Found, form: str, origins: dict[int, str]) -> None:
        statistic, names, run = found.statistic, found.names, found.run
        key = self._key(names[0], run, form)
        there = self._keeper.whole(key)
        if there is not None and not _better(found, there.meta):
            return
        meta = {
            "class": _NAMES[type(statistic)],
            "components": int(statistic.components),
            "centred": bool(getattr(statistic, "centred", False)),
            "names": list(names),
            "index": found.index,
            "complete": found.complete,
            "rows": int(statistic.rows),
        }
        basis, replace = f"{statistic.components} {found.complete}", there is not None
        manifest = self._keeper.put(key, statistic.state(), meta, basis=basis, replace=replace)
        if manifest is None:
            return
        origins[id(statistic)] = _origin(manifest)
        for other in names[1:]:  # the others point to the first
            pointer = {"leader": names[0]}
            self._keeper.put(self._key(other, run, form), meta=pointer, basis=names[0], replace=replace)

    def _entry(self, name: str, run: Run, form: str, centred: bool) -> Found | None:
        key = self._key(name, run, form)
        known = f"{key.digest} {centred}"
        if known not in self._found:
            self._found[known] = self._read(key, name, run, form, centred)
        return self._found[known]

    def _read(self, key: Key, name: str, run: Run, form: str, centred: bool) -> Found | None:
        manifest = self._keeper.peek(key)
        if manifest is None:
            return None
        meta = manifest.meta
        if meta.get("absent"):
            return Found(None, (name,), -1, True, "", run)
        if "leader" in meta:
            leader = str(meta["leader"])
            found = None if leader == name else self._entry(leader, run, form, centred)
            return found if found is not None and name in found.names else None
        entry = self._keeper.get(key)
        if entry is None:
            return None
        with entry:
            statistic = _CLASSES[meta["class"]].from_state(dict(entry.tensors))
        if form == "moments":
            statistic.centred = centred  # it holds both
        elif form == "principal" and statistic.centred != centred:
            return None
        names = tuple(str(other) for other in meta["names"])
        return Found(statistic, names, int(meta["index"]), bool(meta["complete"]), _origin(manifest), run)

    def _key(self, name: str, run: Run, form: str) -> Key:
        return Key("statistic", {**self._policy, "data": run.leaves(), "form": form, "layer": name})


def enough(jobs: Sequence[Job], name: str, found: Found) -> str | None:
    """Why a statistic has too few directions for one layer of some jobs; None if it has enough."""
    if found.statistic is None:
        return None
    wanted = max(job.request.components.get(name, 0) for job in jobs)
    limit = min(found.statistic.shape) if hasattr(found.statistic, "shape") else found.statistic.features
    if hasattr(found.statistic, "shape"):
        wanted *= TRIPLETS_PER_RANK
    held = found.statistic.components
    if held < min(wanted, limit):
        return f"what is stored of '{name}' holds {held} directions, and {wanted} are wanted"
    return None


def is_settled(statistic: Any, job: Job, names: Sequence[str], demand: Mapping[str, int]) -> bool:  # noqa: ANN401
    """Whether a site's directions have reached a job's ``tau``, as far as its layers need them just now."""
    need = max((demand.get(name, 0) for name in names), default=0)
    return bool(statistic.settled(job.request.eva.tau, need))


def assemble_observed(job_names: Sequence[str], found: Mapping[str, Found], *, gradients: bool) -> Observed:
    """What passes would have left, from the store."""
    out = Observed()
    if gradients:
        out.gradients = {name: found[name].statistic for name in job_names if found[name].statistic is not None}
        return out
    sites: dict[int, Site] = {}
    order: dict[int, tuple[int, int]] = {}
    for place, name in enumerate(job_names):
        one = found[name]
        if one.statistic is None:
            continue
        if id(one.statistic) not in sites:
            sites[id(one.statistic)] = Site([], one.statistic.features, one.statistic, open=False)
            order[id(one.statistic)] = (one.index, place)
        sites[id(one.statistic)].names.append(name)
    out.sites = [sites[key] for key in sorted(sites, key=lambda key: order[key])]
    return out


def _better(found: Found, meta: Mapping[str, Any]) -> bool:
    """Whether a statistic knows more than the one that is there, or is that of more layers."""
    ours = (found.complete, int(found.statistic.components))
    theirs = (bool(meta.get("complete")), int(meta.get("components", 0)))
    return ours > theirs or (ours == theirs and not set(found.names) <= set(meta.get("names", ())))


def _form(statistic: Any) -> str:  # noqa: ANN401 - of a class in `_CLASSES`
    return "moments" if getattr(statistic, "moments_only", False) else "principal"


def _origin(manifest: Manifest) -> str:
    return next((blob.sha256 for blob in manifest.blobs.values()), "")
