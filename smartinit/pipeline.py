"""The whole flow on one screen: targets → activations → statistics → spectra → plan → factors → artefact."""

from __future__ import annotations

import math
import platform
import time
import warnings
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
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
from smartinit.artefact import Artefact, LayerSummary
from smartinit.collect import collect
from smartinit.config import LoraConfig
from smartinit.errors import ConfigError, DataError
from smartinit.factors import default_factors
from smartinit.methods import available_methods
from smartinit.planning.limits import Limits
from smartinit.planning.scaling import plan_with_alphas
from smartinit.planning.uniform import uniform_ranks
from smartinit.planning.variance import component_limit, variance_ranks
from smartinit.recipe import Recipe
from smartinit.spectrum import Certificate
from smartinit.targets.patterns import alpha_for, rank_for
from smartinit.targets.select import check_ranks, select_targets

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

    from smartinit.activations.rows import ForwardFn, PrepareLayerInputs, PrepareModelInputs
    from smartinit.activations.sites import Site
    from smartinit.collect import Collected
    from smartinit.methods.base import Method
    from smartinit.planning.plan import Plan
    from smartinit.spectrum import Spectrum
    from smartinit.targets.weight import Target

Planner = Literal["variance", "uniform"]


def compute(
    model: nn.Module,
    config: Any = None,  # noqa: ANN401 - a LoraConfig of ours or PEFT's, or a dict
    dataloader: Iterable[Any] | None = None,
    *,
    store: None = None,
    max_batches: int | None = None,
    planner: Planner = "variance",
    budget: int | None = None,
    params: int | None = None,
    rank_multiple_of: int = 1,
    min_rank: int = 0,
    max_rank: int | None = None,
    seed: int = 0,
    skip_bad_batches: bool = False,
    forward_fn: ForwardFn = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        PrepareLayerInputs | Mapping[str, PrepareLayerInputs] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    none_means: Literal["defaults", "all"] = "defaults",
    method: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    show_progress_bar: bool = True,
) -> Artefact:
    """Compute the starting point of every adapter layer.

    Args:
        model: a plain module, a `smartinit.LoraModel` or a ``peft.PeftModel``; it is left exactly as it was.
        config: what to adapt and how it starts; None on a wrapped model: that of ``adapter_name``.
        dataloader: batches for the forward pass, iterated at most once.
        store: reserved; must be None.
        max_batches: bound on forward passes; None: one pass over the data. Layers stop paying when they settle.
        planner: ``"variance"`` redistributes ranks by explained variance, ``"uniform"`` keeps those asked for.
        budget: most ranks in total; None: the sum of those asked for.
        params: most adapter parameters in total, instead of ``budget``.
        rank_multiple_of: every rank is a multiple of this.
        min_rank: every target gets at least this.
        max_rank: no target gets more than this.
        seed: of the random sketches.
        skip_bad_batches: count and skip batches with NaN or Inf in some layer's input.
        forward_fn: ``(model, batch)``, see `smartinit.activations.capture.Capture`.
        prepare_model_inputs_fn: PEFT's contract, same place.
        prepare_layer_inputs_fn: PEFT's contract, same place.
        adapter_name: which configuration of a wrapped model.
        gather_distributed_inputs: with several ranks, merge their statistics.
        none_means: what ``target_modules=None`` means on a plain model.
        method: initialisation by name, instead of the configuration's ``init_lora_weights``.
        provenance: recorded in the artefact next to what is known here.
        show_progress_bar: tqdm on stderr.

    Returns:
        Plan, factors, certificates and provenance; nothing is written anywhere.

    Raises:
        ConfigError: options that cannot be, targets that match nothing, ranks above ``min(in, out)``.
        DataError: no data, too few tokens, or (as `NonFiniteError`) NaN in a layer's input.

    Cost: one forward pass per batch plus ``4 d q`` flops per token and site (EVA, q ≈ 2·rank·rho).
    """
    if store is not None:
        raise ConfigError("store is not supported yet: pass store=None and save the artefact to a folder")
    lora = _resolve_config(model, config, adapter_name)
    initialisation = _resolve_method(lora, method)
    limits = Limits(budget, params, rank_multiple_of, min_rank, max_rank)
    if planner not in ("variance", "uniform"):
        raise ConfigError(f"planner={planner!r}: expected 'variance' or 'uniform'")
    if max_batches is not None and max_batches < 1:
        raise ConfigError(f"max_batches={max_batches}: expected at least 1")
    if dataloader is None:
        raise ConfigError(f"the method '{initialisation.name}' needs activations: pass a dataloader")
    wrapped = adapter_name if hasattr(model, "peft_config") else None
    targets = select_targets(model, lora, none_means=none_means, adapter_name=wrapped)
    check_ranks(targets, lora)
    request = _Request(targets, lora, planner, limits)
    request.check()
    collected = collect(
        model,
        targets,
        dataloader,
        request.components,
        demand=request.demand,
        tau=_eva(lora).tau,
        centred=initialisation.centred,
        max_batches=max_batches,
        seed=seed,
        merge_ranks=gather_distributed_inputs,
        show_progress_bar=show_progress_bar,
        config=lora,
        forward_fn=forward_fn,
        prepare_model_inputs_fn=prepare_model_inputs_fn,
        prepare_layer_inputs_fn=prepare_layer_inputs_fn,
        skip_bad_batches=skip_bad_batches,
    )
    started = time.perf_counter()
    site_of = {name: site for site in collected.sites for name in site.names}
    _check_rows(request, site_of)
    spectra = _spectra(initialisation, request, site_of)
    plan = request.plan({name: spectrum.ratios.tolist() for name, spectrum in spectra.items()})
    factors, layers = {}, {}
    for target in targets:
        name, rank = target.name, plan.ranks[target.name]
        if name in spectra:
            spectrum = spectra[name]
            factors[name] = initialisation.factors(spectrum, rank, plan.scaling(name))
            certificate = _certificate(site_of[name], rank, collected)
            layers[name] = LayerSummary(spectrum.shape, tuple(spectrum.ratios.tolist()), certificate)
        else:
            own_seed = seed + zlib.crc32(name.encode())  # layers of one shape must not start alike
            factors[name] = default_factors(rank, target.in_features, target.out_features, seed=own_seed)
            layers[name] = LayerSummary((target.out_features, target.in_features), (), Certificate(rows=0))
    recipe = Recipe(
        method=initialisation.name,
        options=initialisation.options(),
        planner={"name": planner, **request.as_options()},
        targets=tuple(factors),
        sampling={"max_batches": max_batches, "tau": _eva(lora).tau, "skip_bad_batches": skip_bad_batches},
        numerics={"algorithm": "nystrom-1", "state": "float32", "small": "float64"},
        seed=seed,
        version=smartinit.__version__,
    )
    return Artefact(
        recipe=recipe,
        plan=plan,
        config=lora,
        factors=factors,
        layers=layers,
        sites=tuple(tuple(site.names) for site in collected.sites),
        provenance=_provenance(model, collected, provenance),
        timings={"activations": collected.seconds, "factors": time.perf_counter() - started},
    )


@dataclass(frozen=True)
class _Request:
    """What is wanted of the targets, before any data was seen."""

    targets: Sequence[Target]
    config: LoraConfig
    planner: Planner
    limits: Limits

    @cached_property
    def asked(self) -> dict[str, int]:
        """Target -> the rank asked for."""
        return {t.name: rank_for(self.config, t.name) for t in self.targets}

    @cached_property
    def caps(self) -> dict[str, int]:
        """Target -> ``min(in, out)``."""
        return {t.name: min(t.in_features, t.out_features) for t in self.targets}

    @cached_property
    def candidates(self) -> dict[str, int]:
        """Target -> directions with which it competes."""
        rho = _eva(self.config).rho if self.planner == "variance" else 1.0
        caps, top = self.caps, self.limits.max_rank
        return {
            name: max(
                component_limit(rank, rho, caps[name])
                if top is None
                else min(top, component_limit(rank, rho, caps[name])),
                min(self.limits.min_rank, caps[name]),
            )
            for name, rank in self.asked.items()
        }

    @cached_property
    def components(self) -> dict[str, int]:
        """Target -> directions that its statistic must hold: siblings with inputs of one width may share one."""
        family = {t.name: (t.name.rpartition(".")[0], t.in_features) for t in self.targets}
        most: dict[tuple[str, int], int] = {}
        for name, count in self.candidates.items():
            most[family[name]] = max(count, most.get(family[name], 0))
        return {name: most[key] for name, key in family.items()}

    def candidates_at(self, site: Site) -> dict[str, int]:
        """Target -> directions with which it competes at a site: all with as many as the most, as in PEFT."""
        most = max(self.candidates[name] for name in site.names)
        return {name: min(most, self.caps[name], self.limits.max_rank or most) for name in site.names}

    def check(self) -> None:
        """Refuse bounds that cannot be kept before any data is read.

        Raises:
            ConfigError: see `variance_ranks`; or no layer would get any rank.
        """
        shares = {name: [2.0**-i for i in range(count)] for name, count in self.candidates.items()}
        if not sum(self.ranks(shares).values()):
            raise ConfigError(
                "no layer would get any rank: the budget, or the ranks asked for, are below one step of "
                f"{self.limits.multiple_of} ranks; raise budget, params or r, or lower rank_multiple_of"
            )

    def ranks(self, ratios: Mapping[str, Sequence[float]]) -> dict[str, int]:
        """Ranks for the targets in ``ratios``."""
        asked = {name: self.asked[name] for name in ratios}
        costs = {t.name: t.in_features + t.out_features for t in self.targets if t.name in ratios}
        if self.planner == "uniform":
            return uniform_ranks(asked, {n: self.caps[n] for n in ratios}, costs, self.limits)
        return variance_ranks(ratios, asked, costs, self.limits)

    def demand(self, sites: Sequence[Site]) -> dict[str, int]:
        """How many directions each target would get if the data ended now."""
        shares = {
            name: site.statistic.explained(count).tolist()
            for site in sites
            for name, count in self.candidates_at(site).items()
        }
        order = [t.name for t in self.targets if t.name in shares]
        return self.ranks({name: shares[name] for name in order})

    def plan(self, ratios: Mapping[str, Sequence[float]]) -> Plan:
        """Final ranks and alphas."""
        ranks = self.ranks(ratios)
        # A layer that never ran has no share to compete with: what was asked for, unless the budget is explicit.
        free = self.limits.budget is None and self.limits.params is None
        return plan_with_alphas(
            {n: ranks[n] if n in ranks else self.limits.ceiling(self.asked[n]) * free for n in self.asked},
            self.asked,
            {t.name: alpha_for(self.config, t.name) for t in self.targets},
            use_rslora=self.config.use_rslora,
            adjust=_eva(self.config).adjust_scaling_factors,
        )

    def as_options(self) -> dict[str, Any]:
        """For the recipe."""
        bounds = self.limits
        return {
            "rho": _eva(self.config).rho,
            "adjust_scaling_factors": _eva(self.config).adjust_scaling_factors,
            "budget": bounds.budget,
            "params": bounds.params,
            "multiple_of": bounds.multiple_of,
            "min_rank": bounds.min_rank,
            "max_rank": bounds.max_rank,
            "ranks": self.asked,
        }


def _resolve_config(model: nn.Module, config: Any, adapter_name: str) -> LoraConfig:  # noqa: ANN401
    if config is None:
        configs = getattr(model, "peft_config", None)
        if configs is None:
            raise ConfigError("config is required when the model is neither a PeftModel nor a smartinit.LoraModel")
        if adapter_name not in configs:
            raise ConfigError(f"the model has no adapter '{adapter_name}'; it has {sorted(configs)}")
        config = configs[adapter_name]
    return LoraConfig.from_any(config)


def _resolve_method(config: LoraConfig, name: str | None) -> Method:
    """The one place where a configuration's method becomes an object with options."""
    name = config.method if name is None else name
    methods = available_methods()
    if name not in methods:
        raise ConfigError(f"the method '{name}' cannot be computed by this version; available: {', '.join(methods)}")
    kind = methods[name]
    options = {"whiten": _eva(config).whiten} if name == "eva" else {}
    return kind(**options)


def _eva(config: LoraConfig) -> Any:  # noqa: ANN401 - EvaConfig
    """The EVA options; their defaults when the configuration has none (its method is another)."""
    return config.eva_config or smartinit.EvaConfig()


def _check_rows(request: _Request, site_of: Mapping[str, Site]) -> None:
    """Too few rows for a rank is an error, unless most layers have enough: then only some experts starve."""
    asked = request.asked
    short = {
        t.name: site_of[t.name].statistic.rows if t.name in site_of else 0
        for t in request.targets
        if t.name not in site_of or site_of[t.name].statistic.rows <= asked[t.name]
    }
    if not short:
        return
    name, rows = max(short.items(), key=lambda item: item[1])
    if len(short) == len(request.targets):
        raise DataError(
            f"too few tokens: layer '{name}' saw {rows}, but {asked[name]} centred directions need at least "
            f"{asked[name] + 1}; pass more data or lower the rank"
        )
    warnings.warn(
        f"{len(short)} of {len(request.targets)} layers saw too few tokens for their rank "
        f"(the most: {rows} at '{name}'); "
        "those that never ran start as LoRA does by default (not at all under an explicit budget), the others with "
        "what they saw",
        stacklevel=3,
    )


def _spectra(method: Method, request: _Request, site_of: Mapping[str, Site]) -> dict[str, Spectrum]:
    """One decomposition per site; each target takes as many of its directions as it competes with."""
    by_site: dict[int, Spectrum] = {}
    out = {}
    for target in request.targets:
        site = site_of.get(target.name)
        if site is None:
            continue
        shape = (target.out_features, target.in_features)
        if id(site) not in by_site:
            limit = max(request.candidates_at(site).values())
            by_site[id(site)] = method.spectrum(None, site.statistic, limit, shape)
        count = request.candidates_at(site)[target.name]
        out[target.name] = replace(by_site[id(site)].truncate(count), shape=shape)
    return out


def _certificate(site: Site, rank: int, collected: Collected) -> Certificate:
    certificate = site.statistic.certificate(rank)
    return replace(certificate, settled=site.names[0] in collected.settled)


def _provenance(model: nn.Module, collected: Collected, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    inner = unwrap(model)
    parameter = next(iter(inner.parameters()), None)
    return {
        "model": getattr(getattr(inner, "config", None), "name_or_path", None) or type(inner).__name__,
        "model_class": type(inner).__name__,
        "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "device": None if parameter is None else parameter.device.type,
        "batches": collected.batches,
        "bad_batches": list(collected.bad_batches),
        "tokens": collected.tokens,
        "tokens_per_second": round(collected.tokens / collected.seconds, 1) if collected.seconds else math.nan,
        "sites_settled": len(collected.settled),
        "versions": {
            "smartinit": smartinit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        **(extra or {}),
    }
