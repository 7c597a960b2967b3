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

from smartinit.errors import ArgumentError, ArtefactError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

DTYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
        torch.complex64: "C64",
    }
)
_TORCH = {name: dtype for dtype, name in DTYPES.items()}
MAX_HEADER = 64 << 20
"""Longest header that is read, in bytes."""
_PIECE = 16 << 20
_METADATA = "__metadata__"


def tensor_chunks(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The file's bytes as buffers: first the header, then every tensor in pieces of at most 16 MiB.

    Args:
        tensors: any device and layout; those not on the CPU pass through it one at a time.
        metadata: text by text.

    Raises:
        ArgumentError: a value that is no dense tensor, or whose dtype the format does not have.
    """
    given: Mapping[Any, Any] = tensors
    for name, tensor in given.items():
        if not isinstance(name, str) or name == _METADATA:
            raise ArgumentError(f"a tensor's name must be text other than {_METADATA!r}, not {name!r}")
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise ArgumentError(f"'{name}' is a {type(tensor).__name__}; expected a dense tensor with values")
        if tensor.dtype not in DTYPES:
            raise ArgumentError(f"'{name}' is of {tensor.dtype}, which safetensors files do not have")
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
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.numel():
            data = flat.view(torch.uint8).cpu()
            for piece in data.split(_PIECE):
                yield piece.numpy().data


def map_tensors(path: Path, size: int) -> tuple[memoryview, dict[str, torch.Tensor]]:
    """The file in memory without being read: its bytes, and the tensors in them.

    The map is private: writing to a tensor changes no file.

    Args:
        path: of the file.
        size: its length in bytes.

    Raises:
        ArtefactError: no safetensors file, or one that contradicts itself.
        OSError, RuntimeError: the file cannot be mapped.
    """
    if size < 8:  # noqa: PLR2004 - the length of the header's length
        raise ArtefactError(f"'{path}' has {size} bytes, which is no safetensors file")
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,))
    start, header = parse_header(whole[: min(size, 8 + MAX_HEADER)].numpy().data, size, str(path))
    header.pop(_METADATA, None)
    found = {}
    for name, entry in header.items():
        dtype, begin = _TORCH[entry["dtype"]], start + entry["data_offsets"][0]
        width = torch.empty(0, dtype=dtype).element_size()
        if begin % width == 0:
            view = torch.empty(0, dtype=dtype).set_(storage, begin // width, (math.prod(entry["shape"]),), (1,))
            view = view.reshape(entry["shape"])
        else:  # other writers need not align
            view = whole[begin : start + entry["data_offsets"][1]].clone().view(dtype).reshape(entry["shape"])
        found[name] = view
    return whole.numpy().data, found


def parse_header(data: Any, size: int, where: str) -> tuple[int, dict[str, Any]]:  # noqa: ANN401 - a buffer
    """Where the tensors' bytes start, and the header, every statement of which has been checked.

    Args:
        data: the file's first bytes, with the whole header in them.
        size: of the file, bytes.
        where: the file's name, for messages.

    Raises:
        ArtefactError: it is none, or contradicts itself.
    """
    (length,) = struct.unpack("<Q", bytes(data[:8]))
    if length > min(MAX_HEADER, size - 8):
        raise ArtefactError(
            f"'{where}' is no safetensors file, or a part of one: its header would have {length} bytes; delete it"
        )
    try:
        header = json.loads(bytes(data[8 : 8 + length]).decode(), object_pairs_hook=_unique)
        problem = _problem(header, size - 8 - length)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, OverflowError) as error:
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
    entries = dict(header)
    metadata = entries.pop(_METADATA, {})
    if not all(isinstance(text, str) for text in metadata.values()):
        return "metadata that is no text"
    spans = []
    for name, entry in entries.items():
        if entry["dtype"] not in _TORCH:
            return f"tensor {name!r} has an unknown dtype"
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            return f"tensor {name!r} has sizes that are no counts"
        if end - begin != math.prod(shape) * torch.empty(0, dtype=_TORCH[entry["dtype"]]).element_size():
            return f"tensor {name!r} has another length than its shape"
        spans.append((begin, end))
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if any(begin != last for (begin, _), last in zip(spans, ends, strict=False)) or ends[-1] != size:
        return "tensors that overlap, or leave bytes out"
    return None
