"""Folders with a Megatron adapter: shards as the ranks had them, and one file that says how they fit together.

::

    adapter/
      megatron_adapter.json             configuration, and which file holds which part of which tensor
      shard-00000-of-00002.safetensors  what rank 0 of 2 had to write
      shard-00001-of-00002.safetensors

Keys are Megatron Bridge's, with the names of the whole model (``decoder.layers.0.self_attention.linear_qkv.adapter.
linear_in.weight``). Shapes are those of a single process, in its order of rows (see `smartinit.formats.rows`): the
folder loads at another number of ranks than it was saved at. The JSON is written last: a folder without it is not
finished.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from smartinit.errors import ArtefactError, ConfigError, MissingFileError, UnknownNameError, VerificationError
from smartinit.formats.files import new_folder, write_file
from smartinit.formats.megatron_layout import DTYPES, Layout, Piece, is_gated, layout_of, parts, shared_dim
from smartinit.formats.peft import read_object
from smartinit.formats.tensors import file_content

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

MARKER = "megatron_adapter.json"
FORMAT = "smartinit-megatron-1"
PEFT_TYPES = ("lora", "dora", "canonical_lora")
_MOST_BYTES = 2**28  # of JSON: about a million pieces
_LARGEST = 2**40  # dim, and alpha
_STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def shard_file(rank: int, size: int) -> str:
    """The name of one rank's file."""
    return f"shard-{rank:05d}-of-{size:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One rank's file: tensors under their keys, bitwise as they are.

    Raises:
        VerificationError: one of them holds NaN or Inf.
        ConfigError: one of them has a dtype that the format has not.
        OutputError: it cannot be written.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ConfigError(f"'{key}' is {tensor.dtype}; expected one of {', '.join(DTYPES)}")
        if not torch.isfinite(tensor).all():
            raise VerificationError(f"'{key}' holds NaN or Inf; it is not written")
    kept = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    write_file(path, file_content(kept, {"format": "pt"}))


def write_marker(folder: Path, config: Mapping[str, Any], layouts: Mapping[str, Layout]) -> None:
    """The JSON, which makes a folder complete once all shards are written.

    Args:
        folder: with the shards.
        config: ``peft_type``, ``dim``, ``alpha``, ``target_modules`` and whatever else is worth to know.
        layouts: by key.

    Raises:
        ConfigError: the configuration lacks one of these, or the layouts do not cover their tensors.
        OutputError: it cannot be written.
    """
    path = folder / MARKER
    try:
        head = json.dumps({**config, "format": FORMAT}, indent=1, allow_nan=False).removesuffix("\n}")
        lines = [f"  {json.dumps(key)}: {json.dumps(layouts[key].values())}" for key in sorted(layouts)]
        content = "\n".join([f'{head},\n "tensors": {{', ",\n".join(lines), " }", "}", ""]).encode()
        _checked(path, json.loads(content))
    except (ArtefactError, TypeError, ValueError) as error:
        raise ConfigError(f"this adapter cannot be written: {error}") from error
    write_file(path, content)


def write_folder(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    tensor_parallel: int = 1,
    force: bool = False,
) -> Path:
    """An adapter folder from whole tensors.

    Args:
        folder: where; see `smartinit.formats.files.new_folder`.
        tensors: by key, of the shapes of a single process.
        config: see `write_marker`; ``gated_linear_unit``: whether linear_fc1 is a gate and an up projection.
        tensor_parallel: how many files, each with what one of so many ranks holds; what they cannot share evenly is in
            the first.
        force: replace an existing adapter folder.

    Returns:
        The folder's path.

    Raises:
        ConfigError, VerificationError: see `write_marker` and `write_shard`.
        OutputError: the folder exists already, or cannot be written.
    """
    size = tensor_parallel
    if size < 1:
        raise ConfigError(f"tensor_parallel={size} cannot be: expected at least 1")
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(size)]
    layouts = {}
    for key, tensor in tensors.items():
        gated = is_gated(key, config)
        dim = shared_dim(key, tensor.shape, size, gated=gated)
        pieces: list[Piece] = []
        for rank in range(size if dim is not None else 1):
            own = parts(tensor.shape, dim, rank, size, gated=gated)
            cuts = [tensor[tuple(slice(*pair) for pair in ranges)] for ranges, _ in own]
            files[rank][key] = cuts[0] if dim is None else torch.cat(cuts, dim)
            pieces += [Piece(shard_file(rank, size), ranges, at) for ranges, at in own]
        layouts[key] = Layout(tuple(tensor.shape), tensor.dtype, tuple(pieces))
    with new_folder(folder, force=force, marker=MARKER) as unfinished:
        for rank, content in enumerate(files):
            if content:
                write_shard(unfinished / shard_file(rank, size), content)
        write_marker(unfinished, config, layouts)
    return Path(folder)


class ShardedFolder:
    """An adapter folder, of which nothing is read but what is asked for.

    Attributes:
        path: where it is.
        config: all that its JSON says besides ``tensors``.
        layouts: by key, where each tensor's parts are.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], layouts: Mapping[str, Layout]) -> None:
        self.path, self.config, self.layouts = path, config, layouts
        self._files: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ShardedFolder:
        """A folder whose JSON has been checked and whose files are there; no tensor is read.

        Raises:
            MissingFileError: there is no such folder, or a file of it is missing.
            ArtefactError: it is not finished, not an adapter of Megatron, of another format, or broken.

        Cost: O(p·log p) for p pieces.
        """
        path = Path(folder)
        marker = path / MARKER
        if not path.is_dir():
            raise MissingFileError(f"there is no folder '{path}'; name a folder with {MARKER} in it")
        try:
            if marker.stat().st_size > _MOST_BYTES:
                raise ArtefactError(f"'{marker}' has more than {_MOST_BYTES >> 20} MiB, so it is no {MARKER}")
            content = marker.read_bytes()
        except FileNotFoundError as error:
            has = "is not finished (was saving it interrupted?)" if list(path.glob("shard-*")) else "is no such folder"
            raise MissingFileError(f"'{marker}' is missing, so '{path}' {has}; save the adapter again") from error
        except OSError as error:
            raise ArtefactError(f"cannot read '{marker}': {error.strerror or error}") from error
        config, layouts = _checked(marker, read_object(marker, content))
        for name in sorted({piece.file for layout in layouts.values() for piece in layout.pieces}):
            if not (path / name).is_file():
                raise MissingFileError(f"'{path / name}' is missing; copy the whole folder, or save the adapter again")
        return cls(path, config, layouts)

    def keys(self) -> Iterator[str]:
        """The names of all tensors, sorted."""
        return iter(sorted(self.layouts))

    def __contains__(self, key: object) -> bool:
        return key in self.layouts

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a whole tensor.

        Raises:
            UnknownNameError: there is no such key.
        """
        return self._layout(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Of a tensor.

        Raises:
            UnknownNameError: there is no such key.
        """
        return self._layout(key).dtype

    def read(self, key: str, ranges: Sequence[tuple[int, int]] | None = None) -> torch.Tensor:
        """A tensor or a part of one, bitwise as it was saved, on the CPU.

        Args:
            key: of it.
            ranges: start and stop along each dimension; None: all of it.

        Raises:
            UnknownNameError: there is no such key.
            ConfigError: ranges beyond its shape.
            ArtefactError: a file is broken, or holds something else than the JSON says.
            VerificationError: NaN or Inf.

        Cost: what overlaps is read, and nothing else.
        """
        layout = self._layout(key)
        wanted = tuple((0, n) for n in layout.shape) if ranges is None else tuple((int(a), int(b)) for a, b in ranges)
        fine = len(wanted) == len(layout.shape)
        fine = fine and all(0 <= a < b <= n for (a, b), n in zip(wanted, layout.shape, strict=True))
        if not fine:
            raise ConfigError(f"'{key}' of shape {layout.shape} has no part {[list(pair) for pair in wanted]}")
        overlapping = []
        for piece in layout.pieces:
            pairs = list(zip(piece.ranges, wanted, strict=True))
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in pairs]
            if all(start < stop for start, stop in common):
                overlapping.append((piece, common, self._held(key, layout, piece)))
        out = torch.empty([stop - start for start, stop in wanted], dtype=layout.dtype)  # the files have as much
        for piece, common, held in overlapping:
            cuts = zip(common, piece.ranges, piece.at, strict=True)
            inside = tuple(slice(a - first + at, b - first + at) for (a, b), (first, _), at in cuts)
            into = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, wanted, strict=True))
            try:
                out[into] = held[inside]
            except (SafetensorError, OSError) as error:
                raise self._broken(key, self.path / piece.file, error) from error
        if not torch.isfinite(out).all():
            raise VerificationError(f"'{key}' in '{self.path}' holds NaN or Inf; load another checkpoint")
        return out

    def read_shard(self, key: str, dim: int | None, rank: int, size: int, *, gated: bool = False) -> torch.Tensor:
        """What one of ``size`` ranks holds of a tensor.

        Args:
            key: of the tensor.
            dim: along which they share it; None: not at all.
            rank: which of them.
            size: how many.
            gated: see `smartinit.formats.rows`.

        Raises:
            ConfigError: it cannot be shared evenly.
            UnknownNameError, ArtefactError, VerificationError: see `read`.
        """
        cuts = [self.read(key, ranges) for ranges, _ in parts(self.shape(key), dim, rank, size, gated=gated)]
        return cuts[0] if len(cuts) == 1 else torch.cat(cuts, dim or 0)

    def _layout(self, key: str) -> Layout:
        if key not in self.layouts:
            raise UnknownNameError(f"'{self.path}' holds no '{key}'")
        return self.layouts[key]

    def _broken(self, key: str, path: Path, error: Exception) -> ArtefactError:
        return ArtefactError(
            f"cannot read '{key}' from '{path}' ({error}); the file is broken or of another adapter, so copy the whole "
            "folder again"
        )

    def _held(self, key: str, layout: Layout, piece: Piece) -> Any:  # noqa: ANN401 - a slice of safetensors
        """A file's tensor, of which only the header was looked at."""
        name = piece.file
        path = self.path / name
        try:
            if name not in self._files:
                self._files[name] = safe_open(path, framework="pt")  # mapped: pages are read when looked at
            held = self._files[name].get_slice(piece.key or key)
            shape, dtype = tuple(held.get_shape()), held.get_dtype()
            least = layout.held_shape(piece)
            fits = len(shape) == len(least) and all(n <= m for n, m in zip(least, shape, strict=True))
            if _STORED.get(dtype) != layout.dtype or not fits:
                raise ArtefactError(
                    f"'{path}' holds '{key}' of shape {shape} and {dtype}, where {MARKER} says {least} and "
                    f"{layout.dtype}; the files are not of one adapter, so copy the whole folder again"
                )
        except (SafetensorError, OSError) as error:
            raise self._broken(key, path, error) from error
        return held


def _checked(path: Path, values: dict[str, object]) -> tuple[dict[str, Any], dict[str, Layout]]:
    """Configuration and layouts of the JSON.

    Raises:
        ArtefactError: something else.
    """
    if values.get("format") != FORMAT:
        raise ArtefactError(
            f"'{path}' has format {values.get('format')!r}, but this version reads {FORMAT!r}; upgrade smartinit"
        )
    kind, dim, alpha, targets = (values.get(name) for name in ("peft_type", "dim", "alpha", "target_modules"))
    others = values.get("exclude_modules") or values.get("canonical_mapping")  # then there need be no targets
    faults = {
        "peft_type": kind not in PEFT_TYPES,
        "dim": not _is_dim(dim),
        "alpha": not _is_alpha(alpha),
        "target_modules": not isinstance(targets, list)
        or not all(isinstance(name, str) for name in targets)
        or not (targets or others),
        "layers": not isinstance(values.get("layers", {}), dict),
    }
    for name, wrong in faults.items():
        if wrong:
            raise ArtefactError(f"'{path}' says {name}={_short(values.get(name))}, which is no {name} of an adapter")
    layers = values.get("layers", {})
    for layer, own in layers.items() if isinstance(layers, dict) else ():
        entry = own if isinstance(own, dict) else {"dim": None}
        if not _is_dim(entry.get("dim", dim)) or not _is_alpha(entry.get("alpha", alpha)):
            raise ArtefactError(f"'{path}' says {_short(own)} of layer '{layer}'; expected a dim and an alpha above 0")
    tensors = values.get("tensors")
    if not isinstance(tensors, dict) or not tensors:
        raise ArtefactError(f"'{path}' lists no tensors")
    layouts = {key: layout_of(key, value, str(path)) for key, value in tensors.items()}
    return {key: value for key, value in values.items() if key != "tensors"}, layouts


def _is_dim(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST


def _is_alpha(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= _LARGEST


def _short(value: object) -> str:
    """For messages; numbers of thousands of digits have no decimal form in Python."""
    try:
        return f"{value!r:.200}"
    except ValueError:
        return "a number of thousands of digits"
