"""Adapters of a parallel model, saved by all ranks and loaded at any number of them.

Every rank writes what it has and what no rank before it has, so nothing is gathered: replicas (data-parallel ones,
whole magnitudes, adapters that expert-parallel ranks share) are written once. See `smartinit.formats.megatron_folder`
for the folder. All ranks must see it: a file system that they share is needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smartinit import __version__
from smartinit.errors import ConfigError, ModelError, OutputError
from smartinit.formats.files import new_folder, write_file
from smartinit.formats.megatron_folder import MARKER, ShardedFolder, shard_file, write_marker, write_shard
from smartinit.formats.megatron_layout import Layout, Piece, layout_of
from smartinit.formats.peft import read_object
from smartinit.formats.record import START_FOLDER
from smartinit.formats.stamp import file_digest
from smartinit.megatron.agreement import every_number, everyone, failing_together, own_rank
from smartinit.megatron.kept_start import compared, loaded_start, remember, start_shards
from smartinit.megatron.shards import adapter_shards, number_of, read_part
from smartinit.megatron.walk import adapted_layers, chunks_of

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from smartinit.megatron.peft import PEFT
    from smartinit.megatron.shards import Shard
    from smartinit.megatron.walk import Model

_TYPES = {"LoRA": "lora", "DoRA": "dora", "CanonicalLoRA": "canonical_lora", "VLMLoRA": "lora"}


def save_adapter(
    model: Model, folder: str | os.PathLike[str], peft: PEFT | None = None, *, force: bool = False
) -> Path:
    """Write the adapters of a model; every rank of the default process group must call this.

    Args:
        model: adapted; a module or chunks, in data-parallel wrappers or not.
        folder: where, on a file system that all ranks share; what rank 0 says counts.
        peft: what the model was adapted with, to be noted in the folder; None: what the layers say.
        force: replace an adapter folder that is there.

    Where base weights have given up a start, the folder keeps it in ``start``, which `smartinit convert` needs.

    Returns:
        The folder's path.

    Raises:
        ModelError: the model has no adapter on any rank, or one that cannot be saved; or a base of several starts.
        OutputError: the folder exists already, cannot be written, or is not seen by all ranks.
        VerificationError: NaN or Inf in a weight. After each of these there is no new folder; if one rank meets it,
            all ranks raise it.

    Warns:
        UserWarning: replicas of a weight differ between ranks, and the first rank's are saved; or the model trains
            something besides its adapters (`smartinit.megatron.VLMLoRA`), which is not saved here.

    Cost: what each rank has is written once; 16 bytes for each weight of each rank are sent to all.
    """
    with failing_together():
        shards = adapter_shards(model)
        kind = _kind(model, peft)
        start, effect = start_shards(model)
        loaded = loaded_start(model)
        _warn_of_others(model)
    effects = sorted(one for one in everyone(effect) if one)  # quantises before splits
    known = sorted({text for text in everyone("" if loaded is None else loaded.text()) if text})
    kinds = sorted(one for one in everyone(kind) if one)  # canonical_lora before lora
    if not kinds:
        raise ModelError("the model has no adapters to save; adapt it first: LoRA(...)(model)")
    if len(known) + bool(effects) > 1:
        raise ModelError(
            "the base of this model has given up several starts, one over the other, so no adapter goes with the "
            "unmodified base; load the base model again, and one start"
        )
    mine = _owned(list(shards.values()))
    mine_of_start = _owned(list(start.values())) if effects else []
    rank, (size, path) = own_rank(), _agreed(folder)
    with ExitStack() as stack:
        unfinished = path
        with failing_together():
            if rank == 0:
                unfinished = stack.enter_context(new_folder(path, force=force, marker=MARKER))
                if effects or known:
                    (unfinished / START_FOLDER).mkdir()
        unfinished = Path(everyone(str(unfinished))[0])
        with failing_together():
            if not unfinished.is_dir():
                raise OutputError(f"this rank does not see '{unfinished}'; save to a file system that all ranks share")
            _write_own(unfinished, mine, shards.values(), rank, size)
            if effects:
                _write_own(unfinished / START_FOLDER, mine_of_start, start.values(), rank, size)
            for name, content in ({} if loaded is None else loaded.files).items():
                write_file(unfinished / START_FOLDER / name, content)
        with failing_together():
            if rank == 0:
                said = json.loads(known[0])["about"] if known else {}
                said["start"] = _finished_start(unfinished / START_FOLDER, kinds[0], effects, size)
                _finish(unfinished, {"peft_type": kinds[0], **_fields(peft), **said}, size)
        with failing_together():
            stack.close()  # it takes its name
    return path


def load_adapter(model: Model, folder: str | os.PathLike[str], *, residual_base: bool = False) -> dict[str, Any]:
    """Set the adapters of a model to those of a folder, at any number of ranks; every rank must call this.

    All is checked, on all ranks, before the first weight is written.

    Args:
        model: adapted as the saved one was; a module or chunks, in wrappers or not.
        folder: that `save_adapter` or `smartinit.formats.megatron_folder.write_folder` has made.
        residual_base: whether the model's base weights are what the start of the folder's adapter has left of them, as
            `smartinit.convert.save_residual_model` writes them. `save_adapter` keeps that start then.

    Returns:
        The folder's configuration.

    Raises:
        MissingFileError, ArtefactError: there is no such folder, or it is broken.
        ConfigError: the model was adapted otherwise: other layers, another dim or alpha, separate adapters for experts
            that share one; or it cannot take one as it is merged.
        VerificationError: NaN or Inf in the folder; or its start is not the one that it was saved with. The model is as
            it was after each of these, on all ranks.

    Warns:
        UserWarning: the folder is for a base that has given its start up, and the model's has not, as far as is known;
            or the other way round.

    Cost: each rank reads its own shards. Numbers are rounded to the dtype that the model's adapters have.
    """
    with failing_together():
        shards = adapter_shards(model)
        saved = ShardedFolder.open(folder)
        for place, layer in adapted_layers(model):
            if layer.merged:
                raise ConfigError(f"the adapter of '{place.whole_name}' is merged into its base weight; un-merge first")
        for shard in shards.values():
            _check_fits(saved, shard)
    known = {number for row in every_number([number_of(key) for key in shards]) for number in row}
    with failing_together():
        extra = [key for key in saved.keys() if number_of(key) not in known]  # noqa: SIM118 - not a dict
        if extra:
            raise ConfigError(
                f"'{saved.path}' holds {len(extra)} tensors, '{extra[0]}' among them, which the model has no place for "
                f"on any rank; adapt it as the saved one was: target_modules={saved.config['target_modules']}"
            )
        read = {key: read_part(saved, shard) for key, shard in shards.items()}
    start = compared(model, saved, residual_base=residual_base)
    with torch.no_grad():
        for key, shard in shards.items():
            shard.parameter.copy_(read[key])
    remember(model, start)
    return dict(saved.config)


def _warn_of_others(model: Model) -> None:
    """Say so if something is trained that is no adapter."""
    adapters = {id(p) for _, layer in adapted_layers(model) for p in layer.adapter.parameters()}
    others = [
        name
        for chunk in chunks_of(model)
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapters
    ]
    if adapters and others:
        warnings.warn(
            f"{len(others)} parameters that are trained besides the adapters (the first: '{others[0]}') are not in the "
            "adapter's folder; save the model's state dict as well",
            stacklevel=3,
        )


def _agreed(folder: str | os.PathLike[str]) -> tuple[int, Path]:
    """How many ranks there are, and the folder's absolute path on the first of them; collective."""
    said = everyone(str(Path(folder).absolute()))
    return len(said), Path(said[0])


def _kind(model: Model, peft: PEFT | None) -> str:
    """Which adapters a model has, one of `smartinit.formats.megatron_folder.PEFT_TYPES`; empty: none on this rank."""
    kinds = {_kind_of(layer.adapter) for _, layer in adapted_layers(model)}
    if not kinds:
        return ""
    named = next((_TYPES[kind.__name__] for kind in type(peft).__mro__ if kind.__name__ in _TYPES), None)
    if "canonical_lora" in (named, *kinds) and "lora" in kinds:  # whose layers that are not fused have plain adapters
        kinds = (kinds - {"lora"}) | {"canonical_lora"}
    if peft is not None and (named is None or kinds != {named}):
        raise ConfigError(
            f"the model has adapters of kind {', '.join(sorted(kinds))}, but a {type(peft).__name__} was given; "
            "give what the model was adapted with, or leave it out"
        )
    if len(kinds) > 1:
        raise ModelError(f"the model has adapters of several kinds ({', '.join(sorted(kinds))}); save one kind")
    return kinds.pop()


def _kind_of(adapter: torch.nn.Module) -> str:
    names = [name for name, _ in adapter.named_parameters()]
    if any(name.rpartition(".")[2] == "weight_magnitude" for name in names):
        return "dora"
    return "lora" if "linear_in.weight" in names else "canonical_lora"


def _fields(peft: PEFT | None) -> dict[str, Any]:
    """The options of an adapter, for JSON."""
    if peft is None:
        return {}
    values = {field.name: getattr(peft, field.name) for field in dataclasses.fields(peft)}
    values.pop("params_to_save", None)
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: object) -> Any:  # noqa: ANN401 - whatever JSON has
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(str(one) for one in value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value).removeprefix("torch.")


def _digest(parameter: torch.Tensor) -> int:
    """64 bits that stand for the numbers of a parameter."""
    content = parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)


def _owned(shards: list[Shard]) -> list[Shard]:
    """Those which no rank before this one has as well; collective."""
    rank = own_rank()
    numbers = [number_of(json.dumps([shard.key, shard.parts])) for shard in shards]
    digests = [_digest(shard.parameter) for shard in shards]
    rows = every_number([*numbers, *digests])
    first: dict[int, tuple[int, int]] = {}
    for other, row in enumerate(rows):
        half = len(row) // 2
        for number, digest in zip(row[:half], row[half:], strict=True):
            first.setdefault(number, (other, digest))
    for shard, number, digest in zip(shards, numbers, digests, strict=True):
        other, theirs = first[number]
        if digest != theirs:
            warnings.warn(
                f"'{shard.key}' has other numbers on rank {rank} than on rank {other}, whose are saved; replicas that "
                "drift apart are not synchronised",
                UserWarning,
                stacklevel=3,
            )
    return [shard for shard, number in zip(shards, numbers, strict=True) if first[number][0] == rank]


def _write_own(folder: Path, mine: list[Shard], known: Iterable[Shard], rank: int, size: int) -> None:
    """This rank's file, and beside it what is in it, for the first rank."""
    name = shard_file(rank, size)
    tensors: dict[str, torch.Tensor] = {}
    keys: dict[int, str] = {}  # experts that share an adapter: once in the file
    entries = {}
    for shard in mine:
        held = keys.setdefault(id(shard.parameter), shard.key)
        tensors[held] = shard.parameter
        alias = held if held != shard.key else ""
        pieces = tuple(Piece(name, ranges, at, alias) for ranges, at in shard.parts)
        entries[shard.key] = Layout(shard.shape, shard.parameter.dtype, pieces).values()
    if tensors:
        write_shard(folder / name, tensors)
    layers = {shard.layer: [shard.dim, shard.alpha] for shard in known if shard.dim}
    gated = any(shard.gated for shard in known)
    values = {"tensors": entries, "layers": layers, "gated": gated}
    write_file(_note(folder, rank, size), json.dumps(values).encode())


def _note(folder: Path, rank: int, size: int) -> Path:
    return (folder / shard_file(rank, size)).with_suffix(".json")


def _finished_start(folder: Path, kind: str, effects: list[str], size: int) -> dict[str, str] | None:
    """File -> digest of the start beside an adapter; None where the base is the original one."""
    if effects:
        _finish(folder, {"peft_type": "lora" if kind == "dora" else kind, "effect": effects[0]}, size)
    if not folder.is_dir():
        return None
    return {file.name: file_digest(file) for file in sorted(folder.iterdir())}


def _finish(folder: Path, config: Mapping[str, Any], size: int) -> None:
    """The JSON of the whole, from what all ranks have noted."""
    entries: dict[str, dict[str, Any]] = {}
    layers: dict[str, list[float]] = {}
    gated = False
    for rank in range(size):
        path = _note(folder, rank, size)
        if not path.is_file():
            raise OutputError(f"the first rank does not see '{path}'; save to a file system that all ranks share")
        noted: dict[str, Any] = read_object(path, path.read_bytes())
        path.unlink()
        for key, entry in noted["tensors"].items():
            whole = entries.setdefault(key, {**entry, "pieces": []})
            if (whole["shape"], whole["dtype"]) != (entry["shape"], entry["dtype"]):
                raise ModelError(
                    f"'{key}' is {entry['shape']} of {entry['dtype']} on rank {rank}, and {whole['shape']} of "
                    f"{whole['dtype']} before it; adapt all ranks alike"
                )
            whole["pieces"] += entry["pieces"]
        layers.update(noted["layers"])
        gated |= noted["gated"]
    ((most, _),) = Counter((dim, alpha) for dim, alpha in layers.values()).most_common(1)
    if not (config.get("target_modules") or config.get("exclude_modules") or config.get("canonical_mapping")):
        config = {name: value for name, value in config.items() if name != "target_modules"}
    common = {"dim": config.get("dim", most[0]), "alpha": config.get("alpha", most[1])}
    values = {
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        **config,
        **common,
        "gated_linear_unit": gated,
        "layers": {
            name: {"dim": dim, "alpha": alpha}
            for name, (dim, alpha) in sorted(layers.items())
            if (dim, alpha) != (common["dim"], common["alpha"])
        },
        "smartinit": __version__,
    }
    write_marker(folder, values, {key: layout_of(key, entry, str(folder)) for key, entry in entries.items()})


def _check_fits(saved: ShardedFolder, shard: Shard) -> None:
    """Whether the folder has what a parameter needs.

    Raises:
        ConfigError: it has not.
    """
    if shard.key not in saved:
        raise ConfigError(
            f"'{saved.path}' holds no '{shard.key}'; adapt the model as the saved one was: "
            f"peft_type={saved.config['peft_type']!r}, target_modules={saved.config['target_modules']}"
        )
    layers = saved.config.get("layers", {})
    own = layers.get(shard.projection, layers.get(shard.layer, {}))
    for name, ours in (("dim", shard.dim), ("alpha", shard.alpha)):
        theirs = own.get(name, saved.config[name])
        if ours and theirs != ours:
            raise ConfigError(
                f"'{shard.projection}' has {name} {theirs} in '{saved.path}', and {ours:g} in the model; adapt the "
                f"model with {name}={theirs}"
            )
    if saved.shape(shard.key) != shard.shape:
        raise ConfigError(
            f"'{shard.key}' is {saved.shape(shard.key)} in '{saved.path}', and {shard.shape} in the model; load it "
            "into the model that it was trained for, adapted with the same options"
        )
