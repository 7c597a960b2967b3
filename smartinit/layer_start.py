"""One layer's start: its factors, and what follows from them: gain, magnitude, what is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from smartinit.artefact_record import LayerSummary
from smartinit.decomposition import layer_seed
from smartinit.errors import ConfigError, VerificationError
from smartinit.factors import Factors, default_factors
from smartinit.planning.gain import gain_of, match_gain
from smartinit.planning.moment import SecondMoment
from smartinit.spectrum import Certificate

if TYPE_CHECKING:
    from smartinit.job import Job
    from smartinit.methods.base import Method
    from smartinit.observation import Observed
    from smartinit.planning.plan import Plan
    from smartinit.spectrum import Spectrum
    from smartinit.targets.weight import Target


class LayerStarts:
    """Makes factors from spectra; keeps what layers of one site have in common.

    Args:
        observed: statistics of the layers' inputs.
        seed: of layers that never ran, which start by default.
    """

    def __init__(self, observed: Observed, *, seed: int) -> None:
        self._observed = observed
        self._site_of = observed.site_of
        self._seed = seed
        self._moments: dict[int, SecondMoment] = {}
        self._isotropic: dict[int, SecondMoment] = {}

    def of(self, job: Job, target: Target, plan: Plan, spectrum: Spectrum | None) -> tuple[Factors, LayerSummary]:
        """Factors of one layer and what is known of them.

        Args:
            job: method and configuration.
            target: the layer.
            plan: its rank and scaling.
            spectrum: None for a layer that the method has no data of.

        Raises:
            ConfigError: the configuration freezes the matrix that the method trains.
            VerificationError: the factors are not finite.
        """
        name, config = target.name, job.request.config
        rank, scaling = plan.ranks[name], plan.scaling(name)
        method = job.method.on(target.host)
        pair = self._factors(method, target, rank, scaling, spectrum)
        ratios: tuple[float, ...] = ()
        certificate = Certificate(rows=0)
        if spectrum is not None:
            ratios, certificate = tuple(spectrum.ratios.tolist()), self._certificate(job, name, rank, spectrum)
        if config.frozen_a:
            if pair.trains == "a":
                raise ConfigError(f"frozen_a leaves nothing to train: '{job.method.name}' trains A alone")
            pair = replace(pair, trains="b")
        if not (torch.isfinite(pair.a).all() and torch.isfinite(pair.b).all()):
            raise VerificationError(
                f"the factors of '{name}' by '{job.method.name}' hold NaN or Inf; check the weight and the data of it"
            )
        gain = None
        if rank:
            moment = self._moment(name, target.in_features)
            gain = gain_of(pair, scaling, moment, embedding=target.host == "embedding")
            if config.match_gain is not None:
                pair = match_gain(pair, gain)
                gain = gain_of(pair, scaling, moment, embedding=target.host == "embedding")
        if config.use_dora:
            pair = replace(pair, magnitude=magnitude(target, pair, scaling))
        kernel = tuple(target.module.kernel_size) if target.host == "convolution" else None  # type: ignore[arg-type]
        return pair, LayerSummary(target.shape, ratios, certificate, kind=target.host, kernel=kernel, gain=gain)

    def _factors(self, method: Method, target: Target, rank: int, scaling: float, spectrum: Spectrum | None) -> Factors:
        out_features, in_features = target.shape
        if rank == 0:  # no adapter: there is nothing to scale, and alpha may be 0
            empty = torch.zeros(0, dtype=torch.float32, device="cpu")
            return Factors(empty.reshape(0, in_features), empty.reshape(out_features, 0))
        if spectrum is None:
            return default_factors(rank, in_features, out_features, seed=layer_seed(self._seed, target.name))
        return replace(method.factors(spectrum, rank, scaling), trains=method.trains)

    def _moment(self, name: str, features: int) -> SecondMoment:
        site = self._site_of.get(name)
        if site is None or not site.statistic.rows:
            if features not in self._isotropic:
                self._isotropic[features] = SecondMoment.isotropic(features)
            return self._isotropic[features]
        statistic: Any = site.statistic
        if id(statistic) not in self._moments:
            self._moments[id(statistic)] = SecondMoment.of(statistic)
        return self._moments[id(statistic)]

    def _certificate(self, job: Job, name: str, rank: int, spectrum: Spectrum) -> Certificate:
        """Of the directions that were kept; the statistic knows more than the spectrum."""
        if job.method.needs != "activations":
            return spectrum.certificate
        site = self._site_of[name]
        return replace(site.statistic.certificate(rank), settled=site.names[0] in self._observed.settled)


def magnitude(target: Target, pair: Factors, scaling: float) -> torch.Tensor | None:
    """``(out,)`` float32 norms of the rows of what the layer computes with at first (arXiv 2402.09353, eq. 5).

    None where the weight cannot be read: whoever writes the adapter takes them from the layer then.
    """
    if not target.is_readable:
        return None
    whole = (target.weight() if pair.base is None else pair.base).float()
    if pair.effect in ("shifts", "quantises") and pair.rank:
        whole = whole + pair.delta(scaling).to(whole)
    norms: torch.Tensor = torch.linalg.vector_norm(whole, dim=1).cpu()
    return norms
