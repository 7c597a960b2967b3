"""One entry in a reader's hands."""

from __future__ import annotations

import os
import weakref
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from smartinit.errors import ArtefactError, UnknownNameError, VerificationError
from smartinit.store.blobs import check_size, checksum, mapped
from smartinit.store.regular import open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from typing_extensions import Self

    from smartinit.store.blobs import Blob
    from smartinit.store.leases import Lease
    from smartinit.store.manifest import Manifest

    Own = bool | Mapping[str, torch.Tensor]

TENSORS = "tensors.safetensors"
"""The file of `Store.put`'s tensors."""
_SMALL = 1 << 20  # a map keeps a file open, and of these there are not many
MAIN = (TENSORS, "adapter_model.safetensors")
"""Files whose tensors an entry's are."""


class Entry:
    """An entry whose bytes have been checked; it is leased, so that pruning leaves it alone, until it is closed.

    Attributes:
        manifest: what it is.
        files: file name -> where its blob lies; the blobs are not to be written to. If someone removes the entry and
            prunes at once, the names go; see `content`.
    """

    def __init__(
        self,
        manifest: Manifest,
        files: Mapping[str, Path],
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        contents: Mapping[str, memoryview],
        lease: Lease | None,
    ) -> None:
        self.manifest = manifest
        self.files = MappingProxyType(dict(files))
        self._tensors, self._contents = tensors, contents
        self._release = weakref.finalize(self, lease.release) if lease is not None else None

    @property
    def key(self) -> str:
        """Its name in the store."""
        return self.manifest.key

    @property
    def meta(self) -> Mapping[str, Any]:
        """What was stored beside the tensors."""
        return self.manifest.meta

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Name -> tensor, mapped from the file unless asked for otherwise; writing to one changes no file.

        Raises:
            ArtefactError: the entry holds no tensors.
        """
        for name in MAIN:
            if name in self._tensors:
                return MappingProxyType(dict(self._tensors[name]))
        raise ArtefactError(f"the entry '{self.key}' holds {', '.join(self.files) or 'nothing'}, but no tensors")

    def content(self, name: str) -> memoryview:
        """A file's bytes, as they were checked: readable whatever happens to the store. Cost: none.

        Raises:
            UnknownNameError: it has no such file.
        """
        if name not in self._contents:
            raise UnknownNameError(
                f"the entry '{self.key}' has no file {name!r}; it has {', '.join(self.files) or 'none'}"
            )
        return self._contents[name]

    def close(self) -> None:
        """Give the lease back; tensors and contents stay readable."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_blob(
    path: Path, blob: Blob, *, as_tensors: bool, own: Own = False
) -> tuple[memoryview, Mapping[str, torch.Tensor]]:
    """The bytes of a blob and its tensors (none of another file), after its checksum was found right.

    Args:
        path: of the blob.
        blob: what it should be.
        as_tensors: whether it is a safetensors file.
        own: in memory of one's own, instead of pages of the file; or tensors to be read into.

    Raises:
        VerificationError: it was changed.
        ArtefactError: it is no safetensors file.
        OSError, RuntimeError: it is not there, or cannot be read.
    """
    if as_tensors and own:
        from smartinit.store.checked import own_tensors

        content, tensors = own_tensors(path, blob, None if own is True else own)
        return content.toreadonly(), tensors
    tensors = {}
    with open_regular(path) as file:
        check_size(path, blob, os.fstat(file.fileno()).st_size)
        if as_tensors:
            from smartinit.formats.tensor_file import map_tensors

            data, tensors = map_tensors(path, blob.size)
        elif blob.size <= _SMALL:
            data = memoryview(file.read(_SMALL + 1))
        else:
            data = mapped(file, blob.size)
    if checksum(data) != blob.xxh3:
        raise VerificationError(f"'{path}' was changed: its checksum differs")
    return data.toreadonly(), tensors
