"""What a model is, from its files: nothing is loaded, and torch is not needed."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartinit.errors import ModelError
from smartinit.formats.safetensors_header import content_head, read_header
from smartinit.store.file_memo import FileMemo, file_sha256, is_sha256
from smartinit.store.keys import canonical

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from smartinit.formats.safetensors_header import Entry

__all__ = ["FilesFingerprint", "file_sha256", "files_fingerprint", "local_model"]

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_ADAPTER = "adapter_config.json"
_PIECE = 1 << 22
_LARGEST_JSON = 64 << 20
# What a configuration says of itself, not of the model.
_NOT_CONFIG = frozenset(("_name_or_path", "name_or_path", "transformers_version", "_commit_hash"))
_TOKENIZER = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_NO_TOKENIZER = frozenset(
    (_CONFIG, _INDEX, "generation_config.json", "trainer_state.json", "smartinit.json", "all_results.json",
     "train_results.json", "eval_results.json", "requirements.txt", "README.txt", "LICENSE.txt")
)  # fmt: skip


@dataclass(frozen=True)
class FilesFingerprint:
    """Digests of a model's files, each 64 hexadecimal digits.

    Attributes:
        root: of the names, dtypes, shapes and bytes of all tensors: not of how they are spread over files.
        tensors: name in the files -> digest, as of `smartinit.targets.fingerprint.tensor_digest`.
        config: of config.json and of code that comes with the model.
        tokenizer: of the other files that a tokenizer or processor may read.
    """

    root: str
    tensors: Mapping[str, str]
    config: str
    tokenizer: str


def files_fingerprint(
    model: str | os.PathLike[str], memo_dir: Path, *, revision: str | None = None, threads: int | None = None
) -> FilesFingerprint | None:
    """The fingerprint of a model folder, of one safetensors file, or of what the hub's cache has under an id.

    Args:
        model: folder, file or id; nothing is downloaded.
        memo_dir: where digests are remembered, see `FileMemo`.
        revision: of an id; None: ``main``, as the cache knows it.
        threads: that hash at the same time; None: one per core that this process may use.

    Returns:
        None where files do not say what would be loaded: it is not here, or its weights are pickled (they are never
        opened), or it is an adapter folder, or its code is another repository's.

    Cost: the first time one pass over all bytes (about 1.5 GB/s per thread); then the files' headers.

    Raises:
        ModelError: a broken safetensors file, index or config.json, a shard that is not there, a file that cannot be
            read, or one that changed while it was.
    """
    source = local_model(model, revision)
    if source is None:
        return None
    try:
        return _fingerprint(source, memo_dir, threads)
    except OSError as error:
        raise ModelError(f"'{source}' cannot be read: {error}") from error


def _fingerprint(source: Path, memo_dir: Path, threads: int | None) -> FilesFingerprint | None:
    files = [source] if source.is_file() else _weight_files(source)
    if files is None or any(file.suffix != ".safetensors" for file in files):
        return None
    folder = None if source.is_file() else source
    config = [] if folder is None else _configuration(folder, memo_dir)
    if config is None:
        return None
    tensors: dict[str, str] = {}
    memo = FileMemo(memo_dir)
    for file in files:
        for name, digest in _tensors_of(file, memo, threads).items():
            if tensors.setdefault(name, digest) != digest:
                raise ModelError(f"'{source}' holds two tensors '{name}' that differ; download the model again")
    _check_complete(source, tensors)
    return FilesFingerprint(
        root=_digest(sorted(tensors.items())),
        tensors=tensors,
        config=_digest(config),
        tokenizer=_digest([] if folder is None else _named(_tokenizer_files(folder), folder, memo_dir)),
    )


def local_model(model: str | os.PathLike[str], revision: str | None = None) -> Path | None:
    """The folder or file that is meant, through the hub's cache if it is an id; None if it is not on this machine."""
    path = Path(model).expanduser()
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a name that is too long
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(str(model), _CONFIG, revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _weight_files(folder: Path) -> list[Path] | None:
    """What transformers would load: one file, or the shards of the index; None if that is something else."""
    if (folder / _ADAPTER).exists():
        return None
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if not (folder / _INDEX).is_file():
        return None
    names = sorted(set(_weight_map(folder).values()))
    for name in names:
        if Path(name).name != name or "\\" in name or name in (".", ".."):
            raise ModelError(f"'{folder / _INDEX}' names {name!r}, which is no file of its folder; download it again")
        if not (folder / name).is_file():
            raise ModelError(f"'{folder}' lacks {name}, which its index lists; download the model again")
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    listed = _read_json(folder / _INDEX).get("weight_map")
    if isinstance(listed, dict) and listed and all(isinstance(name, str) for name in listed.values()):
        return listed
    raise ModelError(f"'{folder / _INDEX}' has no weight_map; download the model again")


def _check_complete(source: Path, tensors: Mapping[str, str]) -> None:
    if source.is_dir() and not (source / _WHOLE).is_file():
        missing = sorted(_weight_map(source).keys() - tensors.keys())
        if missing:
            raise ModelError(f"the files of '{source}' lack '{missing[0]}', which the index lists; download them again")


def _tensors_of(file: Path, memo: FileMemo, threads: int | None) -> dict[str, str]:
    """Name -> digest of the tensors in one file."""
    try:
        header = read_header(file)

        def fits(value: object) -> bool:
            return isinstance(value, dict) and value.keys() == header.keys() and all(map(is_sha256, value.values()))

        found: dict[str, str] = memo.recall(file, "tensors", lambda path: _hash_all(path, threads), fits)
    except (ValueError, OSError) as error:
        raise error if isinstance(error, ModelError) else ModelError(f"{error}; download the model again") from error
    return found


def _hash_all(path: Path, threads: int | None) -> dict[str, str]:
    header = read_header(path)
    largest_first = sorted(header, key=lambda name: header[name].start - header[name].stop)
    pool = ThreadPoolExecutor(max(min(threads or _cores(), len(header)), 1))
    try:
        return dict(zip(largest_first, pool.map(lambda n: _hash_one(path, header[n]), largest_first), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _hash_one(path: Path, entry: Entry) -> str:
    sha = hashlib.sha256(content_head(entry.dtype, entry.shape))
    buffer = memoryview(bytearray(min(_PIECE, entry.stop - entry.start)))
    with path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        left = entry.stop - entry.start
        while left:
            count = file.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise ModelError(f"'{path}' became shorter while it was read; download the model again")
            sha.update(buffer[:count])
            left -= count
    return sha.hexdigest()


def _configuration(folder: Path, memo_dir: Path) -> list[Any] | None:
    """config.json, whatever its layout, and code of the model's own; None if its code is elsewhere."""
    path = folder / _CONFIG
    config = _read_json(path) if path.is_file() else {}
    kept = {name: value for name, value in config.items() if name not in _NOT_CONFIG}
    if "torch_dtype" in kept:  # the former name
        kept.setdefault("dtype", kept.pop("torch_dtype"))
    if "--" in str(config.get("auto_map")):
        return None
    return [json.dumps(kept, sort_keys=True), _named(folder.glob("*.py"), folder, memo_dir)]


def _tokenizer_files(folder: Path) -> Iterator[Path]:
    for path in [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*.jinja")]:
        weights = path.name.endswith(".index.json")
        if path.suffix in _TOKENIZER and path.name not in _NO_TOKENIZER and not weights and path.is_file():
            yield path


def _named(files: Iterable[Path], folder: Path, memo_dir: Path) -> list[list[str]]:
    return sorted([path.relative_to(folder).as_posix(), file_sha256(path, memo_dir)] for path in files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_JSON)
        value = json.loads(text)  # one that is cut off is no JSON
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"'{path}' cannot be read as JSON ({error}); download the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"'{path}' holds no JSON object; download the model again")
    return value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _digest(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()
