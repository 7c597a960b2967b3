"""CorDA's two cache files: the inputs' second moments (``covariance_file``) and what became of them (``cache_file``).

PEFT pickles both and believes them whatever the model or the data. Here they are safetensors with a digest of what
they were computed from, and a file for anything else is refused. A site's moment is kept once for all layers that
read it, as half a matrix:

- ``covariance_file``: ``<site>.<part>``, the state of one `GramStatistic` per site; the header names each site's layers
- ``cache_file``: ``<layer>.directions (k, in)``, ``.left (out, k)``, ``.values (k,)``; the rest in the header
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from smartinit.errors import ArtefactError, MissingFileError, OutputError, VerificationError
from smartinit.formats.files import new_file
from smartinit.spectrum import Certificate, Spectrum
from smartinit.statistics.gram import GramStatistic

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

_FORMAT = "1"
_MOMENTS, _SPECTRA = "smartinit second moments", "smartinit spectra"
_BYTES = 1 << 26


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and values, in the order given: of a model's weights, or of batches.

    Cost: one read of the values; tensors on other devices pass through the CPU one at a time.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}\\0{tensor.dtype}\\0{tuple(tensor.shape)}\\0".encode())
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        for part in flat.split(_BYTES):
            digest.update(part.numpy().data)
    return digest.hexdigest()


def save_second_moments(
    path: str | os.PathLike[str], sites: Sequence[tuple[Sequence[str], GramStatistic]], *, digest: str
) -> None:
    """Write a ``covariance_file``.

    Args:
        path: of the file; missing folders are made, an existing file is replaced in one step.
        sites: names of the layers that share an input, and its statistic.
        digest: of the model and the data, see `tensors_digest`.

    Raises:
        OutputError: it cannot be written.
    """
    tensors = {
        f"{index}.{part}": tensor.cpu()
        for index, (_, statistic) in enumerate(sites)
        for part, tensor in statistic.state().items()
    }
    _write(Path(path), _MOMENTS, tensors, digest, [list(names) for names, _ in sites])


def load_second_moments(path: str | os.PathLike[str], *, digest: str) -> list[tuple[tuple[str, ...], GramStatistic]]:
    """Read a ``covariance_file``: sites in the order in which they were written.

    Raises:
        MissingFileError: there is none.
        ArtefactError: it is no such file, or broken; PEFT's pickles are not read.
        VerificationError: it was computed from another model or other data.
    """
    tensors, names = _read(Path(path), _MOMENTS, digest)
    found = []
    try:
        for index, site in enumerate(names):
            prefix = f"{index}."
            state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            found.append((tuple(site), GramStatistic.from_state(state)))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtefactError(f"'{path}' lacks a part of its second moments ({error!r}); delete it") from error
    return found


def save_spectra(path: str | os.PathLike[str], spectra: Mapping[str, Spectrum], *, digest: str) -> None:
    """Write a ``cache_file``.

    Args:
        path: of the file; missing folders are made, an existing file is replaced in one step.
        spectra: layer -> its spectrum.
        digest: of the model, the data and the method with its options.

    Raises:
        OutputError: it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    header: dict[str, Any] = {}
    for name, spectrum in spectra.items():
        parts = {"directions": spectrum.directions, "values": spectrum.values, "left": spectrum.left}
        # Of their own: safetensors refuses tensors that share memory, and spectra are cut from one another.
        tensors |= {f"{name}.{part}": t.cpu().contiguous().clone() for part, t in parts.items() if t is not None}
        header[name] = {
            "shape": spectrum.shape,
            "total": spectrum.total,
            "certificate": spectrum.certificate.as_dict(),
        }
    _write(Path(path), _SPECTRA, tensors, digest, header)


def load_spectra(path: str | os.PathLike[str], *, digest: str) -> dict[str, Spectrum]:
    """Read a ``cache_file``: layer -> spectrum, in the order in which they were written.

    Raises:
        MissingFileError: there is none.
        ArtefactError: it is no such file, or broken; PEFT's pickles are not read.
        VerificationError: it was computed from another model, other data, or with other options.
    """
    tensors, header = _read(Path(path), _SPECTRA, digest)
    found = {}
    try:
        for name, entry in header.items():
            found[name] = Spectrum(
                directions=tensors[f"{name}.directions"],
                values=tensors[f"{name}.values"],
                total=float(entry["total"]),
                shape=tuple(entry["shape"]),
                certificate=Certificate(**entry["certificate"]),
                left=tensors.get(f"{name}.left"),
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"'{path}' lacks a part of its spectra ({error!r}); delete it") from error
    return found


def _write(path: Path, kind: str, tensors: Mapping[str, torch.Tensor], digest: str, content: object) -> None:
    header = {"kind": kind, "format": _FORMAT, "digest": digest, "content": json.dumps(content)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror or error}") from error
    with new_file(path) as unfinished:
        save_file(dict(tensors), unfinished, metadata=header)


def _read(path: Path, kind: str, digest: str) -> tuple[dict[str, torch.Tensor], Any]:
    if not path.is_file():
        raise MissingFileError(f"there is no file '{path}'")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if header.get("kind") != kind or header.get("format") != _FORMAT:
                raise ArtefactError(
                    f"'{path}' holds {header.get('kind', 'something else')!r} (format {header.get('format')}), but "
                    f"{kind!r} (format {_FORMAT}) were expected; name another file, or delete it"
                )
            if header.get("digest") != digest:
                raise VerificationError(
                    f"'{path}' was computed from another model, other data or other options (digest "
                    f"{str(header.get('digest'))[:12]}, here {digest[:12]}); delete it, or name another file"
                )
            # keys() of an open file: iterating over the file itself is not supported
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(header["content"])  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, (ArtefactError, VerificationError)):
            raise
        raise ArtefactError(
            f"'{path}' is no readable safetensors file ({error}); pickled files, such as PEFT's, are not read: "
            "delete it, or name another file"
        ) from error
