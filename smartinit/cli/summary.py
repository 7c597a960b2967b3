"""What a computed artefact is worth, in a table and as JSON."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from smartinit.cli.output import human_count, table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smartinit.artefact import Artefact

HEAD = ("layers", "count", "rank min", "median", "max", "variance", "held out", "settled")


def layer_type(name: str) -> str:
    """``model.layers.3.self_attn.q_proj`` → ``self_attn.q_proj``: from the first number on, later ones as ``*``."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    rest = parts[first + 1 :] or parts
    return ".".join("*" if part.isdigit() else part for part in rest)


def summarise(artefact: Artefact) -> dict[str, Any]:
    """Figures per layer type and in total, as plain values."""
    names: dict[str, list[str]] = {}
    for name in artefact.plan.ranks:
        names.setdefault(layer_type(name), []).append(name)
    provenance = artefact.provenance
    sites = len(artefact.sites)
    return {
        "method": artefact.recipe.method,
        "layers": [_of_type(artefact, kind, members) for kind, members in names.items()],
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
        "seconds": {phase: round(seconds, 3) for phase, seconds in artefact.timings.items()},
    }


def render(summary: dict[str, Any]) -> str:
    """The summary as a table and a few lines."""
    rows = [
        (
            row["type"],
            row["count"],
            row["rank_min"],
            f"{row['rank_median']:g}",
            row["rank_max"],
            _percent(row["captured"]),
            _percent(row["captured_held_out"]),
            f"{row['settled']}/{row['count']}",
        )
        for row in summary["layers"]
    ]
    seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in summary["seconds"].items())
    skipped = f", {summary['bad_batches']} bad ones skipped" if summary["bad_batches"] else ""
    dropped = f", {summary['dropped_rows']} rows without a counting token dropped" if summary["dropped_rows"] else ""
    unit, budget = summary["budget"]["unit"], summary["budget"]["value"]
    used = summary["ranks"] if unit == "ranks" else summary["parameters"]
    speed = f" ({summary['tokens_per_second']:,.0f} per second)" if summary["tokens_per_second"] else ""
    return "\n".join(
        [
            table(HEAD, rows),
            "",
            (
                f"{unit}: {used:,} of {budget:,} used; {human_count(summary['parameters'])} adapter parameters in "
                f"{summary['targets']} layers on {summary['sites']} sites"
            ),
            f"data: {summary['batches']} batches{skipped}, {summary['tokens']:,} tokens{speed}{dropped}",
            f"seconds: {seconds}",
        ]
    )


def _of_type(artefact: Artefact, kind: str, names: list[str]) -> dict[str, Any]:
    ranks = [artefact.plan.ranks[name] for name in names]
    certificates = [artefact.layers[name].certificate for name in names]
    return {
        "type": kind,
        "count": len(names),
        "rank_min": min(ranks),
        "rank_median": statistics.median(ranks),
        "rank_max": max(ranks),
        "captured": _mean(c.captured for c in certificates),
        "captured_held_out": _mean(c.captured_held_out for c in certificates),
        "settled": sum(bool(c.settled) for c in certificates),
    }


def _budget(artefact: Artefact) -> dict[str, Any]:
    planner = artefact.recipe.planner
    if planner.get("params") is not None:
        return {"unit": "parameters", "value": planner["params"]}
    asked = planner.get("ranks")
    total = sum(asked.values()) if isinstance(asked, dict) or hasattr(asked, "values") else artefact.plan.total
    return {"unit": "ranks", "value": planner.get("budget") or total}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
