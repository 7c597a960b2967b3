"""``smartinit doctor``: is this machine fit, and is this adapter what it claims to be?"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from smartinit.cli.exit_codes import OK, UNVERIFIED
from smartinit.cli.options import DTYPES, output_options
from smartinit.cli.output import Output, human_bytes, table
from smartinit.errors import ConfigError

_NEEDED = ("torch", "transformers", "datasets", "scikit-learn", "safetensors", "numpy", "click", "tqdm")
_OPTIONAL = {"peft": "hosts and the demo's check", "matplotlib": "figures"}


@click.command("doctor")
@click.option("--verify", "folder", type=click.Path(path_type=Path), metavar="FOLDER", help="Adapter to recompute.")
@click.option("--model", metavar="DIR_OR_ID", help="Base model; the one it was computed from if not given.")
@click.option("--data", metavar="FILE_OR_ID", help="Data; what it was computed from if not given.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True, help="Layers to recompute.")
@click.option(
    "--max-rows", type=click.IntRange(1), default=50_000, show_default=True, help="Activation rows per layer at most."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Precision of the model.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@output_options()
def command(*, folder: Path | None, as_json: bool, quiet: bool, **options: Any) -> int:  # noqa: ANN401 - click's
    """Show versions, devices and free memory; with --verify, recompute layers of an adapter and compare.

    The inputs of some layers are collected again and decomposed with scikit-learn in float64. The adapter passes when
    its directions capture at least 99 % of the variance that the best ones capture. The exit code is 4 otherwise.
    """
    output = Output(as_json=as_json, quiet=quiet)
    if folder is None:
        if options["model"] or options["data"]:
            raise ConfigError("--model and --data have no meaning without --verify FOLDER")
        with output.work():
            found = environment()
        output.result(found, _render(found))
        return OK
    with output.work():
        from smartinit.cli.verify import render, verify

        report = verify(folder, options, output)
    output.result(report, render(report))
    return OK if report["ok"] else UNVERIFIED


def environment() -> dict[str, Any]:
    """Versions, devices, memory and disk."""
    import torch

    from smartinit import __version__

    devices = [{"name": "cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        devices.append({"name": f"cuda:{index} {torch.cuda.get_device_name(index)}", "free": free, "total": total})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps"})
    return {
        "smartinit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)},
        "devices": devices,
        "free_memory_bytes": _free_memory(),
        "free_disk_bytes": {
            "here": shutil.disk_usage(Path.cwd()).free,
            "temporary": shutil.disk_usage(tempfile.gettempdir()).free,
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _free_memory() -> int | None:
    """What new processes can have; only Linux says."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _render(found: dict[str, Any]) -> str:
    packages = [
        (name, installed or f"missing; for {_OPTIONAL[name]}" if name in _OPTIONAL else installed or "missing")
        for name, installed in found["packages"].items()
    ]
    rows = [("smartinit", found["smartinit"]), ("python", found["python"]), ("platform", found["platform"]), *packages]
    for device in found["devices"]:
        said = f"{device['cores']} cores, {device['threads']} threads" if "cores" in device else ""
        if "free" in device:
            said = f"{human_bytes(device['free'])} of {human_bytes(device['total'])} free"
        rows.append((device["name"], said))
    memory, disk = found["free_memory_bytes"], found["free_disk_bytes"]
    rows += [
        ("free memory", "unknown" if memory is None else human_bytes(memory)),
        ("free disk", f"{human_bytes(disk['here'])} here, {human_bytes(disk['temporary'])} for temporary files"),
    ]
    return table(("what", "found"), rows, left=2)
