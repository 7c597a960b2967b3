"""Data on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class Output:
    """Where a verb writes.

    Attributes:
        as_json: exactly one JSON document instead of text.
        quiet: no log lines and no progress bars.
    """

    as_json: bool = False
    quiet: bool = False

    def result(self, document: dict[str, Any], text: str) -> None:
        """The verb's result, once, on stdout."""
        click.echo(json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) if self.as_json else text)

    def log(self, text: str) -> None:
        """A line on stderr."""
        if not self.quiet:
            click.echo(text, err=True)

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """While a verb works, what libraries print goes to stderr, and their warnings become single lines."""

        def show(message: Warning | str, *_: object, **__: object) -> None:
            click.echo(f"smartinit: warning: {' '.join(str(message).split())}", err=True)

        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.showwarning = show
            yield


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """Columns aligned with spaces: the first ``left`` to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def human_bytes(count: float) -> str:
    """1536 → ``1.5 KiB``."""
    return _scaled(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def human_count(count: float) -> str:
    """1234567 → ``1.2M``."""
    return _scaled(count, 1000, ("", "k", "M", "G", "T"))


def _scaled(count: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while abs(count) >= step and power < len(units) - 1:
        count /= step
        power += 1
    return f"{count:.1f}{units[power]}" if power else f"{count:.0f}{units[0]}"
