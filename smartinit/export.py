"""Adapter folders of PEFT as adapter folders of Megatron's, and back.

A folder in Megatron's format that was made from a start which splits the base keeps that start, in PEFT's format, in
its sub-folder ``start``, and its digests in ``megatron_adapter.json``: `smartinit.convert.convert_adapter` needs it
after training.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from smartinit.adapters.conversion import without_base_weights
from smartinit.errors import ArtefactError, ConfigError, OutputError
from smartinit.formats.files import new_folder, write_file
from smartinit.formats.kept_start import kept_start, owner_of
from smartinit.formats.megatron import FUSES, LAYOUTS, megatron_adapter
from smartinit.formats.megatron_folder import MARKER, ShardedFolder, write_folder
from smartinit.formats.megatron_names import Spelling
from smartinit.formats.megatron_start import START_FILES, start_in
from smartinit.formats.megatron_to_peft import peft_adapter
from smartinit.formats.peft import CONFIG_FILE, TENSOR_FILE, read_adapter, read_file, write_adapter
from smartinit.formats.record import RECORD_FILE, START_FOLDER
from smartinit.formats.stamp import START_STAMP, file_digest
from smartinit.formats.start import read_start, require_own_base
from smartinit.formats.tensors import Form
from smartinit.megatron_reading import as_peft, base_model, known_shape, read_megatron_start, spelling_in, tensors_of
from smartinit.megatron_start_names import adapter_in_peft_names, has_megatron_names, start_in_peft_names
from smartinit.model_shape import decoder_shape
from smartinit.planning.plan import Plan
from smartinit.stored_updates import stored_updates
from smartinit.targets.patterns import alpha_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smartinit.formats.megatron import Fuse
    from smartinit.formats.megatron_shape import DecoderShape
    from smartinit.formats.peft import StoredAdapter
    from smartinit.formats.start import Start

__all__ = ["Export", "export_adapter"]

PEFT_EXPERTS = ("parameters", "modules")


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        to: ``"megatron"`` or ``"peft"``.
        folder: where it is.
        ranks: layer -> rank, in the names of the new folder.
        fused: Megatron's layer -> how its projections were put together: ``"equal"`` (they had one A, nothing was
            added), ``"exact"`` (the sum of their ranks), ``"canonical"`` (an adapter for each) or ``"svd"``.
        errors: layer -> relative error of its update; where there is no entry, there is none but for rounding.
        base: the model that the adapter is for: ``"unmodified"``, or ``"residual"``: what a split has left of it.
        notes: what is worth to know, one sentence each.
    """

    to: Literal["megatron", "peft"]
    folder: Path
    ranks: Mapping[str, int]
    fused: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    base: Literal["unmodified", "residual"] = "unmodified"
    notes: tuple[str, ...] = ()


def export_adapter(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: Literal["megatron", "peft"] = "megatron",
    model: str | os.PathLike[str] | None = None,
    heads: int | None = None,
    groups: int | None = None,
    head_size: int | None = None,
    gated: bool | None = None,
    expert_count: int | None = None,
    fuse: Fuse = "auto",
    rank: int | None = None,
    experts: Literal["grouped", "sequential", "parameters", "modules"] | None = None,
    one_rank: bool = False,
    tensor_parallel: int = 1,
    force: bool = False,
) -> Export:
    """Write a PEFT adapter folder as one of Megatron's, or the other way round.

    Megatron's ``linear_qkv`` is q, k and v in one, and ``linear_fc1`` gate and up, with one A. Projections that share
    their A (EVA's do) are put together without loss; ``fuse`` says what happens to others.

    Args:
        adapter: folder with ``adapter_config.json``, or with ``megatron_adapter.json``.
        out: where to.
        to: the format to write.
        model: the base model's folder or name, for its heads, experts and layers. Without it, what the adapter's folder
            says itself, or the model that it names, if that is on this machine.
        heads: number of attention heads, over what the model says.
        groups: number of query groups (heads that share a key and a value).
        head_size: of one head.
        gated: whether feed-forward layers have a gate.
        expert_count: number of experts of a layer.
        fuse: to Megatron, for projections with an A of their own: ``"exact"``: the sum of their ranks; ``"canonical"``:
            an adapter for each (as Megatron's CanonicalLoRA), in all fused layers; ``"svd"``: cut to ``rank``;
            ``"auto"``: canonical, or exact with DoRA.
        rank: of ``fuse="svd"``; None: the largest of the projections'.
        experts: to Megatron ``"grouped"`` (default): one adapter for a layer's experts, with a dimension for them, or
            ``"sequential"``: one each. To PEFT ``"parameters"``: on the stacked parameters of transformers 5, or
            ``"modules"``: one for each projection of each expert; default as the adapter was, else parameters.
        one_rank: to Megatron: fill all ranks up with zeros to the largest (and to a multiple of ``tensor_parallel``),
            under one scaling, for Megatron Bridge's classes, which have one ``dim`` and one ``alpha``.
        tensor_parallel: to Megatron: into so many files, each with what one rank holds.
        force: replace an existing folder of the same format.

    Returns:
        What was written.

    Raises:
        ConfigError: options that do not go together; a shape that is needed and not known; a start that quantises the
            base.
        MissingFileError: there is no such folder or model.
        ArtefactError: no adapter; a layer that has no known name on the other side; rows that do not fit the model; an
            adapter that PEFT has trained on a base that its start has changed.
        ModelError: a configuration that is broken.
        VerificationError: a value is not finite; a start is not the one that was written.
        OutputError: ``out`` exists (without ``force``), holds other things, or cannot be written.

    Cost: memory for the adapter, twice; O((in + out)·r²) per layer with ``"svd"``.
    """
    path = Path(adapter)
    _check_direction(path, to)
    _check_apart(path, Path(out))
    said: dict[str, Any] = {
        "model": model,
        "heads": heads,
        "groups": groups,
        "head_size": head_size,
        "gated": gated,
        "expert_count": expert_count,
    }
    known = PEFT_EXPERTS if to == "peft" else LAYOUTS
    if experts is not None and experts not in known:
        raise ConfigError(f"experts={experts!r} is not known with to={to!r}; choose one of {', '.join(known)}")
    if fuse not in FUSES:
        raise ConfigError(f"fuse={fuse!r} is not known; choose one of {', '.join(FUSES)}")
    if tensor_parallel < 1:
        raise ConfigError(f"tensor_parallel={tensor_parallel}: expected at least 1")
    if to == "peft":
        if fuse != "auto" or rank is not None or one_rank or tensor_parallel != 1:
            raise ConfigError("fuse, rank, one_rank and tensor_parallel are about Megatron's layers; leave them out")
        return _to_peft(path, Path(out), said, experts, force=force)
    options: dict[str, Any] = {
        "how": fuse,
        "rank": rank,
        "experts": experts or "grouped",
        "one_rank": tensor_parallel if one_rank else None,
    }
    return _to_megatron(path, Path(out), said, options, tensor_parallel, force=force)


def _check_apart(path: Path, out: Path) -> None:
    """Refuse to write into, or over, what is read.

    Raises:
        OutputError: the one is the other, or lies in it.
    """
    read, written = Path(os.path.realpath(path)), Path(os.path.realpath(out))
    if written.is_relative_to(read) or read.is_relative_to(written):
        raise OutputError(
            f"'{out}' and the adapter '{path}' are one folder, or one lies in the other; name another one"
        )


def _check_direction(path: Path, to: str) -> None:
    if to not in ("megatron", "peft"):
        raise ConfigError(f"to={to!r} is not known; choose 'megatron' or 'peft'")
    marker, other = (MARKER, "peft") if to == "megatron" else (CONFIG_FILE, "megatron")
    there = {name: (path / name).is_file() for name in (MARKER, CONFIG_FILE)}
    if there[marker] and sum(there.values()) == 1:
        raise ConfigError(f"'{path}' is in this format already: it holds {marker}; choose to={other!r} (--to {other})")


def _to_megatron(
    path: Path, out: Path, said: dict[str, Any], options: dict[str, Any], size: int, *, force: bool
) -> Export:
    stored = read_adapter(path, allow_others=True)
    dropped = _require_no_others(stored)
    start, base = _start_of(path, stored)
    shape = decoder_shape(**said, base_model=base)
    if has_megatron_names(stored.factors):
        stored = adapter_in_peft_names(stored, shape, Spelling())
    layers, stacks = stored_updates(stored)
    made = megatron_adapter(layers, stacks, shape, **options)
    _check_ranks(made.config, made.tensors, shape, size)
    notes = [*made.notes, *dropped]
    config = {
        **made.config,
        "dropout": stored.config.lora_dropout,
        "base_model": base,
        "task_type": stored.config.task_type,
        "start": None if start is None else {name: file_digest(start / name) for name in START_FILES},
    }
    if start is not None:
        notes.append(
            "the start has split the base: the adapter goes with the residual base model (save_residual_model), not "
            f"with the base as it was; after training, smartinit convert TRAINED --start {out} brings it back"
        )
    with new_folder(out, force=force, marker=MARKER) as unfinished:
        inner = write_folder(unfinished / "adapter", made.tensors, config, tensor_parallel=size)
        for file in sorted(inner.iterdir()):
            file.rename(unfinished / file.name)
        inner.rmdir()
        _keep_start(start, unfinished)
    goes_with: Literal["unmodified", "residual"] = "unmodified" if start is None else "residual"
    return Export("megatron", out, made.ranks, made.fused, made.errors, goes_with, tuple(notes))


def _to_peft(path: Path, out: Path, said: dict[str, Any], experts: str | None, *, force: bool) -> Export:
    if experts is not None and experts not in PEFT_EXPERTS:
        raise ConfigError(f"experts={experts!r} is not known for PEFT; choose one of {', '.join(PEFT_EXPERTS)}")
    stored = ShardedFolder.open(path)
    shape = decoder_shape(**said, known=known_shape(stored), base_model=base_model(stored))
    spelling = spelling_in(stored)
    if experts is not None:
        spelling = replace(spelling, experts=experts)  # type: ignore[arg-type] # checked above
    start = _megatron_start(path, shape, spelling)
    made = peft_adapter(tensors_of(stored), stored.config, shape, spelling)
    config, plan, factors, parameters = as_peft(stored.config, path, made)
    notes = list(made.notes)
    stamps: dict[str, str] = {}
    if start is not None:
        config.base_model_name_or_path = None
        notes.append(
            "the start had split the base: the adapter goes with the residual base; smartinit convert turns it into "
            "plain LoRA for the base as it was"
        )
    with new_folder(out, force=force, marker=CONFIG_FILE) as unfinished:
        if start is not None:
            _write_start(start, unfinished / START_FOLDER)
            stamps = {START_STAMP: file_digest(unfinished / START_FOLDER / TENSOR_FILE)}
        write_adapter(
            unfinished,
            config,
            plan,
            factors,
            dtype=None,
            parameters=parameters,
            others={},
            stamps=stamps,
            forms={name: Form(embedding=True) for name in factors if name.endswith("embed_tokens")},
        )
    return Export("peft", out, dict(plan.ranks), base="unmodified" if start is None else "residual", notes=tuple(notes))


def _start_of(path: Path, stored: StoredAdapter) -> tuple[Path | None, str | None]:
    """The folder of the start that the base has given up, if it has, and the base model's name.

    Raises:
        ConfigError: the start quantises the base.
        ArtefactError: PEFT has changed the base in a way that the folder does not keep.
    """
    named = stored.config.base_model_name_or_path
    if (path / RECORD_FILE).is_file() and owner_of(path / START_FOLDER) is None:
        start = read_start(path)
        if "quantises" in start.effects.values():
            raise ConfigError(
                f"the start in '{path}' quantises the base, so the adapter belongs to that base and to no other; "
                "Megatron has no such base, so compute a start that keeps it"
            )
        return (path / START_FOLDER if start.factors else None), start.base_model or named
    require_own_base(stored)
    kept = kept_start(stored)
    return (None if kept is None else kept.folder), named


def _megatron_start(path: Path, shape: DecoderShape, spelling: Spelling) -> Start | None:
    """What the base has given up for a Megatron folder, in the names of PEFT; None: nothing.

    Raises:
        ConfigError: the start quantises the base.
    """
    if start_in(path) is None:
        return None
    start = read_megatron_start(path, shape=shape, spelling=spelling)
    if "quantises" in start.effects.values():
        raise ConfigError(
            f"the start of '{path}' quantised the base of the parallel model, so the adapter belongs to that base and "
            "to no other"
        )
    return start_in_peft_names(start, shape, spelling) if has_megatron_names(start.effects) else start


def _write_start(start: Start, folder: Path) -> None:
    """The two files of PEFT's; as they are, if it has them."""
    assert start.config is not None  # noqa: S101 - it splits
    if all((start.folder / name).is_file() for name in START_FILES) and not has_megatron_names(
        read_adapter(start.folder).factors
    ):
        _keep_start(start.folder, folder.parent)
        return
    plan = Plan(
        {name: pair.rank for name, pair in start.factors.items()},
        {name: alpha_for(start.config, name) for name in start.factors},
    )
    config = start.config.copy()
    config.base_model_name_or_path = None
    write_adapter(folder, config, plan, start.factors, dtype=None, others={})


def _require_no_others(stored: StoredAdapter) -> list[str]:
    """What to say of base weights that PEFT has saved along, which the model has itself.

    Raises:
        ArtefactError: there is something else than LoRA in the folder.
    """
    others, frozen = without_base_weights(stored)
    for key in others:
        raise ArtefactError(
            f"'{stored.folder}' holds '{key}', which is no matrix of LoRA, and Megatron's adapters have nothing else; "
            "train without modules_to_save, biases and trained tokens, or merge them into the base model"
        )
    return [f"left out: {', '.join(frozen)}, frozen in training and part of the base model"] if frozen else []


def _keep_start(start: Path | None, folder: Path) -> None:
    """Copy the two files of a start into the folder that is being written."""
    if start is None:
        return
    (folder / START_FOLDER).mkdir()
    for name in START_FILES:
        write_file(folder / START_FOLDER / name, read_file(start / name))


def _check_ranks(config: Mapping[str, object], tensors: Mapping[str, object], shape: DecoderShape, size: int) -> None:
    """Whether so many ranks can share the layers.

    Raises:
        ConfigError: they cannot.
    """
    if size == 1:
        return
    if shape.heads is not None and shape.heads.groups % size and any(".linear_qkv." in key for key in tensors):
        raise ConfigError(
            f"{shape.heads.groups} query groups cannot be shared evenly by tensor_parallel={size} ranks; choose a "
            "number that divides them"
        )
    layers: Any = config["layers"]
    for name, dim in [("most layers", config["dim"]), *((name, one["dim"]) for name, one in layers.items())]:
        if not isinstance(dim, int) or dim % size:
            raise ConfigError(
                f"rank {dim} of {name} cannot be shared evenly by tensor_parallel={size} ranks; fill the ranks up "
                "with one_rank=True (--one-rank)"
            )
