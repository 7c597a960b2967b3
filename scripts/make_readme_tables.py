"""Bring the generated parts of README.md and docs/ up to date: ``scripts/make_readme_tables.py [--check] [--run]``.

A generated part stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; ``docs/cli.md`` is generated as a
whole. With ``--check`` nothing is written, and the exit code is 1 if something is out of date. With ``--run`` the
demo is run too, and its output and figure replace those shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import click

from smartinit import errors
from smartinit.cli import exit_codes
from smartinit.cli.output import human_bytes, human_count
from smartinit.cli.verbs import VERBS, group
from smartinit.data import columns
from smartinit.data.source import SUPPORTED
from smartinit.methods import available_methods
from smartinit.statistics.cost import plan_statistic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from smartinit.methods.base import Method

ROOT = Path(__file__).resolve().parent.parent
FIGURE = "docs/demo-figure.png"
_FIGURE_WIDTH, _FIGURE_COLOURS = 1000, 256
_WIDTH, _HELP_WIDTH = 120, 100
_NEEDS = MappingProxyType(
    {
        "activations": "a pass over data",
        "covariance": "a pass over data",
        "gradients": "data, with gradients",
    }
)
_EFFECTS = MappingProxyType(
    {
        "keeps": "kept: `B A = 0`",
        "splits": "split: `W = residual + s·B A`",
        "shifts": "kept, but `B A` is not 0",
        "quantises": "quantised: `W ≈ Q + s·B A`",
    }
)
_HOSTS = MappingProxyType(
    {"linear": "Linear", "conv1d": "Conv1D", "convolution": "convolutions", "embedding": "Embedding"}
)
_FEATURES, _COMPONENTS = (64, 128, 384, 1024, 4096, 14336), (16, 32, 128)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite what is out of date, or only say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something is out of date")
    parser.add_argument("--run", action="store_true", help="also run the demo and show its output and figure")
    options = parser.parse_args(arguments)
    if options.run:
        run_demo()
    stale = {path: text for path, text in rendered().items() if not path.is_file() or path.read_text() != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} is out of date" if options.check else f"writing {path.relative_to(ROOT)}")
        if not options.check:
            path.write_text(text)
    return 1 if options.check and stale else 0


def rendered() -> dict[Path, str]:
    """File -> its text with every generated part as it should be; the demo's output stays as it stands."""
    parts: Mapping[str, Mapping[str, Callable[[], str]]] = {
        "README.md": {"methods": methods_table, "columns": columns_table, "exit codes": exit_codes_table},
        "docs/eva.md": {"statistics": statistics_table},
        "docs/methods.md": {"method options": options_table},
    }
    out = {}
    for name, makers in parts.items():
        text = (ROOT / name).read_text()
        for part, make in makers.items():
            text = fill(text, part, make())
        out[ROOT / name] = text
    return {**out, ROOT / "docs/cli.md": cli_pages()}


def fill(text: str, part: str, content: str) -> str:
    """``text`` with what stands between the markers of ``part`` replaced.

    Raises:
        ValueError: the markers are missing, or there more than once.
    """
    begin, end = f"<!-- begin {part} -->\n", f"<!-- end {part} -->"
    if (text.count(begin), text.count(end)) != (1, 1):
        message = f"expected the markers '{begin.strip()}' and '{end}' once each"
        raise ValueError(message)
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{content}\n{end}{rest.partition(end)[2]}"


def methods_table() -> str:
    """Every registered initialisation."""
    rows = [
        (f"`{m.name}`", m.summary, _needed(m), _EFFECTS[m.effect], _layers(m), _linked(m.source)) for m in _methods()
    ]
    return _table(("method", "what it is", "needs", "the base weight is", "layers", "source"), rows)


def options_table() -> str:
    """Every option of every method that has some."""
    rows = [
        (f"`{m.name}`", f"`{f.name}`", f"`{f.default!r}`", _described(m, f.name))
        for m in _methods()
        for f in dataclasses.fields(m)
        if f.name != "embedding"  # set by the kind of layer, not by the user
    ]
    return _table(("method", "option", "default", "what it does"), rows)


def _described(method: type[Method], name: str) -> str:
    """What the class says of one attribute in its docstring."""
    text = inspect.getdoc(method) or ""
    found = re.search(rf"^ {{4}}{name}: (.*(?:\n {{8}}.*)*)", text, re.MULTILINE)
    if found is None:
        message = f"the docstring of {method.__name__} does not describe its option '{name}'"
        raise ValueError(message)
    return " ".join(found.group(1).split()).replace("``", "`").replace("|", "\\|")


def _methods() -> list[type[Method]]:
    return list(available_methods().values())


def _needed(method: type[Method]) -> str:
    needed = [_NEEDS[method.needs]] if method.needs else []
    return " and ".join([*needed, *(["weights"] if method.needs_weight else [])]) or "nothing"


def _layers(method: type[Method]) -> str:
    return "all kinds" if method.hosts >= set(_HOSTS) else ", ".join(_HOSTS[h] for h in _HOSTS if h in method.hosts)


def _linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def columns_table() -> str:
    """The table in the docstring of `smartinit.data.columns`, and the kinds of files."""
    rows = [line for line in (columns.__doc__ or "").splitlines() if line.startswith("|")]
    files = re.sub(r"(\.\w+)", r"`\1`", f"Files: {SUPPORTED}; a folder of one kind; or a dataset id of the hub.")
    return "\n".join([*rows, "", textwrap.fill(files, _WIDTH)])


def exit_codes_table() -> str:
    """Codes and meanings from the docstring of `smartinit.cli.exit_codes`, exceptions from its table."""
    listed = " ".join((exit_codes.__doc__ or "").split("\n\n")[1].split())
    meanings = [entry.split(" ", 1) for entry in listed.split(" · ")]
    raised: dict[str, list[str]] = {}
    for error in (*_below(errors.SmartinitError), MemoryError, KeyboardInterrupt):
        base, code = error.__base__, _code(error)
        if base in (errors.SmartinitError, Exception, BaseException) or code != _code(base):
            raised.setdefault(code, []).append(f"`{error.__name__}`")
    return _table(
        ("code", "meaning", "Python's exception"), [(c, m, ", ".join(raised.get(c, []))) for c, m in meanings]
    )


def _code(error: type[BaseException]) -> str:
    return str(exit_codes.exit_code(error.__new__(error)))


def _below(kind: type[BaseException]) -> list[type[BaseException]]:
    return [
        cls for child in kind.__subclasses__() for cls in (child, *_below(child)) if cls.__module__ == errors.__name__
    ]


def statistics_table() -> str:
    """Which statistic `plan_statistic` chooses for a site, and what it takes."""
    rows = []
    for features in _FEATURES:
        cells = []
        for components in _COMPONENTS:
            cost = plan_statistic(features, components)
            kind = "Gram" if cost.kind == "gram" else f"sketch, q = {cost.width}"
            cells.append(f"{kind}: {human_count(cost.flops_per_row)}FLOP, {human_bytes(cost.bytes)}")
        rows.append((str(features), *cells))
    return _table(("features d", *(f"{k} directions" for k in _COMPONENTS)), rows)


def cli_pages() -> str:
    """The ``--help`` page of every verb."""
    # The width is fixed, or the pages would depend on the terminal.
    top = group.make_context("smartinit", [], resilient_parsing=True, terminal_width=_HELP_WIDTH)
    lines = [
        "# Command line",
        "",
        "Generated from the `--help` pages by `scripts/make_readme_tables.py`. Results go to stdout, log lines and",
        "progress to stderr. `--json` prints one JSON document instead, also for an error.",
        "",
        *_page("smartinit", group, top),
    ]
    for verb in VERBS:
        command = group.get_command(top, verb)
        context = click.Context(command, info_name=verb, parent=top)
        lines += [f"## {verb}", "", *_page(f"smartinit {verb}", command, context)]
        for name, below in command.commands.items() if isinstance(command, click.Group) else ():
            inner = click.Context(below, info_name=name, parent=context)
            lines += [f"### {verb} {name}", "", *_page(f"smartinit {verb} {name}", below, inner)]
    return "\n".join(lines).rstrip() + "\n"


def _page(name: str, command: click.Command, context: click.Context) -> list[str]:
    return [
        "```console",
        f"$ {name} --help",
        *(line.rstrip() for line in command.get_help(context).splitlines()),
        "```",
        "",
    ]


def run_demo() -> None:
    """Run the demo; put what it prints into the README, and its figure, smaller, into docs/."""
    with tempfile.TemporaryDirectory() as folder:
        demo = [sys.executable, "-m", "smartinit", "demo"]
        shown = subprocess.run(demo, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
        shrink(Path(folder) / "demo-output" / "figure.png", ROOT / FIGURE)
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(), "demo", f"```console\n$ scripts/demo\n{shown.rstrip()}\n```"))


def shrink(figure: Path, to: Path) -> None:
    """Save a figure with fewer pixels and colours: a repository keeps every version of it for ever."""
    from PIL import Image

    with Image.open(figure) as image:
        height = round(image.height * _FIGURE_WIDTH / image.width)
        small = image.convert("RGB").resize((_FIGURE_WIDTH, height), Image.Resampling.LANCZOS)
        small.quantize(_FIGURE_COLOURS, dither=Image.Dither.NONE).save(to, optimize=True)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    sys.exit(main())
