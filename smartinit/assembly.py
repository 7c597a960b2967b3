"""The cheap half: from spectra to ranks, factors, and the artefact that holds them."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch
import transformers

import smartinit
from smartinit.activations.forward import unwrap
from smartinit.artefact import Artefact
from smartinit.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from smartinit.job import Job
    from smartinit.layer_start import LayerStarts
    from smartinit.observation import Observed
    from smartinit.run_options import Options
    from smartinit.spectrum import Spectrum


def assemble(
    model: nn.Module,
    job: Job,
    spectra: Mapping[str, Spectrum],
    observed: Observed,
    starts: LayerStarts,
    options: Options,
) -> Artefact:
    """The cheap half: ranks, then factors."""
    lora = job.request.config
    plan = job.request.plan({name: spectrum.ratios.tolist() for name, spectrum in spectra.items()})
    factors, layers = {}, {}
    for target in job.targets:
        factors[target.name], layers[target.name] = starts.of(job, target, plan, spectra.get(target.name))
    return Artefact(
        recipe=recipe_of(job, options),
        plan=plan,
        config=lora,
        factors=factors,
        layers=layers,
        sites=tuple(tuple(site.names) for site in observed.sites) if job.method.needs is not None else (),
        provenance=_provenance(model, observed, options.provenance),
        timings={},
    )


def recipe_of(job: Job, options: Options) -> Recipe:
    """What was asked for; known before anything is computed."""
    return Recipe(
        method=job.method.name,
        options=job.method.options(),
        planner=job.request.as_options(),
        targets=tuple(target.name for target in job.targets),
        sampling={
            "max_batches": options.max_batches,
            "tau": job.request.eva.tau,
            "skip_bad_batches": options.skip_bad_batches,
        },
        numerics={"algorithm": "nystrom-1", "state": "float32", "small": "float64"},
        seed=options.seed,
        version=smartinit.__version__,
    )


def _provenance(model: nn.Module, observed: Observed, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    inner = unwrap(model)
    parameter = next(iter(inner.parameters()), None)
    return {
        "model": getattr(getattr(inner, "config", None), "name_or_path", None) or type(inner).__name__,
        "model_class": type(inner).__name__,
        "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "device": None if parameter is None else parameter.device.type,
        "batches": observed.batches,
        "bad_batches": list(observed.bad_batches),
        "tokens": observed.tokens,
        "tokens_per_second": round(observed.tokens / observed.seconds, 1) if observed.seconds else None,
        "sites_settled": len(observed.settled),
        "versions": {
            "smartinit": smartinit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        **(extra or {}),
    }
