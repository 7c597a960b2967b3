"""``smartinit compute``: from a model folder and a data file to an adapter folder."""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smartinit.cli.checks import check_output_folder, check_plot
from smartinit.cli.options import (
    adapter_options,
    data_options,
    model_options,
    output_options,
    pass_options,
    store_options,
)
from smartinit.cli.output import Output
from smartinit.cli.request import read_request
from smartinit.cli.running import check_inputs, look_up, run
from smartinit.cli.stored import StoredRequest, StoreMayFail, open_store, place_of, stored_key
from smartinit.cli.summary import render, summarise
from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from smartinit.artefact import Artefact
    from smartinit.cli.request import Request
    from smartinit.cli.stored import Found


@click.command("compute")
@model_options()
@data_options(required=False)
@adapter_options()
@pass_options()
@store_options()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Adapter folder to write.")
@click.option("--force", is_flag=True, help="Replace the output folder if it exists.")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Also draw ranks and variance (png, svg, pdf)."
)
@click.option(
    "--base",
    type=click.Choice(("residual", "doubled")),
    default="residual",
    show_default=True,
    help="For methods that split the base weight: write the residual model too, or plain LoRA of twice the rank that "
    "starts on the unmodified model.",
)
@click.option(
    "--base-out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the residual (or quantised) model goes; OUT-base if not given.",
)
@output_options()
def command(**options: Any) -> None:  # noqa: ANN401 - click's options
    """Compute the starting point of an adapter and write it as a plain PEFT folder.

    Methods that look at weights alone need no data. Otherwise the data is tokenised with the model's own tokenizer and
    run through the model once, or until every layer has settled. The folder loads in PEFT and in every trainer that
    takes a PEFT adapter. What the store has is not computed again: the same request neither loads the model nor reads
    the data's rows, smaller ranks or methods of the same statistics need no pass over the data.
    """
    output = Output(as_json=options["as_json"], quiet=options["quiet"])
    request = read_request(options)
    check_output_folder(options["out"], force=options["force"])
    check_plot(options["plot"])
    with output.work():
        check_inputs(request, options)
        started = time.perf_counter()
        stored = StoredRequest(request, options, open_store(options))
        found = None if options["refresh"] else look_up(stored, output)
        shown, base_out = None, None
        if found is not None and _is_all(found, options):
            with StoreMayFail("the stored artefact cannot be copied", strict=options["no_compute"]):
                found.copy(options["out"], force=options["force"])
                shown = Shown(found.summary, "artefact", found.key)
        if shown is None:
            shown, base_out = _produce(stored, found, output)
        if found is not None and shown.hit == "artefact":
            shown = replace(shown, origin=found.origin)
            shown.summary["seconds"] = {"store": round(time.perf_counter() - started, 3)}
    show(shown, output, stored, base_out=base_out)


def _is_all(found: Found, options: dict[str, Any]) -> bool:
    """Whether the stored folder is the output as it stands."""
    extras = options["plot"] is not None or options["base_out"] is not None
    return found.keeps_base and found.says(options) and not extras


def _produce(stored: StoredRequest, found: Found | None, output: Output) -> tuple[Shown, Path | None]:
    """Write what was found or is computed now, with its base model and figure."""
    options = dict(stored.options)
    base_out = _base_folder(stored.request, options)
    artefact, model = None, None
    if found is not None:
        with StoreMayFail("the stored artefact cannot be read", strict=options["no_compute"]):
            artefact = found.artefact(options)
    if artefact is None:
        artefact, model = run(stored, output)
    with _removed_on_error(base_out):
        if base_out is not None:
            output.log(f"writing the base model to {base_out}")
            _write_base(artefact, model or _load(options, output), base_out, options)
        artefact.save(options["out"], force=options["force"], base=options["base"])
    if options["plot"] is not None:
        from smartinit.report.figure import plot_artefact

        plot_artefact(artefact, options["plot"])
    return Shown.of(artefact), base_out


def _load(options: dict[str, Any], output: Output) -> nn.Module:
    from smartinit.cli.load_model import find_model, load_weights

    output.log(f"loading {options['model']}")
    source = find_model(options["model"], trust_remote_code=options["trust_remote_code"])
    return load_weights(source, dtype=options["dtype"], device=options["device"])


@contextmanager
def _removed_on_error(folder: Path | None) -> Iterator[None]:
    """A base model without its adapter is of no use: it goes when the adapter cannot be written (if it is new)."""
    new = folder is not None and not folder.exists()
    try:
        yield
    except BaseException:
        if new and folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _base_folder(request: Request, options: dict[str, Any]) -> Path | None:
    """Where the changed base model goes; None if the base stays as it is.

    Raises:
        OutputError: that folder exists (without ``--force``) or cannot be written.
        ConfigError: ``--base-out`` where nothing is written there.
    """
    from smartinit.initialisation import resolve_method

    effect = resolve_method(request.config).effect
    if effect == "quantises" or (effect == "splits" and options["base"] == "residual"):
        out: Path = options["out"]
        folder: Path = options["base_out"] or out.with_name(f"{out.name}-base")
        for option in ("model", "data", "out"):
            if options[option] is None:
                continue
            other, ours = Path(options[option]).expanduser().resolve(), folder.expanduser().resolve()
            if ours == other or ours in other.parents or other in ours.parents:
                raise ConfigError(f"the base model cannot go to {folder}: that is, holds or lies in --{option} {other}")
        check_output_folder(folder, force=options["force"], marker="config.json")
        return folder
    if options["base_out"] is not None:
        raise ConfigError(f"--base-out: '{request.config.method}' leaves the base model as it is here; leave it out")
    return None


def _write_base(artefact: Artefact, model: nn.Module, folder: Path, options: dict[str, Any]) -> None:
    """The model that the adapter belongs to, with its tokenizer if it has one."""
    import transformers

    from smartinit.cli.load_model import quiet_transformers
    from smartinit.convert import save_residual_model

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            options["model"], trust_remote_code=options["trust_remote_code"]
        )
    except (OSError, ValueError):  # a model without one is a model all the same
        tokenizer = None
    with quiet_transformers():
        save_residual_model(model, artefact, folder, force=options["force"])
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Shown:
    """What is said of the result.

    Attributes:
        summary: see `smartinit.cli.summary`.
        hit: what the store had: the artefact, its spectra, or nothing.
        key: of the artefact's entry; of the recipe, if it is not in a store.
        kept: whether a store has it now.
        origin: of a hit, the store that had the artefact; None: the first.
    """

    summary: dict[str, Any]
    hit: str | None
    key: str
    kept: bool = True
    origin: str | None = None

    @classmethod
    def of(cls, artefact: Artefact) -> Shown:
        """Of an artefact at hand."""
        note = artefact.provenance.get("store") or {}
        key = stored_key(artefact) or artefact.recipe.digest
        return cls(summarise(artefact), note.get("hit"), key, kept=bool(note.get("kept")))


def show(shown: Shown, output: Output, stored: StoredRequest, *, base_out: Path | None = None) -> None:
    """Print the summary and where the files lie."""
    options, store = stored.options, stored.store
    place = None if store is None else place_of(store)
    kept = place is not None and shown.kept
    document = {"hit": shown.hit, "key": shown.key, "kept": kept, "out": str(options["out"]), "store": place}
    lines = [render(shown.summary), ""]
    if place is not None:
        lines.append(f"store:   {_said(shown, place)} ({shown.key[:12]})")
    lines.append(f"adapter: {options['out']}")
    if base_out is not None:
        document["base_out"] = str(base_out)
        lines.append(f"base:    {base_out}, the model that this adapter is to be trained on")
    if options["plot"] is not None:
        document["plot"] = str(options["plot"])
        lines.append(f"figure:  {options['plot']}")
    output.result({**document, "summary": shown.summary}, "\n".join(lines))


def _said(shown: Shown, place: str) -> str:
    if shown.hit == "artefact":
        return f"a hit in {shown.origin or place}: nothing was computed"
    if shown.hit == "spectra":
        said = f"a hit in {place}: no pass over the data, only ranks and factors were computed"
        return said if shown.kept else f"{said}; not kept (see the warning)"
    return f"kept in {place}" if shown.kept else "not kept (see the warning)"
