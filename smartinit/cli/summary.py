"""What a computed artefact is worth, in a table and as JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from smartinit.cli.layer_table import (
    by_type,
    describe_known,
    describe_ranks,
    gain_line,
    gain_of_layers,
    layer_table,
    mean,
)
from smartinit.cli.output import human_count

if TYPE_CHECKING:
    from smartinit.artefact import Artefact


def summarise(artefact: Artefact) -> dict[str, Any]:
    """Figures per layer type and in total, as plain values."""
    provenance = artefact.provenance
    sites = len(artefact.sites)
    gain = gain_of_layers(artefact.layers.values())
    return {
        "method": artefact.recipe.method,
        "layers": [_of_type(artefact, kind, names) for kind, names in by_type(artefact.plan.ranks).items()],
        "ranks": artefact.plan.total,
        "budget": _budget(artefact),
        "parameters": sum(
            rank * sum(artefact.layers[name].shape) for name, rank in artefact.plan.ranks.items() if rank
        ),
        "targets": len(artefact.plan.ranks),
        "sites": sites,
        "sites_settled": provenance.get("sites_settled"),
        "batches": provenance.get("batches"),
        "bad_batches": len(provenance.get("bad_batches") or ()),
        "dropped_rows": provenance.get("dropped_rows"),
        "tokens": provenance.get("tokens"),
        "tokens_per_second": _finite(provenance.get("tokens_per_second")),
        "gain": None if gain is None else gain.as_dict(),
        "seconds": {phase: round(seconds, 3) for phase, seconds in artefact.timings.items()},
    }


def render(summary: dict[str, Any]) -> str:
    """The summary as a table and a few lines."""
    seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in summary["seconds"].items())
    skipped = f", {summary['bad_batches']} bad ones skipped" if summary["bad_batches"] else ""
    dropped = f", {summary['dropped_rows']} rows without a counting token dropped" if summary["dropped_rows"] else ""
    unit, budget = summary["budget"]["unit"], summary["budget"]["value"]
    used = summary["ranks"] if unit == "ranks" else summary["parameters"]
    speed = f" ({summary['tokens_per_second']:,.0f} per second)" if summary["tokens_per_second"] else ""
    data = f"data: {summary['batches']} batches{skipped}, {summary['tokens'] or 0:,} tokens{speed}{dropped}"
    places = f"layers on {summary['sites']} sites" if summary["sites"] else "layers"
    return "\n".join(
        [
            layer_table(summary["layers"]),
            "",
            (
                f"{unit}: {used:,} of {budget:,} used; {human_count(summary['parameters'])} adapter parameters in "
                f"{summary['targets']} {places}"
            ),
            data if summary["batches"] else "data: none was read",
            *([] if summary["gain"] is None else [gain_line(summary["gain"])]),
            f"seconds: {seconds}",
        ]
    )


def _of_type(artefact: Artefact, kind: str, names: list[str]) -> dict[str, Any]:
    layers = [artefact.layers[name] for name in names]
    certificates = [layer.certificate for layer in layers]
    known = [bool(c.settled) for c in certificates if c.settled is not None]
    return {
        **describe_ranks(kind, [artefact.plan.ranks[name] for name in names]),
        **describe_known(layers),
        "captured_held_out": mean(c.captured_held_out for c in certificates),
        "settled": sum(known) if known else None,
    }


def _budget(artefact: Artefact) -> dict[str, Any]:
    planner = artefact.recipe.planner
    if planner.get("params") is not None:
        return {"unit": "parameters", "value": planner["params"]}
    if planner.get("captured") is not None and planner.get("budget") is None:  # the ranks are what it takes
        return {"unit": "ranks", "value": artefact.plan.total}
    asked = planner.get("ranks")
    total = sum(asked.values()) if isinstance(asked, dict) or hasattr(asked, "values") else artefact.plan.total
    return {"unit": "ranks", "value": planner.get("budget") or total}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
