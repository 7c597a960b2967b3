"""CorDA's two files: second moments and spectra that an earlier run of the same model and data has left."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smartinit.activations.forward import unwrap
from smartinit.activations.sites import Site
from smartinit.errors import ConfigError, VerificationError
from smartinit.formats.covariance import (
    load_second_moments,
    load_spectra,
    save_second_moments,
    save_spectra,
    tensors_digest,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import nn

    from smartinit.job import Job
    from smartinit.spectrum import Spectrum


@dataclass(frozen=True)
class CordaFiles:
    """PEFT's ``covariance_file`` and ``cache_file`` of one run, and what they must be from.

    Attributes:
        covariance: second moments of the sites; None if not asked for.
        cache: spectra of the layers; None if not asked for.
        source: digest of the model's weights and the batches.
        wish: digest of these, the method's options and how many directions are wanted.
    """

    covariance: Path | None
    cache: Path | None
    source: str
    wish: str

    @classmethod
    def of(
        cls, model: nn.Module, jobs: Sequence[Job], dataloader: Iterable[Any] | None, max_batches: int | None
    ) -> CordaFiles | None:
        """The files that the configuration names; None if it names none.

        Raises:
            ConfigError: they are for several requests at once, or the data can be read only once.

        Cost: one read of the weights and of the batches.
        """
        named = [job for job in jobs if job.method.name == "corda" and _names(job)]
        if not named:
            return None
        if len(jobs) > 1:
            raise ConfigError("covariance_file and cache_file are for one request; compute_many needs neither")
        if dataloader is None or iter(dataloader) is dataloader:
            raise ConfigError(
                "covariance_file and cache_file are checked against the data, which must be a list or a DataLoader: "
                "it is read twice"
            )
        covariance, cache = _names(named[0]) or (None, None)
        source = tensors_digest(_everything(model, islice(dataloader, max_batches)))
        wanted = {"options": named[0].method.options(), "directions": named[0].request.candidates}
        wish = hashlib.sha256(f"{source} {json.dumps(wanted, sort_keys=True)}".encode()).hexdigest()
        return cls(Path(covariance) if covariance else None, Path(cache) if cache else None, source, wish)

    def spectra(self) -> dict[str, Spectrum] | None:
        """What ``cache_file`` holds; None if there is no such file yet.

        Raises:
            VerificationError: it is from another model, other data or other options.
            ArtefactError: it is no such file.
        """
        if self.cache is None or not self.cache.exists():
            return None
        return load_spectra(self.cache, digest=self.wish)

    def sites(self, names: Iterable[str]) -> list[Site] | None:
        """What ``covariance_file`` holds; None if there is no such file yet.

        Raises:
            VerificationError: it is from another model or other data, or lacks a layer.
            ArtefactError: it is no such file.
        """
        if self.covariance is None or not self.covariance.exists():
            return None
        found = [
            Site(list(members), statistic.features, statistic)
            for members, statistic in load_second_moments(self.covariance, digest=self.source)
        ]
        missing = set(names) - {name for site in found for name in site.names}
        if missing:
            raise VerificationError(
                f"'{self.covariance}' has no second moment for '{min(missing)}'; delete it, or name another file"
            )
        return found

    def keep_sites(self, sites: Sequence[Site]) -> None:
        """Write ``covariance_file`` if it is asked for."""
        if self.covariance is not None:
            moments: list[Any] = [(site.names, site.statistic) for site in sites]
            save_second_moments(self.covariance, moments, digest=self.source)

    def keep_spectra(self, spectra: Mapping[str, Spectrum]) -> None:
        """Write ``cache_file`` if it is asked for."""
        if self.cache is not None:
            save_spectra(self.cache, spectra, digest=self.wish)


def _names(job: Job) -> tuple[str | None, str | None] | None:
    corda = job.request.config.corda_config
    if corda is None or not (corda.covariance_file or corda.cache_file):
        return None
    return corda.covariance_file, corda.cache_file


def _everything(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from unwrap(model).state_dict().items()
    for index, batch in enumerate(batches):
        items = batch.items() if hasattr(batch, "items") else [("", batch)]
        yield from ((f"{index}.{key}", value) for key, value in items if isinstance(value, torch.Tensor))
