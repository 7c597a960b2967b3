"""``smartinit compute``: from a model folder and a data file to an adapter folder."""

from __future__ import annotations

import shutil
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smartinit.cli.checks import check_output_folder, check_plot
from smartinit.cli.exit_codes import check_interrupt
from smartinit.cli.model_folder import check_model_folder, is_local
from smartinit.cli.options import adapter_options, data_options, model_options, output_options
from smartinit.cli.output import Output
from smartinit.cli.request import read_request
from smartinit.data.source import find_source
from smartinit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from smartinit.artefact import Artefact
    from smartinit.cli.load_model import ModelSource
    from smartinit.cli.request import Request
    from smartinit.data import Batches
    from smartinit.data.source import Source


@click.command("compute")
@model_options()
@data_options(required=False)
@adapter_options()
@click.option("--skip-bad-batches", is_flag=True, help="Count and skip batches with NaN or Inf in a layer's input.")
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
    takes a PEFT adapter.
    """
    output = Output(as_json=options["as_json"], quiet=options["quiet"])
    request = read_request(options)
    check_output_folder(options["out"], force=options["force"])
    check_plot(options["plot"])
    with output.work():
        base_out = _base_folder(request, options)
        artefact, model = run(request, options, output)
        with _removed_on_error(base_out):
            if base_out is not None:
                output.log(f"writing the base model to {base_out}")
                _write_base(artefact, model, base_out, options)
            artefact.save(options["out"], force=options["force"], base=options["base"])
        if options["plot"] is not None:
            from smartinit.report.figure import plot_artefact

            plot_artefact(artefact, options["plot"])
    show(artefact, output, out=options["out"], plot=options["plot"], base_out=base_out)


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
class Opened:
    """Model and data, found and checked, weights not loaded yet."""

    model: ModelSource
    request: Request
    source: Source | None = None
    batches: Batches | None = None

    @property
    def provenance(self) -> dict[str, Any]:
        """What the data was, for the record."""
        if self.source is None:
            return {"data": None}
        return {"data_sha256": self.source.sha256, "batches_of": self.request.sampling.as_dict()}


def open_inputs(request: Request, options: dict[str, Any], output: Output) -> Opened:
    """Find model and data and tokenise the first rows: what is wrong with either shows before weights are loaded."""
    from smartinit.cli.load_model import find_model, load_tokenizer, longest_input
    from smartinit.data import read_batches

    if not reads_data(request, options, output):
        return Opened(find_model(options["model"], trust_remote_code=options["trust_remote_code"]), request)
    output.log(f"reading {options['data']}")
    source = find_source(options["data"], split=request.sampling.split)
    model = find_model(options["model"], trust_remote_code=options["trust_remote_code"])
    tokenizer = load_tokenizer(model)
    longest = longest_input(model, tokenizer)
    if longest is not None and longest < request.sampling.max_length:
        request = replace(request, sampling=replace(request.sampling, max_length=longest))
    batches = read_batches(source, tokenizer, request.sampling, causal=model.causal, vocab_size=model.vocab_size)
    return Opened(model, request, source, batches)


def reads_data(request: Request, options: dict[str, Any], output: Output) -> bool:
    """Whether the method looks at data.

    Raises:
        ConfigError: it does and there is none; an option of the method that it does not have.
    """
    from smartinit.initialisation import resolve_method

    method = resolve_method(request.config)
    if method.needs is not None and options["data"] is None:
        raise ConfigError(f"the method '{method.name}' looks at data: pass --data with a file or a dataset's id")
    if method.needs is None and options["data"] is not None:
        output.log(f"{method.name} looks at weights alone: --data is not read")
    return method.needs is not None


def run(request: Request, options: dict[str, Any], output: Output) -> tuple[Artefact, nn.Module]:
    """Everything between the checks and the saving: what was computed, and the model."""
    if is_local(options["model"]):
        check_model_folder(Path(options["model"]).expanduser())
    if options["data"] is not None:
        find_source(options["data"], split=request.sampling.split)
    output.log("loading libraries")
    from smartinit.cli.load_model import load_weights
    from smartinit.data import read_batches  # noqa: F401 - importing `datasets` takes time that is not the data's
    from smartinit.pipeline import compute

    started = time.perf_counter()
    opened = open_inputs(request, options, output)
    read = time.perf_counter()
    check_interrupt()
    output.log(f"loading {options['model']}")
    check_request(request, opened.model)

    model = load_weights(opened.model, dtype=options["dtype"], device=options["device"])
    loaded = time.perf_counter()
    check_interrupt()
    config = request.config
    if opened.model.causal:
        # Some trainers refuse a folder that does not say it.
        config = replace(config, task_type="CAUSAL_LM")
    artefact = compute(
        model,
        config,
        opened.batches,
        max_batches=request.max_batches,
        seed=request.sampling.seed,
        skip_bad_batches=options["skip_bad_batches"],
        show_progress_bar=not output.quiet,
        provenance={
            "model": options["model"],
            "data": options["data"],
            **opened.provenance,
        },
        **request.planner_options(),
    )
    check_interrupt()
    finished = replace(
        artefact,
        provenance={**artefact.provenance, **({"dropped_rows": opened.batches.dropped} if opened.batches else {})},
        timings={"data": read - started, "model": loaded - read, **artefact.timings},
    )
    return finished, model


def check_request(request: Request, model: ModelSource) -> None:
    """Refuse methods and targets that cannot be before gigabytes of weights are loaded.

    Raises:
        ConfigError: no layer matches, or a rank is above ``min(in, out)``.
    """
    from smartinit.cli.load_model import meta_model
    from smartinit.initialisation import resolve_method
    from smartinit.targets import check_ranks, select_targets

    hosts = resolve_method(request.config).hosts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again with the real model
        with suppress(ModelError):  # a model that cannot be built without weights is checked with them
            check_ranks(select_targets(meta_model(model), request.config, hosts=hosts), request.config)


def show(artefact: Artefact, output: Output, *, out: Path, plot: Path | None, base_out: Path | None = None) -> None:
    """Print the summary and where the files lie."""
    from smartinit.cli.summary import render, summarise

    summary = summarise(artefact)
    document = {"hit": None, "key": artefact.recipe.digest, "out": str(out), "summary": summary}
    lines = [render(summary), "", f"adapter: {out}"]
    if base_out is not None:
        document["base_out"] = str(base_out)
        lines.append(f"base:    {base_out}, the model that this adapter is to be trained on")
    if plot is not None:
        document["plot"] = str(plot)
        lines.append(f"figure:  {plot}")
    output.result(document, "\n".join(lines))
