"""``smartinit convert``: a trained split as plain LoRA for the unmodified base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smartinit.cli.layer_table import layer_type
from smartinit.cli.options import output_options
from smartinit.cli.output import Output, table

if TYPE_CHECKING:
    from smartinit.adapters.conversion import Conversion

_SHOWN_EXACT = 1e-12


@click.command("convert")
@click.argument("trained", type=click.Path(path_type=Path))
@click.option("--start", type=click.Path(path_type=Path), help="Where training began, unless TRAINED keeps it.")
@click.option("--model", metavar="DIR_OR_ID", help="Base model, where a Megatron folder does not say its heads.")
@click.option("--heads", type=click.IntRange(min=1), help="Attention heads, in place of what the model says.")
@click.option("--groups", type=click.IntRange(min=1), help="Query groups: heads that share a key and a value.")
@click.option("--head-size", type=click.IntRange(min=1), help="Size of a head.")
@click.option("--gated/--not-gated", default=None, help="Whether feed-forward layers have a gate.")
@click.option("--expert-count", type=click.IntRange(min=1), help="Experts of a layer.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--rank", type=click.IntRange(min=1), help="Cut to this rank, and show the error.")
@click.option("--force", is_flag=True, help="Replace an existing adapter folder.")
@output_options(quiet=False)
def command(
    trained: Path,
    *,
    start: Path | None,
    out: Path,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Turn an adapter that was trained from a split (pissa, olora, corda …) into plain LoRA.

    Such a start takes its product out of the base model. The result needs no changed base: it has twice the rank, or
    the rank that you give, and computes the same on the base model as it was. TRAINED and START may be adapter folders
    of PEFT or of Megatron.
    """
    from smartinit.convert import convert_adapter

    output = Output(as_json=as_json)
    with output.work():
        conversion = convert_adapter(trained, start, out, **options)
    document = _describe(conversion, trained, start, out)
    output.result(document, _render(document))


def _describe(conversion: Conversion, trained: Path, start: Path | None, out: Path) -> dict[str, Any]:
    groups: dict[str, list[str]] = {}
    for name in conversion.plan.ranks:
        groups.setdefault(layer_type(name), []).append(name)
    ranks, errors = conversion.plan.ranks, conversion.errors
    return {
        "trained": str(trained),
        "start": str(trained if start is None else start),
        "out": str(out),
        "error": conversion.error,
        "layers": [
            {
                "type": kind,
                "count": len(names),
                "rank_min": min(ranks[name] for name in names),
                "rank_max": max(ranks[name] for name in names),
                "error_max": max(errors[name] for name in names),
            }
            for kind, names in groups.items()
        ],
        "other_tensors": sorted(conversion.others),
        "dropped": list(conversion.dropped),
    }


def _render(document: dict[str, Any]) -> str:
    rows = [
        (row["type"], row["count"], row["rank_min"], row["rank_max"], _error(row["error_max"]))
        for row in document["layers"]
    ]
    lines = [table(("layers", "count", "rank min", "max", "largest error"), rows), ""]
    if document["other_tensors"]:
        lines.append(f"carried along: {len(document['other_tensors'])} other tensors")
    if document["dropped"]:
        lines.append(f"left out: {len(document['dropped'])} frozen weights of the base model")
    lines.append(f"relative error of the update: {_error(document['error'])}")
    lines.append(f"wrote {document['out']}: plain LoRA for the unmodified base model")
    return "\n".join(lines)


def _error(value: float) -> str:
    return "none" if value < _SHOWN_EXACT else f"{value:.2g}"
