"""The tensors of ``adapter_model.safetensors``: PEFT's keys and shapes for every kind of layer.

In memory factors are two matrices, ``a (r, in)`` and ``b (out, r)``. In the file (keys and shapes of PEFT 0.21.2):

- Linear, Conv1D: ``<module>.lora_A.weight (r, in)``, ``<module>.lora_B.weight (out, r)``
- convolution: the same keys, ``(r, channels, *kernel)`` and ``(out, r, 1, …)``; ``in = channels·∏ kernel``
- Embedding: ``<module>.lora_embedding_A (r, rows)``, ``<module>.lora_embedding_B (width, r)``
- DoRA: ``<module>.lora_magnitude_vector (out,)``, of a convolution ``(1, out, 1, …)``

Everything else (biases, modules_to_save, trained tokens) is carried along by its key, unread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors

from smartinit.errors import ArtefactError, ConfigError, VerificationError
from smartinit.factors import Factors
from smartinit.formats.tensor_file import tensor_chunks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PREFIX = "base_model.model."
Kind = Literal["linear", "conv1d", "convolution", "embedding"]

_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_MAGNITUDE = ".lora_magnitude_vector"
_BROKEN = (SafetensorError, ValueError, KeyError, RuntimeError)  # what safetensors raises for broken files
_PART = {_A: "a", _B: "b", _EMBEDDING_A: "a", _EMBEDDING_B: "b", _MAGNITUDE: "magnitude"}


@dataclass(frozen=True)
class Form:
    """How the file shows a layer's two matrices.

    Attributes:
        embedding: under an embedding's keys.
        kernel: sizes of a convolution's kernel; empty for every other layer.
    """

    embedding: bool = False
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class StoredTensors:
    """What a file holds.

    Attributes:
        factors: module name -> matrices, and DoRA's magnitude where there is one, in the file's order.
        forms: module name -> how the file shows them.
        others: every other tensor, by its key in the file.
        metadata: what the file's header says besides, see `smartinit.formats.stamp`.
    """

    factors: Mapping[str, Factors]
    forms: Mapping[str, Form]
    others: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def stored_tensors(
    factors: Mapping[str, Factors],
    *,
    dtype: torch.dtype | None = torch.float32,
    forms: Mapping[str, Form] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of the file by PEFT's keys: rounded once to ``dtype``, each with its own memory.

    Magnitudes are few and do not cancel, so they are never rounded below float32.

    Args:
        factors: module name -> factors; those of rank 0 are left out.
        dtype: of the matrices in the file; None: what each of them has.
        forms: module name -> form, for layers that are not linear.

    Raises:
        VerificationError: a value is not finite, before or after rounding.
        ConfigError: a form does not fit its matrices.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in factors.items():
        if pair.rank == 0:
            continue
        form = (forms or {}).get(name, Form())
        for suffix, tensor in shaped(name, pair, form).items():
            rounded = (
                torch.promote_types(tensor.dtype, torch.float32) if suffix == _MAGNITUDE else dtype or tensor.dtype
            )
            # A copy even where nothing is rounded: layers with a common input may share theirs, files may not.
            stored = tensor.detach().to(device="cpu", dtype=rounded, copy=True).contiguous()
            if not torch.isfinite(stored).all():
                raise VerificationError(
                    f"'{name}{suffix}' holds NaN or Inf as {str(rounded).removeprefix('torch.')}; it is not written"
                )
            tensors[f"{PREFIX}{name}{suffix}"] = stored
    return tensors


def file_content(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with these tensors: the same bytes whenever it is made.

    Args:
        tensors: by key, contiguous, each with its own memory.
        metadata: what the header says besides; PEFT wants ``format`` to be ``pt``.
    """
    return b"".join(tensor_chunks(tensors, metadata))


def read_tensors(path: Path, content: bytes) -> StoredTensors:
    """Everything in the file; ``path`` is for the errors.

    Raises:
        ArtefactError: truncated or broken; a matrix without its partner, or of a shape that no layer has.
    """
    try:
        tensors = load_tensors(content)
    except _BROKEN as error:
        raise ArtefactError(f"'{path}' is no readable safetensors file ({error}); it is broken or truncated") from error
    return sorted_tensors(path, tensors)


def open_tensors(path: Path) -> StoredTensors:
    """As `read_tensors`, but the tensors are windows into the file: nothing is in memory before it is looked at.

    Copy what is to be kept: in-place changes of the file by others would show, and cutting it short ends the process.

    Raises:
        OSError: it cannot be read.
        ArtefactError: as of `read_tensors`.
    """
    tensors, metadata = mapped_file(path)
    return replace(sorted_tensors(path, tensors), metadata=metadata)


def mapped_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A safetensors file: key -> window into it, in its order (see `open_tensors`), and its metadata.

    Raises:
        OSError: it cannot be read.
        ArtefactError: truncated or broken.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.offset_keys()}, file.metadata() or {}
    except _BROKEN as error:
        raise ArtefactError(f"'{path}' is no readable safetensors file ({error}); it is broken or truncated") from error


def sorted_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> StoredTensors:
    """The tensors of a file by what they are; ``path`` is for the errors.

    Raises:
        ArtefactError: a matrix without its partner, or of a shape that no layer has; no matrices at all.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        suffix = next((ending for ending in _PART if key.endswith(ending)), None)
        if suffix is None:
            others[key] = tensor
        elif not tensor.is_floating_point() or (suffix != _MAGNITUDE and tensor.ndim < 2):  # noqa: PLR2004 - a matrix
            raise ArtefactError(
                f"'{path}' holds '{key}' of shape {tuple(tensor.shape)} and {tensor.dtype}; expected only matrices "
                f"of floating-point numbers under names like ...{_A} and ...{_B}"
            )
        else:
            layers.setdefault(key.removeprefix(PREFIX).removesuffix(suffix), {})[suffix] = tensor
    if not layers:
        raise ArtefactError(f"'{path}' holds no adapter weights")
    read = {name: _matrices(path, name, parts) for name, parts in layers.items()}
    return StoredTensors(
        {name: pair for name, (pair, _) in read.items()}, {name: form for name, (_, form) in read.items()}, others
    )


def shaped(name: str, pair: Factors, form: Form) -> dict[str, torch.Tensor]:
    """Ending of the key in the file, after the layer's name -> tensor of the file's shape.

    Raises:
        ConfigError: a form does not fit its matrices.
    """
    if form.embedding:
        tensors = {_EMBEDDING_A: pair.a, _EMBEDDING_B: pair.b}
    elif form.kernel:
        channels, rest = divmod(pair.a.shape[1], math.prod(form.kernel))
        if rest:
            raise ConfigError(
                f"A of layer '{name}' has {pair.a.shape[1]} columns, which a kernel of {form.kernel} does not divide"
            )
        ones = (1,) * len(form.kernel)
        tensors = {
            _A: pair.a.reshape(pair.rank, channels, *form.kernel),
            _B: pair.b.reshape(*pair.b.shape, *ones),
        }
    else:
        tensors = {_A: pair.a, _B: pair.b}
    if pair.magnitude is not None:
        ones = (1,) * len(form.kernel)
        tensors[_MAGNITUDE] = pair.magnitude.reshape(1, -1, *ones) if form.kernel else pair.magnitude
    return tensors


def _matrices(path: Path, name: str, parts: Mapping[str, torch.Tensor]) -> tuple[Factors, Form]:
    """One layer's factors as matrices."""
    keys = parts.keys() - {_MAGNITUDE}
    if keys not in ({_A, _B}, {_EMBEDDING_A, _EMBEDDING_B}):
        raise ArtefactError(f"'{path}' holds only one of the two matrices of layer '{name}'")
    embedding = _EMBEDDING_A in keys
    a, b = (parts[_EMBEDDING_A], parts[_EMBEDDING_B]) if embedding else (parts[_A], parts[_B])
    kernel = tuple(a.shape[2:])
    fits = a.ndim == b.ndim and a.shape[0] == b.shape[1] > 0 and b.shape[2:].numel() == 1 and not (embedding and kernel)
    if not fits:
        raise ArtefactError(
            f"'{path}' gives layer '{name}' an A of shape {tuple(a.shape)} and a B of shape {tuple(b.shape)}; "
            "their rank must be the same and at least 1"
        )
    magnitude = parts.get(_MAGNITUDE)
    if magnitude is not None and magnitude.numel() != b.shape[0]:
        raise ArtefactError(
            f"'{path}' gives layer '{name}' a magnitude of shape {tuple(magnitude.shape)}, where its B has "
            f"{b.shape[0]} rows"
        )
    pair = Factors(a.flatten(1), b.flatten(1), magnitude=None if magnitude is None else magnitude.flatten())
    return pair, Form(embedding, kernel)
