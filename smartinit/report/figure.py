"""One figure of an artefact: which rank every module got, how much variance that captures, how far its step goes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from smartinit.errors import ArtefactError, ConfigError, MissingDependencyError, MissingFileError
from smartinit.formats.files import write_file

if TYPE_CHECKING:
    from smartinit.artefact import Artefact

FORMATS: dict[str, dict[str, None]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Suffix -> metadata: without the date, equal artefacts give equal files."""

DPI = 300
MOST_PIXELS = 20_000  # of a side: image viewers refuse more

STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "hatch.linewidth": 0.5,
    "text.parse_math": False,  # a title may hold dollar signs
    "svg.hashsalt": "smartinit",  # otherwise every run makes other ids
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and edited
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
}


def plot_artefact(artefact: Artefact, path: str | Path, *, title: str | None = None) -> Path:
    """Draw the ranks as a heat map (layers × kinds of module), the captured variance against rank, and the gains.

    The file appears whole or not at all, replaces an older one, and has the same bytes for equal artefacts (with one
    version of matplotlib). Neither pyplot nor the user's matplotlib settings are used or changed.

    Args:
        artefact: what to draw.
        path: where to; its suffix (png, svg or pdf) chooses the format.
        title: a line above the figure.

    Returns:
        The path.

    Raises:
        ConfigError: the suffix is none of these.
        ArtefactError: there are no targets to draw.
        MissingFileError: the folder does not exist.
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written.

    Cost: a few milliseconds per site; about two seconds for 80 layers of 7 modules.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        known = ", ".join(f".{name}" for name in FORMATS)
        raise ConfigError(f"the figure '{path}' has the suffix '{path.suffix}'; supported are {known}")
    if not path.parent.is_dir():
        raise MissingFileError(f"the folder '{path.parent}' for the figure does not exist; make it first")
    if not artefact.plan.ranks:
        raise ArtefactError("the artefact has no targets, so there is nothing to draw")
    write_file(path, _render(artefact, kind, title))
    return path


def _render(artefact: Artefact, kind: str, title: str | None) -> bytes:
    try:
        import matplotlib.style
    except ImportError as error:
        raise MissingDependencyError(
            f"a figure needs matplotlib, which cannot be imported ({error}): pip install 'smartinit[plot]'"
        ) from error
    from smartinit.report.layout import draw

    with matplotlib.style.context(["default", STYLE]):
        figure = draw(artefact, title)
        content = io.BytesIO()
        figure.savefig(
            content,
            format=kind,
            dpi=min(DPI, MOST_PIXELS / max(figure.get_size_inches())),
            bbox_inches="tight",  # labels and legends stand outside the axes: the page grows to hold them
            pad_inches=0.08,
            metadata=FORMATS[kind],
        )
    return content.getvalue()
