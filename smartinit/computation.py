"""The costly half, in order: statistics, spectra; then the artefacts that follow from them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from smartinit.assembly import assemble
from smartinit.corda_files import CordaFiles
from smartinit.decomposition import Decomposed, decompose
from smartinit.layer_start import LayerStarts
from smartinit.observation import Observed, observe

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from smartinit.artefact import Artefact
    from smartinit.decomposition import KeptSpectra
    from smartinit.job import Job
    from smartinit.run_options import Options


class Kept(Protocol):
    """What earlier computations have left, and where this one leaves its own."""

    @property
    def spectra(self) -> KeptSpectra:
        """Of layers."""
        ...

    def known(self, jobs: Sequence[Job]) -> Observed:
        """Statistics that need no pass."""
        ...

    def watched(self, dataloader: Iterable[Any] | None) -> Iterable[Any] | None:
        """The data, looked at while they are used."""
        ...

    def keep(self, jobs: Sequence[Job], observed: Observed) -> None:
        """Take what the passes found."""
        ...


def compute_fresh(
    model: nn.Module,
    jobs: Sequence[Job],
    dataloader: Iterable[Any] | None,
    options: Options,
    kept: Kept | None = None,
) -> list[Artefact]:
    """The artefact of each job; see `smartinit.compute` for what is raised.

    Args:
        model: run as is, and left as it was.
        jobs: what is wanted, of which layers.
        dataloader: see `smartinit.compute`.
        options: the same for all jobs.
        kept: what need not be computed again; None: everything is.
    """
    files = CordaFiles.of(model, jobs, dataloader, options.max_batches)
    cached = None if files is None else files.spectra()
    if cached is not None:
        observed, decomposed = Observed(), [Decomposed(cached)]
    else:
        observed = _observed(model, jobs, dataloader, options, files, kept)
        decomposed = decompose(
            jobs,
            observed,
            seed=options.seed,
            show_progress_bar=options.show_progress_bar,
            kept=None if kept is None else kept.spectra,
        )
        if files is not None:
            files.keep_spectra(decomposed[0].spectra)
    starts = LayerStarts(observed, seed=options.seed)
    artefacts = []
    for job, found in zip(jobs, decomposed, strict=True):
        started = time.perf_counter()
        artefact = assemble(model, job, found.spectra, observed, starts, options)
        timings = {
            "activations": observed.seconds,
            "spectra": found.seconds,
            "factors": time.perf_counter() - started,
        }
        artefacts.append(replace(artefact, timings=timings))
    return artefacts


def _observed(
    model: nn.Module,
    jobs: Sequence[Job],
    dataloader: Iterable[Any] | None,
    options: Options,
    files: CordaFiles | None,
    kept: Kept | None,
) -> Observed:
    """Statistics: those that are kept, and the others from passes over the data."""
    known = Observed() if kept is None else kept.known(jobs)
    observed = observe(
        model,
        jobs,
        dataloader if kept is None else kept.watched(dataloader),
        loss_fn=options.loss_fn,
        max_batches=options.max_batches,
        seed=options.seed,
        show_progress_bar=options.show_progress_bar,
        skip_bad_batches=options.skip_bad_batches,
        merge_ranks=options.merge_ranks,
        files=files,
        known=known,
        **options.capture,
    )
    if kept is not None:
        kept.keep(jobs, observed)
    return observed
