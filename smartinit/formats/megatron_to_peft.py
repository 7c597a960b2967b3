"""Adapters of Megatron's layers as adapters of a Hugging Face model: values in, values out."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smartinit.errors import ArtefactError, ConfigError
from smartinit.formats.megatron_experts import stack, unstack
from smartinit.formats.megatron_fusion import Update, divide, fuse
from smartinit.formats.megatron_names import Place, grouped, is_experts, parts_of, to_peft

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from smartinit.formats.megatron_names import Part, Spelling
    from smartinit.formats.megatron_shape import DecoderShape

_KEY = re.compile(
    r"(?P<module>.+)\.adapter(?:\.adapter_(?P<part>q|k|v|gate|up))?\."
    r"(?P<what>linear_in\.weight|linear_out\.weight|weight_magnitude)"
)
_Parts = dict["Part | None", Update]


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """An adapter in the names of a Hugging Face model.

    Attributes:
        layers: module name -> A ``(r, in)``, B ``(out, r)``.
        stacks: name of a parameter -> A ``(E, r, in)``, B ``(E, out, r)``.
        notes: what is worth to know, one sentence each.
    """

    layers: Mapping[str, Update]
    stacks: Mapping[str, Update]
    notes: tuple[str, ...] = ()


def peft_adapter(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], shape: DecoderShape, spelling: Spelling
) -> PeftAdapter:
    """Take the projections of every layer apart and give them the names of a Hugging Face model.

    Args:
        tensors: by Megatron Bridge's keys, of the shapes of a single process.
        config: ``alpha``, and ``layers``: those of layers with another one.
        shape: of the model.
        spelling: how it writes its names.

    Raises:
        ArtefactError: keys that are not known, or that lack a partner; rows that do not fit the model.
        ConfigError: the shape is needed and not known.

    Cost: O((in + out)·r) per layer.
    """
    layers: dict[str, Update] = {}
    stacks: dict[str, Update] = {}
    notes: list[str] = []
    for module, entries in _sorted(_read(tensors, config)).items():
        if is_experts(module):
            singles = _experts(module, entries, shape)
            for expert, parts in singles.items():
                _check(f"{module} (expert {expert})", module, parts, shape)
            if spelling.experts == "parameters":
                whole = {e: _whole(module, parts, shape) for e, parts in singles.items()}
                stacks[to_peft(Place(module, stacked=True), spelling)] = stack(whole, shape.experts or max(whole) + 1)
                continue
            for expert, parts in singles.items():
                for part, update in _apart(module, parts, shape, notes).items():
                    layers[to_peft(Place(module, part, expert), spelling, gated=shape.gated)] = update
            continue
        parts = entries[None]
        _check(module, module, parts, shape)
        for part, update in _apart(module, parts, shape, notes).items():
            name = to_peft(Place(module, part), spelling, gated=shape.gated)
            if module.endswith(".mlp.router") and spelling.experts == "parameters":
                stacks[f"{name}.weight"] = Update(update.a[None], update.b[None], update.scaling)  # no nn.Linear there
            else:
                layers[name] = update
    return PeftAdapter(layers, stacks, tuple(notes))


def _read(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, dict[int | None, _Parts]]:
    """Layer -> expert -> projection -> update."""
    found: dict[tuple[str, Part | None], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ArtefactError(
                f"'{key}' is no key of an adapter; expected names like ….linear_qkv.adapter.linear_in.weight"
            )
        part: Any = match["part"]
        found.setdefault((match["module"], part), {})[match["what"].partition(".")[0]] = tensor
    groups: dict[str, dict[int | None, _Parts]] = {}
    for (module, part), matrices in found.items():
        place = grouped(module)
        update = _update(module if part is None else f"{module}.adapter_{part}", matrices, config)
        parts = groups.setdefault(place.module, {}).setdefault(place.expert, {})
        if parts and None in (part, *parts):
            raise ArtefactError(f"'{module}' has one adapter for all of it and others for its parts; one is expected")
        parts[part] = update
    return groups


def _update(name: str, matrices: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Update:
    a, b = matrices.get("linear_in"), matrices.get("linear_out")
    if a is None or b is None:
        raise ArtefactError(f"'{name}' has only one of linear_in and linear_out; the adapter is not whole")
    if a.ndim != b.ndim or a.ndim not in (2, 3) or a.shape[-2] != b.shape[-1] or a.shape[:-2] != b.shape[:-2]:
        raise ArtefactError(
            f"linear_in {tuple(a.shape)} and linear_out {tuple(b.shape)} of '{name}' do not go together; expected "
            "(r, in) and (out, r)"
        )
    alpha = _alpha(name, config)
    magnitude = matrices.get("weight_magnitude")
    if magnitude is not None and magnitude.shape != b.shape[-2:-1]:
        raise ArtefactError(
            f"weight_magnitude of '{name}' has shape {tuple(magnitude.shape)}, but its layer has {b.shape[-2]} rows"
        )
    return Update(a, b, alpha / a.shape[-2], magnitude)


def _alpha(name: str, config: Mapping[str, Any]) -> float:
    """Of a layer, or of a projection (``….linear_qkv.adapter_q``), else of all."""
    layers = config.get("layers", {})
    for key in (name, re.sub(r"\.adapter_\w+$", "", name)):
        entry = layers.get(key) if isinstance(layers, dict) else None
        if entry is not None:
            alpha = entry.get("alpha", config["alpha"]) if isinstance(entry, dict) else None
            break
    else:
        alpha = config["alpha"]
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ArtefactError(f"'{name}' has alpha={alpha!r}; expected a number")
    return alpha


def _sorted(groups: Mapping[str, dict[int | None, _Parts]]) -> dict[str, dict[int | None, _Parts]]:
    """In the order of the model: layer by layer, attention before what follows it."""
    order = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.router", "linear_fc1", "linear_fc2")

    def place(module: str) -> tuple[int, int, str]:
        number = re.search(r"\.layers\.(\d+)\.", f".{module}")
        kind = next((i for i, ending in enumerate(order) if module.endswith(ending)), len(order))
        if number is None:
            return (-1, 0, module) if "embedding" in module else (1 << 62, 0, module)
        return int(number[1]), kind, module

    return {module: dict(sorted(groups[module].items(), key=_first)) for module in sorted(groups, key=place)}


def _first(item: tuple[int | None, _Parts]) -> int:
    return -1 if item[0] is None else item[0]


def _experts(module: str, entries: Mapping[int | None, _Parts], shape: DecoderShape) -> dict[int, _Parts]:
    """Expert -> projection -> update, whichever way the experts are stored."""
    if None not in entries:
        numbered = {e: parts for e, parts in entries.items() if e is not None}
        if shape.experts is not None and max(numbered) >= shape.experts:
            raise ArtefactError(
                f"'{module}' has an adapter of expert {max(numbered)}, but the model has {shape.experts} experts"
            )
        return numbered
    if len(entries) > 1:
        raise ArtefactError(f"'{module}' has adapters of single experts and of all together; one kind is expected")
    singles: dict[int, _Parts] = {}
    for part, update in entries[None].items():
        if update.magnitude is not None and update.a.ndim == 3:  # noqa: PLR2004 - dimensions
            raise ConfigError(f"'{module}' has DoRA over stacked experts, which no layer computes")
        for expert, one in unstack(update, shape.experts).items():
            singles.setdefault(expert, {})[part] = one
    return singles


def _check(label: str, module: str, parts: _Parts, shape: DecoderShape) -> None:
    """Whether rows fit the model.

    Raises:
        ArtefactError: they do not.
        ConfigError: they cannot be told apart without the heads.
    """
    names = parts_of(module, gated=shape.gated)
    wrong = [part for part in parts if part is not None and part not in names]
    if wrong:
        raise ArtefactError(f"'{label}' has an adapter_{wrong[0]}, which is no part of such a layer")
    if any(update.a.ndim != 2 for update in parts.values()):  # noqa: PLR2004 - dimensions
        raise ArtefactError(f"'{label}' has an adapter of three dimensions, which only experts can have")
    counts = {part: len(update.b) for part, update in parts.items()}
    if "q" in names:
        if shape.heads is None:
            raise ConfigError(
                f"the rows of '{label}' are grouped by the heads of the model, which are not known; name the model's "
                "folder as model (--model), or give heads, groups and head_size (--heads, --groups, --head-size)"
            )
        heads = shape.heads
        for part, count in counts.items():
            expected = sum(heads.rows.values()) if part is None else heads.rows[part]
            if expected != count:
                raise ArtefactError(
                    f"'{label}'{f' ({part})' if part else ''} has {count} rows, but {heads.heads} heads in "
                    f"{heads.groups} query groups of head size {heads.size} make {expected}; the adapter is for "
                    "another model"
                )
    elif names and counts.get(None, 0) % 2:
        raise ArtefactError(f"'{label}' has {counts[None]} rows, which are no gate and up projection of one size")
    elif names and len(set(counts.values())) > 1:
        raise ArtefactError(f"gate and up of '{label}' have {sorted(counts.values())} rows; the same is expected")


def _apart(module: str, parts: _Parts, shape: DecoderShape, notes: list[str]) -> _Parts:
    """Projection -> update; a projection to which nothing is added, beside others that have something, has none."""
    names = parts_of(module, gated=shape.gated)
    if not names or None not in parts:
        return {part: parts[part] for part in (names or parts) if part in parts}
    divided = divide(parts[None], names, shape.heads)
    empty = [part for part, update in divided.items() if not update.b.any() and update.magnitude is None]
    if not empty or len(empty) == len(divided):
        return {part: update for part, update in divided.items()}  # noqa: C416 - a dict of more kinds of keys
    notes.append(f"{' and '.join(empty)} of {module} gets no adapter: its rows of linear_out are zero")
    return {part: update for part, update in divided.items() if part not in empty}


def _whole(module: str, parts: _Parts, shape: DecoderShape) -> Update:
    """One update of all of a layer's rows."""
    names = parts_of(module, gated=shape.gated)
    if None in parts:
        return parts[None]
    own = {part: parts[part] for part in names if part in parts}
    return fuse(own, dict.fromkeys(names, len(next(iter(own.values())).b)), None)
