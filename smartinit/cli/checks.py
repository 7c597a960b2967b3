"""Cheap checks of paths, made before anything is loaded or computed."""

from __future__ import annotations

import importlib.util
import tempfile
from typing import TYPE_CHECKING

from smartinit.errors import MissingDependencyError, OutputError

if TYPE_CHECKING:
    from pathlib import Path


def check_output_folder(folder: Path, *, force: bool, marker: str = "adapter_config.json") -> None:
    """Refuse an output that exists or cannot be written, before the work is done; saving checks it again.

    Raises:
        OutputError: see above; also with ``force`` when the folder holds other things than what ``marker`` marks.
    """
    if folder.is_symlink() and not folder.exists():
        raise OutputError(f"the output {folder} is a dangling link; remove it or choose another --out")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the output {folder} is a file; --out needs the name of a folder")
    if folder.exists() and not force:
        raise OutputError(f"the output folder {folder} exists already; choose another --out or replace it with --force")
    if folder.exists() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise OutputError(
            f"the output folder {folder} is not replaced, because it holds other files and no {marker}; "
            "choose another name"
        )
    _check_writable(folder.absolute().parent, folder)


def check_output_file(path: Path) -> None:
    """Refuse a file that cannot be written.

    Raises:
        OutputError: it is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; expected the name of a file")
    _check_writable(path.absolute().parent, path)


def check_plot(path: Path | None) -> None:
    """Refuse a figure that could not be drawn or written.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written, or has a suffix of no figure.
    """
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("--plot needs matplotlib: pip install 'smartinit[plot]'")
    if path.suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise OutputError(f"--plot {path} has no suffix of a figure; expected .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"--plot {path} lies in a folder that does not exist; create {path.absolute().parent} first")
    check_output_file(path)


def _check_writable(parent: Path, wanted: Path) -> None:
    """Try it: permission bits say little about read-only mounts, quotas, or what root may do."""
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        tempfile.TemporaryDirectory(prefix=".smartinit-", dir=parent).cleanup()
    except OSError as error:
        raise OutputError(f"{wanted} cannot be written ({error.strerror} in {parent}); choose another place") from error
