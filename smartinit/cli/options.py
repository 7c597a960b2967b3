"""The options that verbs share, grouped by what they are about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]

DTYPES = ("auto", "float32", "bfloat16", "float16")
PLANNERS = ("variance", "uniform")
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def _all(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """Several click options as one decorator, in the order of reading."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


class Count(click.ParamType):  # type: ignore[type-arg] # generic in the newest click only
    """A whole number, also written as 20k, 20M or 1.5G."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        """``"20M"`` → 20000000."""
        if isinstance(value, int):
            return value
        text = str(value).strip().lower().replace("_", "")
        unit = _UNITS.get(text[-1:], 1)
        try:
            number = float(text[:-1] if unit > 1 else text) * unit
            count = int(number)
        except (ValueError, OverflowError):
            count, number = 0, 0.5
        if count < 1 or count != number:
            self.fail(f"'{value}' is no whole number above 0, such as 20000, 20k or 20M", param, ctx)
        return count


def model_options(*, required: bool = True) -> Callable[[F], F]:
    """Which model, where and how precise."""
    return _all(
        click.option("--model", required=required, metavar="DIR_OR_ID", help="Model folder, or id on the hub."),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="auto",
            show_default=True,
            help="Precision of the model; auto is the checkpoint's, but float32 for float16 on a CPU.",
        ),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto."),
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
    )


def data_options(*, required: bool = True) -> Callable[[F], F]:
    """Which rows, and how they become batches."""
    return _all(
        click.option(
            "--data",
            required=required,
            metavar="FILE_OR_ID",
            help="jsonl, csv, tsv, parquet or txt (also .gz), a folder of one kind, or a dataset id on the hub.",
        ),
        click.option("--split", default="train", show_default=True, help="Split of a hub dataset or a folder."),
        click.option("--data-config", metavar="NAME", help="Configuration of a hub dataset."),
        click.option("--text-column", metavar="NAME", help="Column with the text."),
        click.option("--prompt-column", metavar="NAME", help="Column with the prompt, whose tokens do not count."),
        click.option("--completion-column", metavar="NAME", help="Column with the completion."),
        click.option("--messages-column", metavar="NAME", help="Column with conversations."),
        click.option(
            "--label-mask/--no-label-mask",
            default=True,
            show_default=True,
            help="Count only tokens of completions and of the assistant.",
        ),
        click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Rows per batch."),
        click.option(
            "--max-length",
            type=click.IntRange(1),
            default=1024,
            show_default=True,
            help="Tokens per row; at most what the model can read.",
        ),
        click.option("--max-samples", type=click.IntRange(1), help="Rows that are used at most."),
        click.option(
            "--max-batches", type=click.IntRange(1), help="Batches that are used at most; one pass otherwise."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the shuffle and of the sketches."),
    )


def adapter_options() -> Callable[[F], F]:
    """Which layers get an adapter, of which rank, and how it starts."""
    return _all(
        click.option("--method", default="eva", show_default=True, help="Initialisation; see the README's table."),
        click.option(
            "--option",
            "init_options",
            multiple=True,
            metavar="NAME=VALUE",
            help="Option of the method, such as corda_method=kpm; may be repeated.",
        ),
        click.option("--rank", type=int, default=8, show_default=True, help="Rank that a layer gets on average."),
        click.option("--alpha", type=float, help="lora_alpha; the rank if not given, which is a scaling of 1."),
        click.option("--rslora", is_flag=True, help="Scale by alpha / sqrt(rank)."),
        click.option(
            "--target-modules",
            multiple=True,
            metavar="NAMES",
            help="Names separated by commas, with * as a wildcard, or a regular expression, or all-linear; "
            "may be repeated. Without it, the architecture's defaults.",
        ),
        click.option("--exclude-modules", multiple=True, metavar="NAMES", help="Likewise, to leave out."),
        click.option("--layers-to-transform", metavar="NUMBERS", help="Only these layers, such as 0,1,4-7."),
        click.option("--rho", type=float, default=2.0, show_default=True, help="A rank may grow to rank x rho."),
        click.option(
            "--tau", type=float, default=0.99, show_default=True, help="A direction has settled at this cosine (0..1)."
        ),
        click.option("--whiten/--no-whiten", default=False, show_default=True, help="Whiten the directions."),
        click.option(
            "--adjust-scaling/--no-adjust-scaling",
            default=True,
            show_default=True,
            help="Keep alpha / rank when a rank changes.",
        ),
        click.option(
            "--planner",
            type=click.Choice(PLANNERS),
            help="Ranks where the variance is (EVA's default), or the same everywhere (that of the others).",
        ),
        click.option("--budget", type=Count(), metavar="RANKS", help="Sum of all ranks; rank x layers if not given."),
        click.option(
            "--captured",
            type=float,
            metavar="SHARE",
            help="Smallest ranks that capture this share (0..1) of each layer's spectrum, instead of --rank.",
        ),
        click.option("--frozen-a", is_flag=True, help="Only B is meant to be trained; recorded in smartinit.json."),
        click.option(
            "--match-gain",
            type=click.Choice(("kaiming",)),
            help="Scale A so that the learning rate of LoRA's own start fits.",
        ),
        click.option("--params", type=Count(), metavar="COUNT", help="Budget in parameters instead, such as 20M."),
        click.option(
            "--rank-multiple-of", type=click.IntRange(1), default=1, show_default=True, help="Round ranks to this."
        ),
        click.option("--min-rank", type=click.IntRange(0), default=0, show_default=True, help="Of every layer."),
        click.option("--max-rank", type=click.IntRange(1), help="Of every layer."),
    )


def pass_options() -> Callable[[F], F]:
    """How the pass over the data is made."""
    return _all(
        click.option(
            "--skip-bad-batches", is_flag=True, help="Count and skip batches with NaN or Inf in a layer's input."
        )
    )


def store_options(*, computes: bool = True) -> Callable[[F], F]:
    """Where results are kept and found."""
    decorators = [
        click.option(
            "--store",
            multiple=True,
            metavar="DIR_OR_URL",
            help="Store of results; SMARTINIT_CACHE or cache if not given. The first is written; may be repeated for "
            "others that are read too.",
        )
    ]
    if computes:
        decorators += [
            click.option("--no-store", is_flag=True, help="Neither look results up nor keep them."),
            click.option(
                "--no-compute", is_flag=True, help="Only what is stored: exit with 3 rather than run the model."
            ),
            click.option("--refresh", is_flag=True, help="Compute in any case, and replace what is stored."),
        ]
    return _all(*decorators)


def output_options(*, quiet: bool = True) -> Callable[[F], F]:
    """How results are shown."""
    decorators = [click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")]
    if quiet:
        decorators.append(click.option("--quiet", is_flag=True, help="No log lines and no progress bars."))
    return _all(*decorators)
