"""``smartinit export``: adapter folders of PEFT for Megatron, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from smartinit.cli.layer_table import layer_type
from smartinit.cli.options import output_options
from smartinit.cli.output import Output, table

if TYPE_CHECKING:
    from smartinit.export import Export


@click.command("export")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(("megatron", "peft")), help="Format to write.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--model", metavar="DIR_OR_ID", help="Base model, for its heads and experts; only its config is read.")
@click.option("--heads", type=click.IntRange(min=1), help="Attention heads, in place of what the model says.")
@click.option("--groups", type=click.IntRange(min=1), help="Query groups: heads that share a key and a value.")
@click.option("--head-size", type=click.IntRange(min=1), help="Size of a head.")
@click.option("--gated/--not-gated", default=None, help="Whether feed-forward layers have a gate.")
@click.option("--expert-count", type=click.IntRange(min=1), help="Experts of a layer.")
@click.option(
    "--fuse",
    type=click.Choice(("auto", "exact", "canonical", "svd")),
    default="auto",
    show_default=True,
    help="Projections that have not one A: one pair of the sum of their ranks, a pair for each, or cut to --rank; "
    "auto is canonical, but exact with DoRA.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Of --fuse svd; the projections' largest if not given.")
@click.option(
    "--experts",
    type=click.Choice(("grouped", "sequential", "parameters", "modules")),
    help="To megatron: grouped (default) or sequential. To peft: parameters (as in transformers 5) or modules.",
)
@click.option("--one-rank", is_flag=True, help="Fill all ranks up to one, as Megatron Bridge's own classes want it.")
@click.option(
    "--tensor-parallel", type=click.IntRange(min=1), default=1, show_default=True, help="Files, one for each rank."
)
@click.option("--force", is_flag=True, help="Replace an existing adapter folder of that format.")
@output_options(quiet=False)
def command(
    adapter: Path,
    *,
    to: Literal["megatron", "peft"],
    out: Path,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Write a PEFT adapter folder in Megatron's names, or a Megatron folder in PEFT's.

    Megatron's linear_qkv is q, k and v in one, its linear_fc1 gate and up. Projections that share their A, as those of
    EVA do, are put together without loss; --fuse says what happens to others.
    """
    from smartinit.export import export_adapter

    output = Output(as_json=as_json)
    with output.work():
        export = export_adapter(adapter, out, to=to, **options)
    document = _describe(export, adapter)
    output.result(document, _render(document))


def _describe(export: Export, adapter: Path) -> dict[str, Any]:
    groups: dict[str, list[str]] = {}
    for name in export.ranks:
        groups.setdefault(layer_type(name), []).append(name)
    return {
        "adapter": str(adapter),
        "to": export.to,
        "out": str(export.folder),
        "base": export.base,
        "layers": [
            {
                "type": kind,
                "count": len(names),
                "rank_min": min(export.ranks[name] for name in names),
                "rank_max": max(export.ranks[name] for name in names),
                "fused": export.fused.get(_fused_layer(names[0])),
                "error_max": max(export.errors.get(name, 0.0) for name in names),
            }
            for kind, names in groups.items()
        ],
        "errors": dict(export.errors),
        "notes": list(export.notes),
    }


def _fused_layer(name: str) -> str:
    """The layer that a canonical adapter is in; of any other the name itself."""
    return name.partition(".adapter_")[0]


def _render(document: dict[str, Any]) -> str:
    megatron = document["to"] == "megatron"
    head = ("layers", "count", "rank min", "max", *(("fused", "largest error") if megatron else ()))
    rows = []
    for row in document["layers"]:
        error = f"{row['error_max']:.2g}" if row["error_max"] else "none"
        more = (row["fused"] or "-", error) if megatron else ()
        rows.append((row["type"], row["count"], row["rank_min"], row["rank_max"], *more))
    lines = [table(head, rows), "", *document["notes"]]
    lines.append(f"wrote {document['out']}: for the {document['base']} base model, in {_NAMES[document['to']]} names")
    return "\n".join(lines)


_NAMES = {"megatron": "Megatron's", "peft": "PEFT's"}
