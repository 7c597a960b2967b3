"""safetensors as a stream of bytes, and as a memory map: equal tensors make equal files.

`safetensors.torch.save_file` orders metadata at random and needs all bytes before the first can be hashed. Here the
header is sorted, so that a file's digest says what is in it, and pieces of the tensors follow one by one.
"""

from __future__ import annotations

import json
import math
import struct
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from smartinit.errors import ArgumentError, ArtefactError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

_NAMED = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",  # since torch 2.7
    "U64": "uint64",
    "I64": "int64",
    "U32": "uint32",
    "I32": "int32",
    "U16": "uint16",
    "I16": "int16",
    "U8": "uint8",
    "I8": "int8",
    "BOOL": "bool",
    "C64": "complex64",
}
_TORCH: dict[str, torch.dtype] = {name: getattr(torch, of) for name, of in _NAMED.items() if hasattr(torch, of)}
DTYPES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in _TORCH.items()})
MAX_HEADER = 32 << 20
"""Longest header that is read or written, in bytes: some 200,000 tensors."""
_PIECE = 4 << 20
_METADATA = "__metadata__"
_MOST_DIMENSIONS = 64
_LARGEST = 2**63  # what torch counts with


def tensor_chunks(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The file's bytes as buffers: first the header, then every tensor in pieces of at most 4 MiB.

    Args:
        tensors: any device and layout; those not on the CPU pass through it one at a time.
        metadata: text by text.

    Raises:
        ArgumentError: a value that is no dense tensor, or whose dtype the format does not have; or more names than
            would be read again.
    """
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
    # Wide numbers first: every tensor starts at a multiple of its own width.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {}
    if metadata:
        header[_METADATA] = dict(sorted(metadata.items()))
    start = 0
    for name, tensor in ordered:
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ArgumentError(
            f"{len(ordered)} tensors need a header of {len(text)} bytes; at most {MAX_HEADER} are read, so store fewer"
        )
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.numel():
            data = flat.view(torch.uint8).cpu()
            for piece in data.split(_PIECE):
                yield piece.numpy().data


def _check_storable(name: Any, tensor: Any) -> None:  # noqa: ANN401 - what a caller gives
    if not isinstance(name, str) or name == _METADATA:
        raise ArgumentError(f"a tensor's name must be text other than {_METADATA!r}, not {shown(name)}")
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ArgumentError(f"{shown(name)} is a {type(tensor).__name__}; expected a dense tensor with values")
    if tensor.dtype not in DTYPES:
        raise ArgumentError(f"{shown(name)} is of {tensor.dtype}, which safetensors files do not have")


def map_file(path: Path, size: int) -> torch.Tensor:
    """A file's bytes, uint8 ``(size,)``, without being read; writing to them changes no file.

    Raises:
        OSError, RuntimeError: it cannot be mapped, or is shorter.
    """
    # not through Python's mmap, which would keep a descriptor for every map
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,))


def tensors_in(whole: torch.Tensor, where: str) -> dict[str, torch.Tensor]:
    """The tensors in a file's bytes, which they share.

    Args:
        whole: uint8, all of the file.
        where: the file's name, for messages.

    Raises:
        ArtefactError: no safetensors file, or one that contradicts itself.
    """
    size = len(whole)
    start, header = parse_header(whole[: min(size, 8 + MAX_HEADER)].numpy().data, size, where)
    header.pop(_METADATA, None)
    storage: Any = whole.untyped_storage()
    found = {}
    try:
        for name, entry in header.items():
            dtype, shape = _TORCH[entry["dtype"]], entry["shape"]
            begin, end = (start + place for place in entry["data_offsets"])
            if begin % dtype.itemsize == 0:
                # not a view of `whole`: writing to one tensor would count as a change of all
                found[name] = torch.empty(0, dtype=dtype).set_(storage, begin // dtype.itemsize, shape)  # type: ignore[call-overload]
            else:  # other writers need not align
                found[name] = whole[begin:end].clone().view(dtype).reshape(shape)
    except (RuntimeError, OverflowError) as error:  # no numbers in it, but strides that overflow
        raise ArtefactError(f"'{where}' is a broken safetensors file (tensor {shown(name)}); delete it") from error
    return found


def places_for(
    read: Callable[[int], bytes], size: int, where: str, into: Mapping[str, torch.Tensor] | None = None
) -> tuple[bytes, list[memoryview], dict[str, torch.Tensor]]:
    """Where the bytes of a file belong, if its tensors are to be read into memory of one's own.

    Args:
        read: gives the file's next bytes, as many as it is asked for.
        size: of the file, bytes.
        where: the file's name, for messages.
        into: of the names, shapes and dtypes in the file, on the CPU and contiguous; None: new ones.

    Returns:
        The file up to the first tensor; the memory of the tensors in the file's order; the tensors.

    Raises:
        ArtefactError: no safetensors file.
        ArgumentError: other tensors than those of ``into``.
    """
    content = read(8)
    if len(content) == 8:  # noqa: PLR2004 - the length of a length
        content += read(min(struct.unpack("<Q", content)[0], MAX_HEADER, size))
    start, header = parse_header(content, size, where)
    header.pop(_METADATA, None)
    if into is not None and header.keys() != into.keys():
        odd = next(iter(header.keys() ^ into.keys()))
        raise ArgumentError(f"'{where}' and the tensors to read it into differ in the names, such as {shown(odd)}")
    places, tensors = [], {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if into is None:
            tensor = torch.empty(entry["shape"], dtype=_TORCH[entry["dtype"]])
        else:
            tensor = into[name]
            _check_place(name, tensor, entry, where)
        tensors[name] = tensor
        if tensor.numel():
            places.append(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return content[:start], places, tensors


def _check_place(name: str, tensor: torch.Tensor, entry: dict[str, Any], where: str) -> None:
    dtype, shape = _TORCH[entry["dtype"]], tuple(entry["shape"])
    plain = tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    if not plain or tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ArgumentError(
            f"tensor {shown(name)} of '{where}' is {dtype} {shape}, which cannot be read into one that is "
            f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; give a contiguous one like it"
        )


def map_tensors(path: Path, size: int) -> tuple[memoryview, dict[str, torch.Tensor]]:
    """The file in memory without being read: its bytes, and the tensors in them.

    Args:
        path: of the file.
        size: its length in bytes.

    Raises:
        ArtefactError: no safetensors file, or one that contradicts itself.
        OSError, RuntimeError: the file cannot be mapped.
    """
    whole = map_file(path, size) if size else torch.empty(0, dtype=torch.uint8)
    return whole.numpy().data, tensors_in(whole, str(path))


def parse_header(data: Any, size: int, where: str) -> tuple[int, dict[str, Any]]:  # noqa: ANN401 - a buffer
    """Where the tensors' bytes start, and the header, every statement of which has been checked.

    Args:
        data: the file's first bytes, with the whole header in them.
        size: of the file, bytes.
        where: the file's name, for messages.

    Raises:
        ArtefactError: it is none, or contradicts itself.
    """
    length = struct.unpack("<Q", bytes(data[:8]))[0] if len(data) >= 8 else size  # noqa: PLR2004 - the length of a length
    if length > min(MAX_HEADER, size - 8):
        raise ArtefactError(
            f"'{where}' is no safetensors file, or a part of one: it has {size} bytes, and its header would have "
            f"{length} (at most {MAX_HEADER} are read); delete it"
        )
    try:
        header = json.loads(bytes(data[8 : 8 + length]).decode(), object_pairs_hook=_unique)
        problem = _problem(header, size - 8 - length)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, MemoryError) as error:
        problem = f"{type(error).__name__} in its header"
    if problem:
        raise ArtefactError(f"'{where}' is a broken safetensors file ({problem}); delete it")
    return 8 + length, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _problem(header: dict[str, Any], size: int) -> str | None:
    """What is wrong with a header over ``size`` bytes of tensors."""
    metadata = header.get(_METADATA, {})
    if not all(isinstance(text, str) for text in metadata.values()):
        return "metadata that is no text"
    entries = {name: entry for name, entry in header.items() if name != _METADATA}
    for name, entry in entries.items():
        problem = _tensor_problem(entry)
        if problem:
            return f"tensor {shown(name)} has {problem}"
    reached = 0
    for begin, end in sorted(entry["data_offsets"] for entry in entries.values()):
        if begin != reached:
            break
        reached = end
    else:
        if reached == size:
            return None
    return "tensors that overlap, or leave bytes out"


def _tensor_problem(entry: dict[str, Any]) -> str | None:
    dtype, shape, (begin, end) = _TORCH.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype is None:
        return "an unknown dtype"
    numbers = (*shape, begin, end)
    if type(shape) is not list or len(shape) > _MOST_DIMENSIONS or {*map(type, numbers)} != {int}:
        return "sizes that are no counts"
    most = dtype.itemsize * math.prod(max(size, 1) for size in shape)  # with a zero in it, strides may still overflow
    if min(numbers) < 0 or max(numbers) >= _LARGEST or most >= _LARGEST:
        return "sizes that no tensor has"
    if end - begin != math.prod(shape) * dtype.itemsize:
        return "another length than its shape"
    return None
