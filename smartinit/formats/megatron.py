"""Adapters of a Hugging Face model as adapters of Megatron's: values in, values out.

Keys and shapes are Megatron Bridge's, see `smartinit.formats.megatron_folder`; the way back is
`smartinit.formats.megatron_to_peft`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from smartinit.errors import ArtefactError, ConfigError
from smartinit.formats.megatron_experts import stack, unstack
from smartinit.formats.megatron_fusion import divide, fuse, padded, rescaled, shares_input, truncated
from smartinit.formats.megatron_names import (
    is_experts,
    local_expert,
    parts_of,
    spelling_of,
    to_megatron,
)
from smartinit.formats.megatron_targets import target_modules

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from smartinit.formats.megatron_fusion import Update
    from smartinit.formats.megatron_names import Part
    from smartinit.formats.megatron_shape import DecoderShape

Fuse = Literal["auto", "exact", "canonical", "svd"]
Layout = Literal["grouped", "sequential"]
FUSES: tuple[Fuse, ...] = ("auto", "exact", "canonical", "svd")
LAYOUTS: tuple[Layout, ...] = ("grouped", "sequential")

V = TypeVar("V", str, float)
_Parts = dict["Part | None", "Update"]
_Groups = dict[str, dict["int | None", _Parts]]


@dataclass(frozen=True, eq=False)
class MegatronAdapter:
    """An adapter in Megatron's names.

    Attributes:
        tensors: by key, of the shapes of a single process.
        config: what `smartinit.formats.megatron_folder.write_folder` wants to know.
        fused: layer -> how its projections were put together: ``"equal"`` (they had one A), ``"exact"``,
            ``"canonical"`` or ``"svd"``.
        ranks: layer -> rank.
        errors: layer -> relative error of its update; only where there is one.
        notes: what is worth to know, one sentence each.
    """

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, object]
    fused: Mapping[str, str]
    ranks: Mapping[str, int]
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def megatron_adapter(
    layers: Mapping[str, Update],
    stacks: Mapping[str, Update],
    shape: DecoderShape,
    *,
    how: Fuse = "auto",
    rank: int | None = None,
    experts: Layout = "grouped",
    one_rank: int | None = None,
) -> MegatronAdapter:
    """Put the projections of every layer together and give them Megatron's keys.

    Args:
        layers: module name -> A ``(r, in)``, B ``(out, r)``.
        stacks: name of a parameter of experts -> A ``(E, r, in)``, B ``(E, out, r)``.
        shape: of the model.
        how: for projections that have not one A: ``"exact"``: the sum of their ranks, ``"canonical"``: an adapter for
            each projection, in all fused layers, ``"svd"``: cut to ``rank``; ``"auto"``: canonical, but exact with
            DoRA, which knows no other. Projections with one A are put together without loss, unless canonical is asked
            for.
        rank: that ``"svd"`` cuts to; None: the largest of the projections'.
        experts: ``"grouped"``: one adapter for all experts of a layer, with a dimension of experts; ``"sequential"``:
            one for each.
        one_rank: fill all ranks up with zeros to the largest, and that to a multiple of this, under one scaling: what
            Megatron Bridge's classes, which have one ``dim`` and one ``alpha``, and that many ranks can take.

    Raises:
        ArtefactError: names that are not known, or that do not belong to one model; rows that do not fit the heads.
        ConfigError: options that do not go together; the shape is needed and not known; DoRA that cannot be.

    Cost: O((in + out)·r²) per layer with ``"svd"``, else O((in + out)·r).
    """
    spelling = spelling_of([*layers, *stacks])
    groups = _grouped(layers, stacks, shape)
    differing = [name for name, entries in groups.items() if any(not _one_input(parts) for parts in entries.values())]
    dora = _is_dora([*layers.values(), *stacks.values()])
    chosen, notes = _choice(how, differing, dora=dora, rank=rank)
    count = _experts(groups, shape)
    made: dict[tuple[str, str], Update] = {}
    fused: dict[str, str] = {}
    errors: dict[str, float] = {}
    for module, entries in groups.items():
        joined: dict[str, dict[int | None, Update]] = {}
        for expert, parts in entries.items():
            _check(module, parts, shape)
            name = module if expert is None else local_expert(module, expert)
            pieces, way, error = _joined(module, parts, shape, chosen, rank)
            fused |= {name: way} if way else {}
            errors |= {name: error} if error is not None else {}
            for key, update in pieces.items():
                joined.setdefault(key, {})[expert] = update
            notes += _zero_rows(name, module, parts, shape) if way != "canonical" else []
        for key, updates in joined.items():
            made |= _placed(module, key, updates, experts, count)
    if experts == "grouped":
        fused, errors = _of_groups(fused), _of_groups(errors)
    if one_rank is not None:
        made = _alike(made, one_rank)
    kind = "dora" if dora else "canonical_lora" if "canonical" in fused.values() else "lora"
    config = _config(made, kind, shape) | {"peft_names": spelling.as_dict()}
    if config["layers"]:
        notes.append(
            f"not all layers have dim={config['dim']} and alpha={config['alpha']:g}, the commonest; Megatron Bridge's "
            "own classes know one of each: export with one_rank (--one-rank) for those"
        )
    tensors = {key: tensor for place, update in made.items() for key, tensor in _keys(place, update).items()}
    return MegatronAdapter(tensors, config, fused, {_layer(p): u.rank for p, u in made.items()}, errors, tuple(notes))


def _grouped(layers: Mapping[str, Update], stacks: Mapping[str, Update], shape: DecoderShape) -> _Groups:
    """Layer of Megatron's -> expert -> projection -> update."""
    groups: _Groups = {}

    def add(name: str, module: str, expert: int | None, part: Part | None, update: Update) -> None:
        parts = groups.setdefault(module, {}).setdefault(expert, {})
        if part in parts or (parts and None in (part, *parts)):
            raise ArtefactError(f"'{name}' has an adapter twice, under different names; one of them is expected")
        parts[part] = update

    for name, update in layers.items():
        place = to_megatron(name, gated=shape.gated)
        if place.stacked:
            raise ArtefactError(f"'{name}' is a parameter of all experts; its adapter was expected to be stacked")
        add(name, place.module, place.expert, place.part, update)
    for name, update in stacks.items():
        place = to_megatron(name, gated=shape.gated)
        if not place.stacked:
            raise ArtefactError(f"'{name}' is no parameter of experts that this package knows")
        for expert, one in unstack(update, None).items():
            add(name, place.module, expert, None, one)
    return groups


def _one_input(parts: _Parts) -> bool:
    return None in parts or len(parts) == 1 or shares_input(list(parts.values()))


def _is_dora(updates: Iterable[Update]) -> bool:
    kinds = {update.magnitude is not None for update in updates}
    if len(kinds) > 1:
        raise ConfigError(
            "some layers have DoRA magnitudes and others have none, which no class of Megatron Bridge can hold; export "
            "an adapter of one kind"
        )
    return kinds == {True}


def _choice(how: Fuse, differing: list[str], *, dora: bool, rank: int | None) -> tuple[Fuse, list[str]]:
    """How to fuse what has not one A, and what to say of it."""
    if how not in FUSES:
        raise ConfigError(f"fuse={how!r} is not known; choose one of {', '.join(FUSES)}")
    if rank is not None and how != "svd":
        raise ConfigError(f"rank={rank} is what fuse='svd' cuts to, but fuse is {how!r}")
    if how == "canonical" and dora:
        raise ConfigError("Megatron's DoRA has one adapter for a fused layer; choose fuse='exact' or 'svd'")
    if how != "auto":
        return how, []
    if not differing:
        return "exact", []
    said = f"the projections of {len(differing)} fused layers (such as {differing[0]}) have an A of their own each"
    if dora:
        return "exact", [f"{said}: put together exactly, with the sum of their ranks, because DoRA is not canonical"]
    return "canonical", [f"{said}: exported as canonical adapters, one for each projection"]


def _experts(groups: _Groups, shape: DecoderShape) -> int:
    """How many experts each layer has; where the model does not say, as many as have adapters."""
    numbers = [e for module, entries in groups.items() if is_experts(module) for e in entries if e is not None]
    return shape.experts or max(numbers, default=-1) + 1


def _check(module: str, parts: _Parts, shape: DecoderShape) -> None:
    """Whether the rows of a layer's projections are those of the model.

    Raises:
        ArtefactError: they are not, or their inputs differ.
        ConfigError: they cannot be told without the heads.
    """
    names = parts_of(module, gated=shape.gated)
    if not names:
        return
    inputs = {int(update.a.shape[-1]) for update in parts.values()}
    if len(inputs) > 1:
        raise ArtefactError(f"projections of '{module}' read {sorted(inputs)} features; one number is expected")
    counts = {part: int(update.b.shape[-2]) for part, update in parts.items()}
    if "q" in names:
        if shape.heads is None:
            raise ConfigError(
                f"the rows of '{module}' are grouped by the heads of the model, which are not known; name the model's "
                "folder as model (--model), or give heads, groups and head_size (--heads, --groups, --head-size)"
            )
        heads = shape.heads
        wrong = [part for part, count in counts.items() if part is not None and heads.rows[part] != count]
        if wrong:
            raise ArtefactError(
                f"{wrong[0]} of '{module}' has {counts[wrong[0]]} rows, but {heads.heads} heads in {heads.groups} "
                f"query groups of head size {heads.size} make {heads.rows[wrong[0]]}; the adapter is for another model"
            )
    elif (None in counts and counts[None] % 2) or len(set(counts.values())) > 1:
        raise ArtefactError(
            f"gate and up of '{module}' have {sorted(counts.values())} rows; the same number is expected of both"
        )


def _joined(
    module: str, parts: _Parts, shape: DecoderShape, how: Fuse, rank: int | None
) -> tuple[dict[str, Update], str | None, float | None]:
    """Ending of the name -> update; how they were put together; the error, if any."""
    names = parts_of(module, gated=shape.gated)
    if not names:
        return {"": next(iter(parts.values()))}, None, None
    own = {part: update for part, update in parts.items() if part is not None}
    if how == "canonical":
        own = own or divide(parts[None], names, shape.heads)
        return {f".adapter_{part}": own[part] for part in names if part in own}, "canonical", None
    if not own:
        return {"": parts[None]}, "equal", None
    first = next(iter(own.values()))
    rows = shape.heads.rows if shape.heads is not None and "q" in names else dict.fromkeys(names, len(first.b))
    ordered = {part: own[part] for part in names if part in own}
    try:
        update = fuse(ordered, rows, shape.heads)
    except ConfigError as error:
        raise ConfigError(f"'{module}': {error}") from error
    if _one_input(parts):
        return {"": update}, "equal", None
    if how == "exact":
        return {"": update}, "exact", None
    small, error_of_cut = truncated(update, rank if rank is not None else max(one.rank for one in own.values()))
    return {"": small}, "svd", error_of_cut


def _zero_rows(name: str, module: str, parts: _Parts, shape: DecoderShape) -> list[str]:
    """What to say of projections without an adapter."""
    absent = [part for part in parts_of(module, gated=shape.gated) if None not in parts and part not in parts]
    said = f"{' and '.join(absent)} of {name} had no adapter: rows of zeros in linear_out, which training can fill"
    return [said] if absent else []


def _placed(
    module: str, ending: str, updates: Mapping[int | None, Update], experts: Layout, count: int
) -> dict[tuple[str, str], Update]:
    """(Layer, ending) -> update, of experts as one or one by one."""
    if None in updates:
        return {(module, ending): updates[None]}
    numbered = {expert: update for expert, update in updates.items() if expert is not None}
    if experts == "grouped":
        return {(module, ending): stack(numbered, count)}
    return {(local_expert(module, expert), ending): update for expert, update in sorted(numbered.items())}


def _of_groups(values: Mapping[str, V]) -> dict[str, V]:
    """Values of single experts as the largest (or last) one of all of a layer."""
    out: dict[str, V] = {}
    for name, value in values.items():
        head, dot, tail = name.partition(".local_experts.")
        key = f"{head}.{tail.partition('.')[2]}" if dot else name
        out[key] = max(out.get(key, value), value)
    return out


def _alike(made: Mapping[tuple[str, str], Update], multiple: int) -> dict[tuple[str, str], Update]:
    """All with one rank, a multiple of this, and with the commonest scaling."""
    if multiple < 1:
        raise ConfigError(f"one_rank={multiple}: expected at least 1")
    largest = max(update.rank for update in made.values())
    rank = -(-largest // multiple) * multiple
    scaling = Counter(update.scaling for update in made.values()).most_common(1)[0][0]
    return {place: padded(rescaled(update, scaling), rank) for place, update in made.items()}


def _config(made: Mapping[tuple[str, str], Update], kind: str, shape: DecoderShape) -> dict[str, object]:
    """What the folder says: the commonest rank with its commonest alpha, and layer -> what another one has."""
    pairs = {_layer(place): (update.rank, update.alpha) for place, update in made.items()}
    (dim, alpha), _ = Counter(pairs.values()).most_common(1)[0]
    return {
        "peft_type": kind,
        "dim": dim,
        "alpha": alpha,
        "target_modules": target_modules(made, shape.layers),
        "layers": {name: {"dim": r, "alpha": s} for name, (r, s) in pairs.items() if (r, s) != (dim, alpha)},
        "gated_linear_unit": shape.gated,
        "share_expert_adapters": False,
        "model_shape": shape.as_dict(),
    }


def _layer(place: tuple[str, str]) -> str:
    """``….linear_qkv``, of canonical adapters ``….linear_qkv.adapter_q``."""
    return "".join(place)


def _keys(place: tuple[str, str], update: Update) -> dict[str, torch.Tensor]:
    module, ending = place
    head = f"{module}.adapter{ending}"
    tensors = {f"{head}.linear_in.weight": update.a, f"{head}.linear_out.weight": update.b}
    if update.magnitude is not None:
        tensors[f"{head}.weight_magnitude"] = update.magnitude
    return tensors
