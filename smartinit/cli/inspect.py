"""``smartinit inspect``: what an adapter folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smartinit.cli.layer_table import (
    by_type,
    describe_known,
    describe_ranks,
    gain_line,
    gain_of_layers,
    layer_table,
)
from smartinit.cli.options import output_options
from smartinit.cli.output import Output
from smartinit.errors import ArtefactError, MissingFileError, SmartinitError
from smartinit.formats.safetensors_header import read_header

if TYPE_CHECKING:
    from smartinit.formats.safetensors_header import Entry

CONFIG, TENSORS, RECORD = "adapter_config.json", "adapter_model.safetensors", "smartinit.json"
_A_ENDINGS = (".lora_A.weight", ".lora_embedding_A")
_B_ENDINGS = (".lora_B.weight", ".lora_embedding_B")


@click.command("inspect")
@click.argument("folder", type=click.Path(path_type=Path))
@output_options(quiet=False)
def command(folder: Path, *, as_json: bool) -> None:
    """Show ranks, scaling and parameters of a LoRA adapter folder, whoever wrote it.

    For a folder of smartinit also how it was computed, how much variance it captures, and whether its files are
    still those that were written.
    """
    output = Output(as_json=as_json)
    with output.work():
        found = examine(folder)
    output.result(found, _render(found))


def examine(folder: Path) -> dict[str, Any]:
    """Everything that can be said of the folder, as plain values.

    Raises:
        MissingFileError: no such folder.
        ArtefactError: no adapter, or one that cannot be read.
    """
    config = _read_config(folder)
    entries = _read_tensors(folder)
    layers, others = _pair(entries)
    scalings = _scalings(config, {name: a.shape[0] for name, (a, _) in layers.items()})
    record, remark = _record(folder)
    return {
        "folder": str(folder),
        "base_model": config.get("base_model_name_or_path"),
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        "layers": [_describe(kind, names, layers, scalings, record) for kind, names in by_type(layers).items()],
        "ranks": sum(a.shape[0] for a, _ in layers.values()),
        "parameters": sum(a.size + b.size for a, b in layers.values()),
        "other_tensors": {name: list(entry.shape) for name, entry in others.items()},
        "record": None if record is None else _of_record(record),
        "remark": remark,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not folder.is_dir():
        raise MissingFileError(f"the adapter folder {folder} does not exist")
    if not path.is_file():
        inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))
        hint = f"; its sub-folders {', '.join(inside)} have one" if inside else "; is it an adapter folder?"
        raise ArtefactError(f"the folder {folder} has no {CONFIG}{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read as JSON: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ArtefactError(f"{path} describes an adapter of type {kind}; expected LORA")
    return dict(config)


def _read_tensors(folder: Path) -> dict[str, Entry]:
    path = folder / TENSORS
    if not path.is_file():
        pickled = "; adapter_model.bin is pickled and never loaded" if (folder / "adapter_model.bin").exists() else ""
        raise ArtefactError(f"the folder {folder} has no {TENSORS}{pickled}")
    try:
        return read_header(path)
    except ValueError as error:
        raise ArtefactError(f"{error}; copy the folder again") from error


def _pair(entries: dict[str, Entry]) -> tuple[dict[str, tuple[Entry, Entry]], dict[str, Entry]]:
    """Layer name -> its two matrices as ``(rank, in)`` and ``(out, rank)``; and what is neither."""
    halves: dict[str, dict[str, Entry]] = {}
    others = {}
    for key, entry in entries.items():
        ending = next((end for end in (*_A_ENDINGS, *_B_ENDINGS) if key.endswith(end)), None)
        if ending is None:
            others[key] = entry
        else:
            name = key.removesuffix(ending).removeprefix("base_model.model.")
            halves.setdefault(name, {})["A" if ending in _A_ENDINGS else "B"] = entry
    broken = sorted(name for name, half in halves.items() if len(half) != 2)  # noqa: PLR2004 - A and B
    if broken:
        raise ArtefactError(f"the adapter has only one of the two matrices of layer '{broken[0]}'")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}, others


def _scalings(config: dict[str, Any], ranks: dict[str, int]) -> dict[str, float]:
    """As PEFT computes them from the patterns of the configuration."""
    from smartinit.config import LoraConfig
    from smartinit.planning.plan import Plan
    from smartinit.targets import alpha_for

    lora = LoraConfig.from_dict(config)
    plan = Plan(ranks, {name: alpha_for(lora, name) for name in ranks}, use_rslora=lora.use_rslora)
    return {name: plan.scaling(name) for name in ranks}


def _record(folder: Path) -> tuple[Any, str | None]:
    """The artefact of a folder of smartinit, or why there is none."""
    if not (folder / RECORD).is_file():
        return None, None
    from smartinit.artefact import Artefact

    try:
        return Artefact.load(folder), None
    except SmartinitError as error:
        return None, str(error)


def _describe(
    kind: str,
    names: list[str],
    layers: dict[str, tuple[Entry, Entry]],
    scalings: dict[str, float],
    record: Any,  # noqa: ANN401 - an Artefact, whose class imports torch
) -> dict[str, Any]:
    described: dict[str, Any] = {
        **describe_ranks(kind, [layers[name][0].shape[0] for name in names]),
        "scaling": sorted({round(scalings[name], 6) for name in names}),
        "parameters": sum(layers[name][0].size + layers[name][1].size for name in names),
        "dtype": sorted({entry.dtype for name in names for entry in layers[name]}),
    }
    if record is not None:
        described |= describe_known([record.layers[name] for name in names if name in record.layers])
    return described


def _of_record(record: Any) -> dict[str, Any]:  # noqa: ANN401
    certificates = {name: layer.certificate.as_dict() for name, layer in record.layers.items()}
    gain = gain_of_layers(record.layers.values())
    return {
        "recipe": record.recipe.as_dict(),
        "key": record.recipe.digest,
        "provenance": dict(record.provenance),
        "removed": [name for name, rank in record.plan.ranks.items() if rank == 0],
        "certificates": certificates,
        "gain": None if gain is None else gain.as_dict(),
        "seconds": dict(record.timings),
    }


def _render(found: dict[str, Any]) -> str:
    kind = " ".join(word for word, on in (("rsLoRA", found["use_rslora"]), ("DoRA", found["use_dora"])) if on) or "LoRA"
    lines = [
        f"{kind} for {found['base_model'] or 'an unnamed model'}: r={found['r']}, lora_alpha={found['lora_alpha']}",
        "",
        layer_table(found["layers"]),
        "",
        f"ranks: {found['ranks']:,}; parameters: {found['parameters']:,}",
    ]
    if found["other_tensors"]:
        names = ", ".join(list(found["other_tensors"])[:3])
        lines.append(f"other tensors: {len(found['other_tensors'])} ({names})")
    if found["record"] is not None:
        recipe, provenance = found["record"]["recipe"], found["record"]["provenance"]
        lines.append(
            f"computed: {recipe['method']} on {provenance.get('data') or 'given batches'}, "
            f"{provenance.get('tokens')} tokens, seed {recipe['seed']}; files are as they were written"
        )
        if found["record"]["gain"] is not None:
            lines.append(gain_line(found["record"]["gain"]))
        if found["record"]["removed"]:
            lines.append(f"rank 0 (no adapter): {len(found['record']['removed'])} layers")
    if found["remark"]:
        lines.append(f"remark: {found['remark']}")
    return "\n".join(lines)
