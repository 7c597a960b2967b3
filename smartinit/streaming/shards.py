"""The tensors of a model folder, one at a time: ``model.safetensors``, or shards with ``model.safetensors.index.json``.

Only headers are read until a tensor is asked for, and nothing is kept but open files: however large the model,
memory holds the tensors that the caller holds.
"""

from __future__ import annotations

import difflib
import json
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from smartinit.errors import MissingFileError, ModelError, UnknownNameError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

    import torch

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHOWN = 3  # names in a message


class WeightFiles:
    """Tensors by name, read from disk when they are asked for; made by `open_weights`, usable inside its with-block.

    Args:
        source: the folder or file, for messages.
        files: tensor name -> the file it is in.
        prefixes: what may stand before a name in the model and not in the files, or the other way round.
    """

    def __init__(self, source: Path, files: Mapping[str, Path], prefixes: Iterable[str]) -> None:
        self._source = source
        self._files = dict(files)
        self._prefixes = tuple(dict.fromkeys(f"{prefix}." for prefix in prefixes if prefix))
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    @property
    def names(self) -> list[str]:
        """Names of all tensors, as they stand in the files."""
        return list(self._files)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) is not None

    def find(self, name: str) -> str | None:
        """The name under which the files hold a tensor: itself, or it without or with one of the prefixes."""
        shorter = [name.removeprefix(prefix) for prefix in self._prefixes]
        longer = [prefix + name for prefix in self._prefixes]
        return next((known for known in (name, *shorter, *longer) if known in self._files), None)

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, as it is stored. Cost: the bytes of this tensor.

        Raises:
            UnknownNameError: no such tensor in the files.
            ModelError: its file is broken, or not what the index says.
        """
        file, stored = self._locate(name)
        try:
            tensor: torch.Tensor = self._handle(file).get_tensor(stored)
        except SafetensorError as error:
            raise ModelError(
                f"'{file}' does not hold the tensor '{stored}', which {_INDEX} places there ({error}); "
                "download the model again"
            ) from error
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from its file's header.

        Raises:
            UnknownNameError: no such tensor in the files.
            ModelError: its file is broken, or not what the index says.
        """
        file, stored = self._locate(name)
        try:
            return tuple(self._handle(file).get_slice(stored).get_shape())
        except SafetensorError as error:
            raise ModelError(
                f"'{file}' does not hold the tensor '{stored}' ({error}); download the model again"
            ) from error

    def close(self) -> None:
        """Close the files; tensors that were read stay usable."""
        self._open.clear()
        self._stack.close()

    def _locate(self, name: str) -> tuple[Path, str]:
        stored = self.find(name)
        if stored is None:
            near = difflib.get_close_matches(name, self._files, n=_SHOWN, cutoff=0.5)
            closest = f"; closest: {', '.join(map(repr, near))}" if near else ""
            raise UnknownNameError(
                f"'{self._source}' has no tensor '{name}' among its {len(self._files)}{closest}; are these the files "
                "of the same model?"
            )
        return self._files[stored], stored

    def _handle(self, file: Path) -> Any:  # noqa: ANN401 - safetensors' handle is untyped
        if file not in self._open:
            self._open[file] = self._stack.enter_context(_opened(file))
        return self._open[file]


@contextmanager
def open_weights(path: str | os.PathLike[str], *, prefixes: Iterable[str] = ()) -> Iterator[WeightFiles]:
    """The weights in a model folder, or in one safetensors file.

    Args:
        path: folder or file.
        prefixes: a model's ``base_model_prefix``, such as ``"model"``: files saved from a model without its head have
            names without it.

    Raises:
        MissingFileError: no such folder or file, no safetensors in it, or a shard that the index lists is not there.
        ModelError: a broken index or file.
    """
    source = Path(path).expanduser()
    weights = WeightFiles(source, _tensor_files(source), prefixes)
    try:
        yield weights
    finally:
        weights.close()


def find_weight_folder(name_or_path: str, revision: str | None = None) -> Path:
    """The local folder of a model: a folder as it is, a hub id through huggingface_hub's cache. Never downloads.

    Raises:
        MissingFileError: neither a folder nor in the cache.
    """
    folder = Path(name_or_path).expanduser()
    if folder.exists():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name_or_path, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise MissingFileError(
            f"the model '{name_or_path}' is neither a folder nor in the local cache of the Hugging Face hub; "
            "download it first, or pass the folder with its safetensors files"
        ) from error


def _tensor_files(source: Path) -> dict[str, Path]:
    """Tensor name -> its file."""
    if source.is_file():
        return _names_in(source)
    if not source.is_dir():
        raise MissingFileError(f"'{source}' does not exist; expected a model folder or a safetensors file")
    if (source / _WHOLE).is_file():
        return _names_in(source / _WHOLE)
    index = source / _INDEX
    if not index.is_file():
        raise MissingFileError(_nothing_in(source))
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): source / str(shard) for name, shard in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"'{index}' is no index of shards ({error!r}); download the model again") from error
    for name, file in files.items():
        if file.parent != source:
            raise ModelError(f"'{index}' places '{name}' outside of its folder, in '{file}'; download the model again")
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise MissingFileError(f"'{source}' lacks {file.name}, which its index lists; download the model again")
    return files


def _names_in(file: Path) -> dict[str, Path]:
    with _opened(file) as handle:
        return dict.fromkeys(handle.keys(), file)


def _opened(file: Path) -> Any:  # noqa: ANN401 - safetensors' handle is untyped
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"'{file}' is no safetensors file, or a truncated one ({error})") from error


def _nothing_in(folder: Path) -> str:
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        return (
            f"'{folder}' has only pickled weights ({pickled[0]}), which are never loaded and could not be read tensor "
            "by tensor; load the model once where you trust it and save it again with save_pretrained"
        )
    return f"'{folder}' has neither {_WHOLE} nor {_INDEX}; is it a model folder?"
