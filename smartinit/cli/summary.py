"""What a computed artefact is worth, in a table and as JSON; read from its record, so that it needs no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

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
    from collections.abc import Mapping

    from smartinit.artefact import Artefact
    from smartinit.planning.gain import Gain


class _Certificate(NamedTuple):
    """The fields of `smartinit.spectrum.Certificate` that are shown."""

    captured: float | None
    captured_held_out: float | None
    settled: bool | None


class _Layer(NamedTuple):
    """One layer of a record."""

    shape: tuple[int, int]
    certificate: _Certificate
    gain: Gain | None


def summarise(artefact: Artefact) -> dict[str, Any]:
    """Figures per layer type and in total, as plain values."""
    return summarise_record(
        {
            "recipe": artefact.recipe.as_dict(),
            "plan": artefact.plan.as_dict(),
            "targets": list(artefact.plan.ranks),
            "layers": {name: layer.as_dict() for name, layer in artefact.layers.items()},
            "sites": artefact.sites,
            "provenance": artefact.provenance,
            "timings": artefact.timings,
        }
    )


def summarise_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The same from what ``smartinit.json`` holds.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is no sound record.
    """
    provenance, recipe = record["provenance"], record["recipe"]
    ranks = {name: int(record["plan"]["ranks"][name]) for name in record["targets"]}
    layers = {name: _layer(record["layers"][name]) for name in ranks}
    gain = gain_of_layers(layers.values())
    return {
        "method": recipe["method"],
        "layers": [_of_type({name: layers[name] for name in names}, kind, ranks) for kind, names in _kinds(ranks)],
        "ranks": sum(ranks.values()),
        "budget": _budget(recipe["planner"], sum(ranks.values())),
        "parameters": sum(rank * sum(layers[name].shape) for name, rank in ranks.items() if rank),
        "targets": len(ranks),
        "sites": len(record["sites"]),
        "sites_settled": provenance.get("sites_settled"),
        "batches": provenance.get("batches"),
        "bad_batches": len(provenance.get("bad_batches") or ()),
        "dropped_rows": provenance.get("dropped_rows"),
        "tokens": provenance.get("tokens"),
        "tokens_per_second": _finite(provenance.get("tokens_per_second")),
        "gain": None if gain is None else gain.as_dict(),
        "seconds": {phase: round(seconds, 3) for phase, seconds in record["timings"].items()},
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


def _kinds(ranks: Mapping[str, int]) -> list[tuple[str, list[str]]]:
    return list(by_type(ranks).items())


def _layer(values: Mapping[str, Any]) -> _Layer:
    from smartinit.planning.gain import Gain

    out_features, in_features = values["shape"]
    certificate, gain = values["certificate"], values.get("gain")
    return _Layer(
        (int(out_features), int(in_features)),
        _Certificate(certificate["captured"], certificate["captured_held_out"], certificate["settled"]),
        None if gain is None else Gain.from_dict(gain),
    )


def _of_type(layers: Mapping[str, _Layer], kind: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    certificates = [layer.certificate for layer in layers.values()]
    known = [bool(c.settled) for c in certificates if c.settled is not None]
    return {
        **describe_ranks(kind, [ranks[name] for name in layers]),
        **describe_known(list(layers.values())),
        "captured_held_out": mean(c.captured_held_out for c in certificates),
        "settled": sum(known) if known else None,
    }


def _budget(planner: Mapping[str, Any], total: int) -> dict[str, Any]:
    if planner.get("params") is not None:
        return {"unit": "parameters", "value": planner["params"]}
    if planner.get("captured") is not None and planner.get("budget") is None:  # the ranks are what it takes
        return {"unit": "ranks", "value": total}
    asked = planner.get("ranks")
    wanted = total if asked is None else sum(asked.values())
    return {"unit": "ranks", "value": planner.get("budget") or wanted}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
