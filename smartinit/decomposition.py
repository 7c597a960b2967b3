"""The spectra of all layers, each computed once however many ranks and configurations want it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

from tqdm import tqdm

from smartinit.errors import ModelError, SmartinitError
from smartinit.methods.base import Method

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from smartinit.job import Job
    from smartinit.observation import Observed
    from smartinit.spectrum import Spectrum
    from smartinit.targets.weight import Target

# Layers of one shape that go to a method in one call: enough to fill a device, few enough to show progress.
_TOGETHER = 8


class KeptSpectra(Protocol):
    """Spectra that outlive the process."""

    def find(self, job: Job, target: Target, observed: Observed, limit: int) -> Spectrum | None:
        """Of one layer, with at least ``limit`` directions if there can be as many; None: it must be computed."""
        ...

    def keep(self, job: Job, target: Target, observed: Observed, limit: int, spectrum: Spectrum) -> None:
        """Take one that was computed."""
        ...


@dataclass
class Decomposed:
    """Spectra of one job.

    Attributes:
        spectra: target -> spectrum; targets that the method had no data of are left out.
        seconds: what they took; nothing for a job that got those of another.
    """

    spectra: dict[str, Spectrum] = field(default_factory=dict)
    seconds: float = 0.0


def layer_seed(seed: int, name: str) -> int:
    """Layers of one shape must not start alike."""
    return seed + crc32(name.encode())


def decompose(
    jobs: Sequence[Job],
    observed: Observed,
    *,
    seed: int = 0,
    show_progress_bar: bool = True,
    kept: KeptSpectra | None = None,
) -> list[Decomposed]:
    """Spectra by target name, one `Decomposed` per job.

    Jobs of one method share the costly part: it is done once, for the most directions that any of them wants, and
    cut for each. Layers of one shape go to the method together, and weights that several layers share are
    decomposed once. What ``kept`` has is taken from there, and the others are given to it as they are found.

    Raises:
        ModelError: a weight that cannot be read, or holds NaN or Inf.
    """
    wanted = [_wanted(job, observed) for job in jobs]
    groups: list[tuple[Method, list[int]]] = []
    for index, job in enumerate(jobs):
        same = next((members for method, members in groups if method == job.method and method.nested), None)
        if same is None:
            groups.append((job.method, [index]))
        else:
            same.append(index)
    total = sum(len({name for i in members for name in wanted[i]}) for _, members in groups)
    out = [Decomposed() for _ in jobs]
    with tqdm(total=total, desc="spectra", unit="layer", disable=not show_progress_bar) as progress:
        for _, members in groups:
            started = time.perf_counter()
            most: dict[str, int] = {}
            for i in members:
                for name, count in wanted[i].items():
                    most[name] = max(count, most.get(name, 0))
            whole: dict[str, Spectrum] = {}
            for names, spectra in _computed(jobs[members[0]], members, jobs, observed, most, seed, kept):
                whole.update(dict.fromkeys(names, spectra))
                progress.update(len(names))
            shapes = {t.name: t.shape for i in members for t in jobs[i].targets}
            out[members[0]].seconds = time.perf_counter() - started
            for i in members:
                out[i].spectra = {
                    name: replace(whole[name].truncate(count), shape=shapes[name]) for name, count in wanted[i].items()
                }
    return out


def _wanted(job: Job, observed: Observed) -> dict[str, int]:
    """Target -> directions; only what the method has data of."""
    if job.method.needs is None:
        return {t.name: job.request.candidates[t.name] for t in job.targets}
    if job.method.needs == "gradients":
        return {t.name: job.request.candidates[t.name] for t in job.targets if t.name in observed.gradients}
    site_of = observed.site_of
    together = job.method.needs == "activations"
    return {
        t.name: (job.request.candidates_at(site_of[t.name]) if together else job.request.candidates)[t.name]
        for t in job.targets
        if t.name in site_of
    }


def _computed(
    job: Job,
    members: Sequence[int],
    jobs: Sequence[Job],
    observed: Observed,
    limits: Mapping[str, int],
    seed: int,
    kept: KeptSpectra | None,
) -> Iterator[tuple[list[str], Spectrum]]:
    """Names that share a spectrum, and the spectrum."""
    method = job.method
    targets = {t.name: t for i in members for t in jobs[i].targets if t.name in limits}
    alike: dict[Any, list[Target]] = {}
    for target in targets.values():
        alike.setdefault(_identity(method, target, observed), []).append(target)
    batches: dict[Any, list[list[Target]]] = {}
    for same in alike.values():
        limit = max(limits[t.name] for t in same)
        spectrum = None if kept is None else kept.find(job, same[0], observed, limit)
        if spectrum is not None:
            yield [t.name for t in same], spectrum
            continue
        kind = (same[0].host, same[0].device, same[0].dtype)
        batches.setdefault((same[0].shape, limit, kind), []).append(same)
    for (shape, limit, (host, _, _)), group in batches.items():
        # One by one where that costs nothing: an error then names its layer.
        step = 1 if type(method).spectra is Method.spectra else _TOGETHER
        for start in range(0, len(group), step):
            some = group[start : start + step]
            leaders = [same[0] for same in some]
            weights = [_weight(t) if method.needs_weight else None for t in leaders]
            with _named(leaders):
                spectra = method.on(host).spectra(
                    weights,
                    [observed.statistic(job, t.name) for t in leaders],
                    limit,
                    shape,
                    seeds=[layer_seed(seed, t.name) for t in leaders],
                )
            for same, spectrum in zip(some, spectra, strict=True):
                if kept is not None:
                    kept.keep(job, same[0], observed, limit, spectrum)
                yield [t.name for t in same], spectrum


@contextmanager
def _named(targets: Sequence[Target]) -> Iterator[None]:
    """Errors of a method, which knows no names, say where they were."""
    try:
        yield
    except SmartinitError as error:
        others = f" or {len(targets) - 1} more of its shape" if len(targets) > 1 else ""
        error.args = (f"layer '{targets[0].name}'{others}: {error}",)  # of any class, whatever its constructor takes
        raise


def _identity(method: Method, target: Target, observed: Observed) -> object:
    """Equal for targets whose spectra are equal: of one site if only its input matters, of one weight if only that."""
    if method.needs == "activations" and not method.needs_weight:
        return id(observed.site_of[target.name])
    if method.needs is None and target.is_readable:
        return target.host, target.storage  # a tied embedding table is the transpose of the head
    return target.name


def _weight(target: Target) -> Any:  # noqa: ANN401 - a tensor
    if not target.has_finite_weight():
        raise ModelError(
            f"the weight of '{target.name}' holds NaN or Inf, so nothing can be computed from it; check the checkpoint"
        )
    return target.weight()
