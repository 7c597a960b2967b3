"""The sha256 of one tensor: of what it is (dtype, shape) and of its bytes, wherever and however it lies."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from smartinit.errors import ModelError
from smartinit.formats.safetensors_header import content_head
from smartinit.formats.tensor_file import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_PIECE = 1 << 23  # bytes that are copied at once: small beside any model, large beside the cost of a call
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


def tensor_digest(tensor: torch.Tensor) -> str:
    """Sha256 over dtype, shape and bytes: 64 hexadecimal digits.

    Equal to `smartinit.store.model_files`' for the same tensor in a safetensors file. Bytes are little endian and in
    row-major order. What a quantisation library packs (``quant_state``, or a subclass with ``__tensor_flatten__``) is
    hashed as packed, with everything that belongs to it. A sharded DTensor is gathered: all its ranks must call this.

    Cost: one pass over the bytes, `_PIECE` of memory at a time (a sharded DTensor: its own size).

    Raises:
        ModelError: a tensor without numbers (meta, uninitialised, partitioned), or with numbers that cannot be seen.
    """
    why = without_numbers(tensor)
    if why:
        raise ModelError(f"a {type(tensor).__name__} has no digest: it {why}")
    if hasattr(tensor, "placements") and hasattr(tensor, "full_tensor"):  # DTensor, which need not be imported
        return tensor_digest(tensor.detach().full_tensor())  # type: ignore[attr-defined]
    packed = _packed(tensor)
    if packed is not None:
        return hashlib.sha256(json.dumps(packed, sort_keys=True).encode()).hexdigest()
    sha = hashlib.sha256(content_head(dtype_name(tensor.dtype), tensor.shape))
    for piece in pieces(_plain(tensor)):
        sha.update(piece.data)
    return sha.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors names it; torch's own name where that has none."""
    return DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


def without_numbers(tensor: torch.Tensor) -> str:
    """What is wrong with a tensor that holds no numbers to read, as the end of a sentence; empty if it does."""
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        return "gets its shape from the first batch; run the model once"
    if tensor.is_meta:
        return "lies on the meta device; load its weights first"
    if getattr(tensor, "ds_numel", 0) and not tensor.numel():
        return "is partitioned by DeepSpeed; gather it first"
    if tensor.is_quantized or tensor.layout != torch.strided:
        return f"is stored as {'quantised' if tensor.is_quantized else tensor.layout}; make it an ordinary one"
    return ""


def pieces(tensor: torch.Tensor) -> Iterator[NDArray[np.uint8]]:
    """The bytes of an ordinary tensor in row-major order, little endian, from any device, in pieces."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return
    if tensor.is_contiguous():
        flat = tensor.as_strided((tensor.numel(),), (1,))  # reshape keeps odd strides of single elements
        step = max(_PIECE // tensor.element_size(), 1)
        for start in range(0, len(flat), step):
            yield _bytes(flat[start : start + step])
    elif size <= _PIECE:
        yield _bytes(tensor.reshape(-1))
    else:
        step = max(_PIECE * len(tensor) // size, 1)
        for start in range(0, len(tensor), step):
            part = tensor[start : start + step]
            yield from pieces(part.contiguous() if part.numel() * part.element_size() <= _PIECE else part[0])


def tensor_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """All bytes of a tensor, ``(bytes,)``, as `tensor_digest` hashes them.

    Raises:
        ModelError: there are none, or they are not an ordinary tensor's.
    """
    why = without_numbers(tensor)
    if why:
        raise ModelError(f"a {type(tensor).__name__} has no bytes: it {why}")
    found = list(pieces(_plain(tensor)))
    return np.concatenate(found) if found else np.empty(0, np.uint8)


def described(value: object) -> str:
    """The text of a value that JSON has no form for, without addresses in memory."""
    return _ADDRESS.sub("0x", repr(value))


def _bytes(flat: torch.Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = flat.cpu().contiguous().view(torch.uint8).numpy()
    if sys.byteorder == "big":
        width = flat.element_size() // (2 if flat.is_complex() else 1)
        found = np.ascontiguousarray(found.reshape(-1, width)[:, ::-1]).reshape(-1)
    return found


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as an ordinary tensor, without gradient.

    Raises:
        ModelError: a kind of tensor that is none.
    """
    kind = type(tensor)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ModelError(
            f"a {kind.__name__} of shape {tuple(tensor.shape)} has no digest: it keeps its numbers in its own way and "
            "has no __tensor_flatten__ to show them"
        )
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - the documented way past __torch_function__
        return tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg()


def _packed(tensor: torch.Tensor) -> dict[str, Any] | None:
    """Everything that a quantised tensor consists of, as JSON values; None for an ordinary one."""
    state = getattr(tensor, "quant_state", None)
    if state is not None:  # bitsandbytes' four bits
        held = state.as_dict() if hasattr(state, "as_dict") else vars(state)
        whole = _plain(tensor)
        return {"packed": tensor_digest(whole), "state": {str(key): _content(value) for key, value in held.items()}}
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None:
        return None
    names, context = flatten(tensor)
    inner = {name: tensor_digest(getattr(tensor, name)) for name in names}
    return {"kind": type(tensor).__name__, "shape": list(tensor.shape), "inner": inner, "context": described(context)}


def _content(value: object) -> str:
    return tensor_digest(value) if isinstance(value, torch.Tensor) else described(value)
