"""Quantised base weights that came out of a computation: ``base-00001-of-00003.safetensors`` beside the adapter."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from smartinit.errors import ArtefactError, OutputError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SHARD_BYTES = 4 << 30
_NAME = re.compile(r"base-(\d{5})-of-(\d{5})\.safetensors")


def write_base_weights(folder: Path, weights: Mapping[str, torch.Tensor], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``(out, in)`` weights by module name, in their own dtype; nothing is written if there are none.

    Args:
        folder: an unfinished folder: files are written in place.
        weights: module name -> ``(out_features, in_features)``.
        shard_bytes: a file holds no more than this, but at least one weight.

    Raises:
        VerificationError: a value is not finite.
        OutputError: a file cannot be written.
    """
    shards: list[dict[str, torch.Tensor]] = []
    room = 0
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise VerificationError(f"the quantised base of layer '{name}' holds NaN or Inf; it is not written")
        size = weight.numel() * weight.element_size()
        if not shards or size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = weight.detach()
        room -= size
    for number, shard in enumerate(shards, 1):
        path = folder / f"base-{number:05d}-of-{len(shards):05d}.safetensors"
        try:
            # One shard at a time leaves the device; a copy, since layers may share memory and files may not.
            save_file({name: weight.cpu().clone().contiguous() for name, weight in shard.items()}, path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write '{path}': {error}") from error


def read_base_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Module name -> ``(out, in)`` weight, from as many files as there are; empty without any.

    Raises:
        ArtefactError: a file is broken, or one of several is missing.
    """
    paths = sorted(path for path in folder.glob("base-*.safetensors") if _NAME.fullmatch(path.name))
    if paths and [path.name for path in paths] != [
        f"base-{number:05d}-of-{len(paths):05d}.safetensors" for number in range(1, len(paths) + 1)
    ]:
        raise ArtefactError(f"'{folder}' holds only some files of the quantised base; copy the folder again")
    return {name: weight for path in paths for name, weight in _read_shard(path).items()}


def _read_shard(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"'{path}' is no readable safetensors file ({error}); it is broken") from error
