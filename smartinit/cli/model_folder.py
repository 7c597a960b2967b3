"""Is this a model folder? Answered from file headers, without torch, before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

from smartinit.errors import MissingFileError, ModelError
from smartinit.formats.safetensors_header import read_header

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def is_local(model: str) -> bool:
    """Whether ``--model`` names a folder; otherwise it is an id of the hub.

    Raises:
        MissingFileError: it looks like a path and does not exist.
        ModelError: it is a file.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return True
    if path.exists():
        raise ModelError(f"the model {path} is a file; expected a folder with config.json and safetensors files")
    looks_like_path = model.startswith(("/", "./", "../", "~")) or _HUB_NAME.fullmatch(model) is None
    # "models/llama" beside an existing folder "models" is a typo, not the hub's user "models".
    if looks_like_path or (len(path.parts) > 1 and path.parent.is_dir()):
        raise MissingFileError(f"the model folder {path} does not exist; check --model")
    return False


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """Check what every transformers folder must have; reads a few kB per file.

    Args:
        folder: exists.
        weights: also check that the weights are complete.

    Raises:
        ModelError: empty, no or broken config.json, no weights, only pickled weights, or truncated ones.
    """
    if not any(folder.iterdir()):
        raise ModelError(f"the model folder {folder} is empty; expected config.json and safetensors files")
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"the model folder {folder} has no config.json; is it a transformers model folder?")
    _read_json(config)
    if weights:
        for shard in _shards(folder):
            _check_shard(shard)


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise ModelError(f"{index} has no weight_map; download the model again")
        shards = [folder / str(name) for name in sorted(set(listed.values()))]
        for shard in shards:
            if not shard.is_file():
                raise ModelError(f"the model folder {folder} lacks {shard.name}, which its index lists")
        return shards
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"the model folder {folder} has only pickled weights ({pickled[0]}), which are never loaded; load it once "
            "where you trust it and save it again with save_pretrained, which writes safetensors"
        )
    raise ModelError(f"the model folder {folder} has no weights; expected model.safetensors")


def _check_shard(path: Path) -> None:
    """The header must be readable and the file as long as it says."""
    try:
        read_header(path)
    except ValueError as error:
        raise ModelError(f"{error}; download the model again") from error


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object; download the model again")
    return value
