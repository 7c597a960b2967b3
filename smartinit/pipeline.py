"""The whole flow on one screen: targets → activations → statistics → spectra → plan → factors → artefact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from smartinit.activations.rows import (
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from smartinit.computation import compute_fresh
from smartinit.errors import ConfigError
from smartinit.initialisation import resolve_config, resolve_method
from smartinit.job import Job
from smartinit.methods import available_methods
from smartinit.planning.limits import Limits
from smartinit.rank_request import RankRequest
from smartinit.reuse.flow import compute_or_reuse
from smartinit.run_options import Options
from smartinit.store.store import as_store
from smartinit.targets.select import check_ranks, select_targets

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from smartinit.activations.rows import ForwardFn, PrepareLayerInputs, PrepareModelInputs
    from smartinit.artefact import Artefact
    from smartinit.methods.base import Method
    from smartinit.rank_request import Planner
    from smartinit.store import Store
    from smartinit.targets.fingerprint import ModelFingerprint


def compute(
    model: nn.Module,
    config: Any = None,  # noqa: ANN401 - a LoraConfig of ours or PEFT's, or a dict
    dataloader: Iterable[Any] | None = None,
    *,
    store: Store | str | os.PathLike[str] | None = None,
    refresh: bool = False,
    fingerprint: ModelFingerprint | None = None,
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
        store: where results are kept: a `smartinit.Store`, or its folder or URL. What is there is not computed again;
            ``artefact.provenance["store"]`` says what was. It needs data that can be iterated twice, and does not
            change a result but for what a larger request has left there, which is at least as exact.
        refresh: compute in any case, and let the results take the place of those in the store.
        fingerprint: of the model, if it is known: the weights are not read for it then, and need not even be there
            (a model on the meta device will do) as long as everything else is in the store.
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
        NotStoredError: the model has no weights, and they are needed.

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
        store=as_store(store),
        refresh=refresh,
        fingerprint=fingerprint,
        provenance=provenance or {},
        show_progress_bar=show_progress_bar,
        loss_fn=loss_fn,
        capture={
            "forward_fn": forward_fn,
            "prepare_model_inputs_fn": prepare_model_inputs_fn,
            "prepare_layer_inputs_fn": prepare_layer_inputs_fn,
        },
    )
    return _run(model, [(config, method)], dataloader, options)[0]


def compute_many(
    model: nn.Module,
    requests: Sequence[Any],
    dataloader: Iterable[Any] | None = None,
    *,
    store: Store | str | os.PathLike[str] | None = None,
    refresh: bool = False,
    fingerprint: ModelFingerprint | None = None,
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
        refresh: see `compute`.
        fingerprint: see `compute`.
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
        store=as_store(store),
        refresh=refresh,
        fingerprint=fingerprint,
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
    return _run(model, pairs, dataloader, options)


def _run(
    model: nn.Module,
    pairs: Sequence[tuple[Any, str | Method | None]],
    dataloader: Iterable[Any] | None,
    options: Options,
) -> list[Artefact]:
    jobs = [_job(model, config, method, options) for config, method in pairs]
    return compute_jobs(model, jobs, dataloader, options)


def compute_jobs(
    model: nn.Module, jobs: Sequence[Job], dataloader: Iterable[Any] | None, options: Options
) -> list[Artefact]:
    """The artefact of each job, once it is known of which layers; see `compute` for what is raised."""
    if options.max_batches is not None and options.max_batches < 1:
        raise ConfigError(f"max_batches={options.max_batches}: expected at least 1")
    if options.store is None:
        return compute_fresh(model, jobs, dataloader, options)
    return compute_or_reuse(model, jobs, dataloader, options)


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
