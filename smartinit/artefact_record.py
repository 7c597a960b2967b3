"""An artefact as it lies in its folder: what `smartinit.json` says of it, and how a split is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from smartinit.config import LoraConfig
from smartinit.errors import ConfigError, VerificationError
from smartinit.factors import Effect, Factors
from smartinit.formats.convert import first_half, subtract_start
from smartinit.formats.tensors import Form, Kind
from smartinit.planning.gain import Gain
from smartinit.planning.plan import Plan
from smartinit.recipe import Recipe
from smartinit.spectrum import Certificate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
BaseOnDisk = Literal["residual", "doubled"]
"""How a folder serves a split: as it is, for the residual base; or as plain LoRA of twice the rank, for the base."""


@dataclass(frozen=True)
class LayerSummary:
    """What is known of one layer besides its factors.

    Attributes:
        shape: ``(out_features, in_features)``; a convolution's ``in_features`` are channels times kernel.
        ratios: the share of the total variance that each candidate direction explains, best first.
        certificate: how far its directions can be trusted.
        kind: what stores the weight.
        kernel: sizes of a convolution's kernel.
        gain: how far its first step of training goes, beside that of LoRA's own start; None without an adapter.
    """

    shape: tuple[int, int]
    ratios: tuple[float, ...]
    certificate: Certificate
    kind: Kind = "linear"
    kernel: tuple[int, ...] | None = None
    gain: Gain | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "shape": self.shape,
            "ratios": self.ratios,
            "certificate": self.certificate.as_dict(),
            "kind": self.kind,
            "kernel": self.kernel,
            "gain": None if self.gain is None else self.gain.as_dict(),
        }

    @property
    def form(self) -> Form:
        """How an adapter file shows the layer's matrices."""
        return Form(self.kind == "embedding", self.kernel or ())


def stored_form(
    plan: Plan, factors: Mapping[str, Factors], base: BaseOnDisk, *, use_dora: bool
) -> tuple[Plan, dict[str, Factors]]:
    """Plan and factors as the adapter file has them.

    Raises:
        ConfigError: an unknown ``base``; the base is quantised, so that no adapter fits the original one; or DoRA's
            row norms are missing, which a loader would take from the residual base.
    """
    if base not in get_args(BaseOnDisk):
        raise ConfigError(f"base={base!r} is not known; choose 'residual' or 'doubled'")
    split = [name for name, pair in factors.items() if pair.effect == "splits" and pair.rank]
    if base == "doubled":
        quantised = next((name for name, pair in factors.items() if pair.effect == "quantises"), None)
        if quantised is not None:
            raise ConfigError(
                f"layer '{quantised}' has a quantised base, which no adapter of twice the rank replaces; save it with "
                "base='residual'"
            )
        doubles = {name: subtract_start(factors[name], factors[name]) for name in split}
        return plan_of_twice_the_rank(plan, split), {**factors, **doubles}
    bare = next((name for name in split if factors[name].magnitude is None), None)
    if use_dora and bare is not None:
        raise ConfigError(
            f"use_dora=True needs the row norms of layer '{bare}' at the start, which its factors do not have: a "
            "loader would take those of the residual base; save it with base='doubled'"
        )
    return plan, dict(factors)


def plan_of_twice_the_rank(plan: Plan, names: Iterable[str]) -> Plan:
    """The plan with the ranks of these layers doubled; no layer's scaling changes."""
    growth = math.sqrt(2) if plan.use_rslora else 2
    doubled = set(names)
    return Plan(
        {name: rank * 2 if name in doubled else rank for name, rank in plan.ranks.items()},
        {name: alpha * growth if name in doubled else alpha for name, alpha in plan.alphas.items()},
        plan.use_rslora,
    )


def from_record(
    record: Mapping[str, Any], stored: Mapping[str, Factors], bases: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """The fields of the artefact that its record took apart.

    Raises:
        VerificationError: a folder for the unmodified base does not start where that base does.
        Exception: any other one means that the record is broken.
    """
    order: list[str] = record["targets"]
    plan = Plan.from_dict(record["plan"])
    if set(order) != plan.ranks.keys() or order != list(dict.fromkeys(order)):
        raise ValueError("targets and plan name different layers")
    layers, factors = {}, {}
    for name in order:
        layers[name] = layer = _layer_from_dict(record["layers"][name])
        effect: Effect = record["effects"][name]
        if effect not in get_args(Effect):
            raise ValueError(f"layer '{name}' has the unknown effect {effect!r}")
        out_features, in_features = layer.shape
        pair = stored.get(name) or Factors(torch.zeros(0, in_features), torch.zeros(out_features, 0))
        if record.get("base") == "doubled" and effect == "splits" and pair.rank:
            half = first_half(pair)
            if half is None:
                raise VerificationError(
                    f"layer '{name}' does not start where its base model does: the two halves of its factors do not "
                    "cancel; compute the artefact again"
                )
            pair = half
        factors[name] = replace(
            pair, effect=effect, base=bases.get(name), trains=record.get("trains", {}).get(name, "both")
        )
    for names in (stored.keys(), bases.keys()):
        if names - factors.keys():
            raise ValueError(f"the files hold '{min(names - factors.keys())}', which is not planned")
    return {
        "recipe": Recipe.from_dict(record["recipe"]),
        "plan": Plan(
            {name: plan.ranks[name] for name in order}, {name: plan.alphas[name] for name in order}, plan.use_rslora
        ),
        "config": LoraConfig.from_dict(record["config"]),
        "factors": factors,
        "layers": layers,
        "sites": tuple(tuple(site) for site in record["sites"]),
        "provenance": record["provenance"],
        "timings": record["timings"],
    }


def _layer_from_dict(layer: Mapping[str, Any]) -> LayerSummary:
    out_features, in_features = (int(size) for size in layer["shape"])
    kind, kernel = layer.get("kind", "linear"), layer.get("kernel")
    if kind not in get_args(Kind):
        raise ValueError(f"a layer is of the unknown kind {kind!r}")
    return LayerSummary(
        (out_features, in_features),
        tuple(float(ratio) for ratio in layer["ratios"]),
        Certificate(**layer["certificate"]),
        kind,
        None if kernel is None else tuple(int(size) for size in kernel),
        None if layer.get("gain") is None else Gain.from_dict(layer["gain"]),
    )
