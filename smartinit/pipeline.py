"""The whole flow on one screen: targets → activations → statistics → spectra → plan → factors → artefact."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers

import smartinit
from smartinit.activations.forward import unwrap
from smartinit.activations.rows import (
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from smartinit.artefact import Artefact
from smartinit.corda_files import CordaFiles
from smartinit.decomposition import Decomposed, decompose
from smartinit.errors import ConfigError
from smartinit.initialisation import resolve_config, resolve_method
from smartinit.job import Job
from smartinit.layer_start import LayerStarts
from smartinit.methods import available_methods
from smartinit.observation import Observed, observe
from smartinit.planning.limits import Limits
from smartinit.rank_request import RankRequest
from smartinit.recipe import Recipe
from smartinit.targets.select import check_ranks, select_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from smartinit.activations.rows import ForwardFn, PrepareLayerInputs, PrepareModelInputs
    from smartinit.methods.base import Method
    from smartinit.rank_request import Planner
    from smartinit.spectrum import Spectrum


def compute(
    model: nn.Module,
    config: Any = None,  # noqa: ANN401 - a LoraConfig of ours or PEFT's, or a dict
    dataloader: Iterable[Any] | None = None,
    *,
    store: None = None,
    max_batches: int | None = None,
    planner: Planner | None = None,
    budget: int | None = None,
    params: int | None = None,
    captured: float | None = None,
    rank_multiple_of: int = 1,
    min_rank: int = 0,
    max_rank: int | None = None,
    seed: int = 0,
    skip_bad_batches: bool = False,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    forward_fn: ForwardFn = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        PrepareLayerInputs | Mapping[str, PrepareLayerInputs] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    none_means: Literal["defaults", "all"] = "defaults",
    method: str | Method | None = None,
    provenance: Mapping[str, Any] | None = None,
    show_progress_bar: bool = True,
) -> Artefact:
    """Compute the starting point of every adapter layer.

    Args:
        model: a plain module, a `smartinit.LoraModel` or a ``peft.PeftModel``; it is left exactly as it was.
        config: what to adapt and how it starts; None on a wrapped model: that of ``adapter_name``.
        dataloader: batches for the forward pass, iterated once; by methods that read gradients up to three times (a
            generator once, which is less exact); not read by methods that need no data.
        store: reserved; must be None.
        max_batches: bound on forward passes; None: one pass over the data. Layers stop paying when they settle.
        planner: ``"variance"`` redistributes ranks by explained variance, ``"uniform"`` keeps those asked for; None:
            what the method's authors do, which is uniform but for EVA.
        budget: most ranks in total; None: the sum of those asked for.
        params: most adapter parameters in total, instead of ``budget``.
        captured: give every layer the smallest rank that captures this share (0..1) of its spectrum, instead of the
            ranks asked for.
        rank_multiple_of: every rank is a multiple of this.
        min_rank: every target gets at least this.
        max_rank: no target gets more than this.
        seed: of the random sketches.
        skip_bad_batches: count and skip batches with NaN or Inf in some layer's input.
        loss_fn: ``(outputs, batch)`` -> scalar, for methods that read gradients; None: the model's own loss.
        forward_fn: ``(model, batch)``, see `smartinit.activations.capture.Capture`.
        prepare_model_inputs_fn: PEFT's contract, same place.
        prepare_layer_inputs_fn: PEFT's contract, same place.
        adapter_name: which configuration of a wrapped model.
        gather_distributed_inputs: with several ranks, merge their statistics.
        none_means: what ``target_modules=None`` means on a plain model.
        method: initialisation by name, or a finished method with its options, instead of the configuration's
            ``init_lora_weights``.
        provenance: recorded in the artefact next to what is known here.
        show_progress_bar: tqdm on stderr.

    Returns:
        Plan, factors, certificates and provenance; nothing is written anywhere.

    Raises:
        ConfigError: options that cannot be, targets that match nothing, ranks above ``min(in, out)``.
        DataError: no data, too few tokens, or (as `NonFiniteError`) NaN in a layer's input.

    Cost: one forward pass per batch plus ``4 d q`` flops per token and site (EVA, q ≈ 2·rank·rho), or ``d²`` (methods
    that read second moments); then each method's own, see `smartinit.methods`.
    """
    options = Options(
        max_batches=max_batches,
        planner=planner,
        limits=Limits(budget, params, rank_multiple_of, min_rank, max_rank),
        captured=captured,
        seed=seed,
        skip_bad_batches=skip_bad_batches,
        adapter_name=adapter_name,
        merge_ranks=gather_distributed_inputs,
        none_means=none_means,
        provenance=provenance or {},
        show_progress_bar=show_progress_bar,
        loss_fn=loss_fn,
        capture={
            "forward_fn": forward_fn,
            "prepare_model_inputs_fn": prepare_model_inputs_fn,
            "prepare_layer_inputs_fn": prepare_layer_inputs_fn,
        },
    )
    return _run(model, [(config, method)], dataloader, store, options)[0]


def compute_many(
    model: nn.Module,
    requests: Sequence[Any],
    dataloader: Iterable[Any] | None = None,
    *,
    store: None = None,
    max_batches: int | None = None,
    seed: int = 0,
    skip_bad_batches: bool = False,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    forward_fn: ForwardFn = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        PrepareLayerInputs | Mapping[str, PrepareLayerInputs] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    provenance: Mapping[str, Any] | None = None,
    show_progress_bar: bool = True,
) -> list[Artefact]:
    """Several starting points of one model from one pass over the data: a sweep over methods and ranks.

    Args:
        model: see `compute`.
        requests: configurations, or pairs ``(configuration, method)``; each becomes an artefact. With EVA beside a
            method that reads whole second moments, EVA's directions come from these, exactly (without figures on
            held-out rows, as the moments are not kept in halves).
        dataloader: iterated once for activations, and up to three times more if a method reads gradients.
        store: see `compute`.
        max_batches: see `compute`.
        seed: see `compute`.
        skip_bad_batches: see `compute`.
        loss_fn: see `compute`.
        forward_fn: see `compute`.
        prepare_model_inputs_fn: see `compute`.
        prepare_layer_inputs_fn: see `compute`.
        provenance: see `compute`.
        show_progress_bar: see `compute`.

    Returns:
        One artefact per request, in their order.

    Raises:
        ConfigError, DataError: see `compute`.

    Cost: that of the costliest request, plus the cheap half (factors) of every other.
    """
    options = Options(
        max_batches=max_batches,
        seed=seed,
        skip_bad_batches=skip_bad_batches,
        provenance=provenance or {},
        show_progress_bar=show_progress_bar,
        loss_fn=loss_fn,
        capture={
            "forward_fn": forward_fn,
            "prepare_model_inputs_fn": prepare_model_inputs_fn,
            "prepare_layer_inputs_fn": prepare_layer_inputs_fn,
        },
    )
    pairs = [one if isinstance(one, tuple) else (one, None) for one in requests]
    if not pairs:
        raise ConfigError("compute_many got no requests; give at least one configuration")
    return _run(model, pairs, dataloader, store, options)


@dataclass(frozen=True)
class Options:
    """The arguments of `compute` that are the same for all requests."""

    capture: Mapping[str, Any]
    max_batches: int | None = None
    planner: Planner | None = None
    limits: Limits = field(default_factory=Limits)
    captured: float | None = None
    seed: int = 0
    skip_bad_batches: bool = False
    adapter_name: str = "default"
    merge_ranks: bool = True
    none_means: Literal["defaults", "all"] = "defaults"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    show_progress_bar: bool = True
    loss_fn: Callable[[Any, Any], Tensor] | None = None


def _run(
    model: nn.Module,
    pairs: Sequence[tuple[Any, str | Method | None]],
    dataloader: Iterable[Any] | None,
    store: None,
    options: Options,
) -> list[Artefact]:
    if store is not None:
        raise ConfigError("store is not supported yet: pass store=None and save the artefact to a folder")
    jobs = [_job(model, config, method, options) for config, method in pairs]
    return compute_jobs(model, jobs, dataloader, options)


def compute_jobs(
    model: nn.Module, jobs: Sequence[Job], dataloader: Iterable[Any] | None, options: Options
) -> list[Artefact]:
    """The artefact of each job, once it is known of which layers; see `compute` for what is raised."""
    if options.max_batches is not None and options.max_batches < 1:
        raise ConfigError(f"max_batches={options.max_batches}: expected at least 1")
    files = CordaFiles.of(model, jobs, dataloader, options.max_batches)
    cached = None if files is None else files.spectra()
    observed = (
        Observed()
        if cached is not None
        else observe(
            model,
            jobs,
            dataloader,
            loss_fn=options.loss_fn,
            max_batches=options.max_batches,
            seed=options.seed,
            show_progress_bar=options.show_progress_bar,
            skip_bad_batches=options.skip_bad_batches,
            merge_ranks=options.merge_ranks,
            files=files,
            **options.capture,
        )
    )
    if cached is not None:
        decomposed = [Decomposed(cached)]
    else:
        decomposed = decompose(jobs, observed, seed=options.seed, show_progress_bar=options.show_progress_bar)
        if files is not None:
            files.keep_spectra(decomposed[0].spectra)
    starts = LayerStarts(observed, seed=options.seed)
    artefacts = []
    for job, found in zip(jobs, decomposed, strict=True):
        started = time.perf_counter()
        artefact = _artefact(model, job, found.spectra, observed, starts, options)
        timings = {
            "activations": observed.seconds,
            "spectra": found.seconds,
            "factors": time.perf_counter() - started,
        }
        artefacts.append(replace(artefact, timings=timings))
    return artefacts


def _job(model: nn.Module, config: Any, method: str | Method | None, options: Options) -> Job:  # noqa: ANN401
    """Check one request against the model, before any data is read."""
    lora = resolve_config(model, config, options.adapter_name)
    chosen = resolve_method(lora, method)
    planner = chosen.planner if options.planner is None else options.planner
    if planner not in ("variance", "uniform"):
        raise ConfigError(f"planner={planner!r}: expected 'variance' or 'uniform'")
    if not chosen.has_shares and (planner == "variance" or options.captured is not None):
        wish = "captured" if options.captured is not None else "planner='variance'"
        raise ConfigError(
            f"{wish} gives ranks by shares of a spectrum, which '{chosen.name}' does not have here; leave it out, or "
            f"use one of {', '.join(name for name, kind in available_methods().items() if kind.ranked)}"
        )
    if options.captured is not None and not 0 < options.captured <= 1:
        raise ConfigError(f"captured={options.captured!r} cannot be: expected a share above 0, at most 1")
    wrapped = options.adapter_name if hasattr(model, "peft_config") else None
    targets = select_targets(model, lora, none_means=options.none_means, adapter_name=wrapped, hosts=chosen.hosts)
    check_ranks(targets, lora)
    request = RankRequest(targets, lora, planner, options.limits, options.captured)
    request.check()
    return Job(chosen, request, targets)


def _artefact(
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
    recipe = Recipe(
        method=job.method.name,
        options=job.method.options(),
        planner=job.request.as_options(),
        targets=tuple(factors),
        sampling={
            "max_batches": options.max_batches,
            "tau": job.request.eva.tau,
            "skip_bad_batches": options.skip_bad_batches,
        },
        numerics={"algorithm": "nystrom-1", "state": "float32", "small": "float64"},
        seed=options.seed,
        version=smartinit.__version__,
    )
    return Artefact(
        recipe=recipe,
        plan=plan,
        config=lora,
        factors=factors,
        layers=layers,
        sites=tuple(tuple(site.names) for site in observed.sites) if job.method.needs is not None else (),
        provenance=_provenance(model, observed, options.provenance),
        timings={},
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
