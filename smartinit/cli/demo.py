"""``smartinit demo``: the main job on the embedded model and data."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smartinit.cli.checks import check_output_folder
from smartinit.cli.compute import command as compute_command
from smartinit.cli.exit_codes import OK, UNVERIFIED
from smartinit.cli.options import output_options
from smartinit.cli.output import Output
from smartinit.cli.request import read_request
from smartinit.cli.running import run
from smartinit.cli.stored import StoredRequest

if TYPE_CHECKING:
    from smartinit.artefact import Artefact


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Folder for adapter/ and figure.png; an earlier adapter in it is replaced.",
)
@click.option("--rank", type=int, default=16, show_default=True, help="Rank that a layer gets on average.")
@click.option("--max-batches", type=click.IntRange(1), help="Batches that are used at most; one pass otherwise.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the shuffle and of the sketches.")
@output_options()
def command(*, out: Path, as_json: bool, quiet: bool, **options: Any) -> int:  # noqa: ANN401 - click's options
    """Run EVA on the embedded model and data: a table, an adapter folder and a figure.

    With PEFT installed, the adapter is also loaded with it, to show that the model starts exactly where it was.
    """
    from smartinit.demo import data_file, model_folder

    output = Output(as_json=as_json, quiet=quiet)
    adapter = out / "adapter"
    wanted = _options_of_compute(
        "--model",
        str(model_folder()),
        "--data",
        str(data_file()),
        "--target-modules",
        "all-linear",
        "--out",
        str(adapter),
    )
    wanted |= options
    request = read_request(wanted)
    check_output_folder(adapter, force=True)
    with output.work():
        artefact, _ = run(StoredRequest(request, wanted, None), output)  # a demo of computing: it asks no store
        artefact.save(adapter, force=True)
        figure = _plot(artefact, out / "figure.png")
        starts = _starts_at_base(wanted["model"], wanted["data"], adapter)
    _show(artefact, output, adapter, figure, starts)
    return UNVERIFIED if starts is False else OK


def _options_of_compute(*arguments: str) -> dict[str, Any]:
    """The options of ``compute`` as it would read them from these arguments."""
    return dict(compute_command.make_context("compute", list(arguments)).params)


def _plot(artefact: Artefact, path: Path) -> Path | None:
    """The figure, if matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from smartinit.report.figure import plot_artefact

    plot_artefact(artefact, path)
    return path


def _starts_at_base(model: str, data: str, adapter: Path) -> bool | None:
    """Whether PEFT loads the folder and gives the base model's logits, bit by bit; ``None`` without PEFT."""
    if importlib.util.find_spec("peft") is None:
        return None
    import peft
    import torch

    from smartinit.cli.load_model import load_model
    from smartinit.data import Sampling, read_batches

    base, tokenizer = load_model(model, device="cpu")
    batch = next(iter(read_batches(data, tokenizer, Sampling(max_samples=4, max_length=128))))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and transformers' about each other
        before = base(**inputs).logits
        adapted = peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=True).eval()
        return bool(torch.equal(before, adapted(**inputs).logits))


def _show(artefact: Artefact, output: Output, adapter: Path, figure: Path | None, starts: bool | None) -> None:
    from smartinit.cli.summary import render, summarise

    summary = summarise(artefact)
    document = {
        "hit": None,
        "key": artefact.recipe.digest,
        "out": str(adapter),
        "plot": None if figure is None else str(figure),
        "peft_logits_equal": starts,
        "summary": summary,
    }
    verdict = {
        None: "PEFT is not installed, so the folder was not loaded with it (pip install 'smartinit[peft]')",
        True: "PEFT loads the adapter, and its logits equal the base model's exactly",
        False: "PEFT loads the adapter, but its logits differ from the base model's: please report this",
    }[starts]
    drawn = figure or "not drawn: matplotlib is not installed (pip install 'smartinit[plot]')"
    output.result(
        document, "\n".join([render(summary), "", f"check:   {verdict}", f"adapter: {adapter}", f"figure:  {drawn}"])
    )
