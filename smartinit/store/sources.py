"""What may be put into a store: bytes, files, and tensors by name."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartinit import __version__
from smartinit.errors import ArgumentError, ConfigError, MissingFileError, VerificationError
from smartinit.store.blobs import Blob
from smartinit.store.entry import TENSORS
from smartinit.store.keys import Key, check_name
from smartinit.store.manifest import MAX_BYTES, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    Source = bytes | Path | Mapping[str, torch.Tensor] | Callable[[], Iterable[Any]]

_PIECE = 4 << 20
_UNWRITTEN = Blob("0" * 64, 0, "0" * 32)


def gather(tensors: Mapping[str, torch.Tensor] | None, files: Mapping[str, bytes | Path] | None) -> dict[str, Source]:
    """All content of an entry by file name, looked at before anything is written.

    Raises:
        ArgumentError: neither bytes, nor a path, nor dense tensors.
        ConfigError: two contents for one name.
        MissingFileError: a path at which there is no file.
    """
    sources: dict[str, Source] = {}
    for name, content in (files or {}).items():
        if not isinstance(content, (bytes, Path)):
            raise ArgumentError(f"the file {name!r} is a {type(content).__name__}; expected bytes or a Path")
        if isinstance(content, Path) and not content.is_file():
            raise MissingFileError(f"there is no file at '{content}' to be stored as {name!r}")
        sources[name] = content
    if tensors is not None:
        if not isinstance(tensors, Mapping):
            raise ArgumentError(f"tensors are a mapping from names, not a {type(tensors).__name__}")
        if TENSORS in sources:
            raise ConfigError(f"'{TENSORS}' is the name of the file of `tensors`; give that of `files` another one")
        sources[TENSORS] = tensors
        next(chunks(tensors))  # the header: refuses what the format does not have
    return sources


def chunks(source: Source) -> Iterator[Any]:
    """The bytes as buffers."""
    if isinstance(source, bytes):
        yield source
    elif isinstance(source, Path):
        with source.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
    elif isinstance(source, Mapping):
        from smartinit.formats.tensor_file import tensor_chunks

        yield from tensor_chunks(source)
    else:
        yield from source()


def size(source: Source) -> int:
    """About how many bytes there are, as far as that is known before."""
    if isinstance(source, bytes):
        return len(source)
    if isinstance(source, Path):
        return source.stat().st_size
    if isinstance(source, Mapping):
        return sum(tensor.numel() * tensor.element_size() for tensor in source.values())
    return 0


def describe(
    name: str,
    key: Key | str,
    sources: Mapping[str, Source],
    *,
    tags: Iterable[str],
    meta: Mapping[str, Any],
    basis: str,
) -> Manifest:
    """A manifest before its blobs are known, of which it is known that it can be read back.

    Raises:
        ConfigError, ArgumentError: it cannot.
    """
    if isinstance(tags, str):
        raise ArgumentError(f"tags are several names; expected a list such as [{tags!r}]")
    draft = Manifest(
        key=name,
        blobs=dict.fromkeys(sources, _UNWRITTEN),
        kind=key.kind if isinstance(key, Key) else "",
        leaves=key.leaves if isinstance(key, Key) else {},
        meta=meta,
        tags=tuple(check_name(tag) for tag in tags),
        basis=basis,
        created=time.time(),
        writer={"smartinit": __version__, "torch": version("torch"), "host": socket.gethostname()},
    )
    content = draft.to_bytes()
    if len(content) > MAX_BYTES // 2:
        raise ConfigError(
            f"what is to be stored beside '{name}' has {len(content) / 1e6:,.0f} MB; expected at most "
            f"{MAX_BYTES / 2e6:,.0f}: give large values as tensors or files"
        )
    try:
        Manifest.from_bytes(content, name)
    except VerificationError as error:
        raise ConfigError(f"this cannot be stored: {error}") from error
    return draft
