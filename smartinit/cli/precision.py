"""In which precision a model would be loaded, as far as that can be told without torch."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_DEVICES = Path("/dev")
# Nvidia's (also of boards and of Windows' Linux), AMD's, Intel's, Habana's, Huawei's; /dev/nv* would match disks.
_NODES = ("nvidia*", "nvhost*", "nvgpu", "nvmap", "dxg", "kfd", "dri/renderD*", "accel*", "hl[0-9]*", "davinci*")


def precision(options: Mapping[str, Any], model: Path) -> str | None:
    """The dtype that a model is loaded in, or ``as saved``; None if it hangs on the device that torch finds.

    See `smartinit.cli.load_model`: float16 is loaded as float32 where the device is the CPU.
    """
    if options["dtype"] != "auto":
        return str(options["dtype"])
    config = model / "config.json"
    saved = json.loads(config.read_bytes()) if config.is_file() else {}
    dtype = str(saved.get("dtype", saved.get("torch_dtype")))
    if dtype.removeprefix("torch.") != "float16" or options["device"] not in ("auto", "cpu"):
        return "as saved"
    return "float32" if options["device"] == "cpu" or only_cpu() else None


def only_cpu() -> bool:
    """Whether torch can find no accelerator here; False where that is not certain."""
    if entry_points(group="torch.backends"):  # packages that bring devices of their own
        return False
    if _build() == "cpu" and sys.platform != "darwin":
        return True
    return sys.platform == "linux" and not any(_is_there(pattern) for pattern in _NODES)


def _build() -> str:
    """What of torch is installed: ``cpu``, ``cu128``; empty if it does not say."""
    try:
        return version("torch").partition("+")[2]
    except PackageNotFoundError:
        return ""


def _is_there(pattern: str) -> bool:
    try:
        return next(_DEVICES.glob(pattern), None) is not None
    except OSError:
        return True
