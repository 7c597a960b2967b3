"""Between a split and the unmodified base: write the residual model, and bring a trained split back to plain LoRA."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.base_weight import become, give_up
from smartinit.adapters.conversion import Conversion, convert, scaling_for
from smartinit.errors import ConfigError, ModelError, UnknownNameError, VerificationError
from smartinit.formats.card import converted_card
from smartinit.formats.files import new_folder, write_file
from smartinit.formats.megatron_folder import MARKER, ShardedFolder
from smartinit.formats.megatron_names import spelling_of
from smartinit.formats.megatron_start import start_in
from smartinit.formats.patterns import compact_patterns
from smartinit.formats.peft import (
    CONFIG_FILE,
    TENSOR_FILE,
    adapter_config,
    read_adapter,
    read_file,
    read_object,
    write_files,
)
from smartinit.formats.record import START_FOLDER
from smartinit.formats.start import read_start
from smartinit.formats.tensors import stored_tensors
from smartinit.megatron_reading import (
    base_model as base_name,
)
from smartinit.megatron_reading import (
    known_shape,
    read_megatron,
    read_megatron_start,
    read_megatron_trained,
    spelling_in,
)
from smartinit.megatron_start_names import has_megatron_names, start_in_peft_names
from smartinit.model_shape import decoder_shape
from smartinit.targets.sharing import users_of_weights
from smartinit.targets.weight import Target

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import nn

    from smartinit.artefact import Artefact
    from smartinit.formats.megatron_shape import DecoderShape
    from smartinit.formats.peft import StoredAdapter
    from smartinit.formats.start import Start

__all__ = ["Conversion", "convert_adapter", "residual_weights", "save_residual_model"]

_SAME = 1e-3  # apart, relative: half precision, and factors that were cut and put together again
REPORT_FILE = "conversion.json"
CARD_FILE = "README.md"
# A loader must not run the start again, nor look for the files of a method.
_PLAIN: Mapping[str, object] = {
    "corda_config": None,
    "eva_config": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "loftq_config": {},
    "lora_ga_config": None,
}


def convert_adapter(
    trained_folder: str | os.PathLike[str],
    start_folder: str | os.PathLike[str] | None,
    out_folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    model: str | os.PathLike[str] | None = None,
    heads: int | None = None,
    groups: int | None = None,
    head_size: int | None = None,
    gated: bool | None = None,
    expert_count: int | None = None,
) -> Conversion:
    """Write what was trained from a split start as plain LoRA for the unmodified base model.

    The result needs neither the residual model nor the start: it has twice the rank, or ``rank`` with the error that
    costs. modules_to_save, biases, DoRA's magnitudes, embeddings and trained tokens come along.

    Args:
        trained_folder: the adapter after training, in PEFT's format or in Megatron's.
        start_folder: the artefact's folder, in the names of either, or an adapter that PEFT has saved before training,
            or what `smartinit.export.export_adapter` has made of one; None: the start that the trained folder keeps.
        out_folder: where to.
        rank: at most this rank per layer, by truncated SVD; None: twice the rank, exactly.
        dtype: of the matrices; None: the wider of the two that come in.
        force: replace an existing adapter folder.
        model: the base model's folder or name, for the heads in Megatron's fused layers, where neither folder has them.
        heads: as of `smartinit.export.export_adapter`, and so the others.
        groups: of heads.
        head_size: of one.
        gated: whether feed-forward layers have a gate.
        expert_count: experts of a layer.

    Returns:
        The conversion, with its relative error per layer and over all.

    Raises:
        MissingFileError: a folder is missing.
        ArtefactError: a folder is no adapter; or the two are for different models or layers.
        VerificationError: the start is not the one that was written; a value is not finite.
        ConfigError: a start that quantises the base; ``rank`` below 1.
        OutputError: the output exists (without ``force``), holds other things, or cannot be written.

    Cost: O((in + out)·r²) per layer; no matrix of a layer's size is formed.
    """
    said = {
        "model": model,
        "heads": heads,
        "groups": groups,
        "head_size": head_size,
        "gated": gated,
        "expert_count": expert_count,
    }
    trained, start, told = _read(trained_folder, start_folder, said)
    conversion = convert(trained, start, rank=rank, dtype=dtype, fused=told is None)
    tensors: dict[str, torch.Tensor] = dict(conversion.others)
    tensors |= stored_tensors(conversion.factors, dtype=None, forms=trained.forms)
    config = _plain_config(told or adapter_config(trained.config, conversion.plan), conversion)
    base_model = start.base_model or trained.config.base_model_name_or_path
    config["base_model_name_or_path"] = base_model
    with new_folder(out_folder, force=force, marker=CONFIG_FILE) as unfinished:
        write_files(unfinished, config, tensors)
        write_file(unfinished / REPORT_FILE, _report(conversion, trained.folder, start).encode())
        card = converted_card(conversion.plan, base_model=base_model, error=conversion.error)
        write_file(unfinished / CARD_FILE, card.encode())
    return conversion


def _read(
    trained_folder: str | os.PathLike[str], start_folder: str | os.PathLike[str] | None, said: Mapping[str, Any]
) -> tuple[StoredAdapter, Start, dict[str, object] | None]:
    """What was trained, its start, and the configuration in the trained folder, if that is PEFT's."""
    path = Path(trained_folder)
    where = path if start_folder is None else Path(start_folder)
    trained_there = ShardedFolder.open(path) if (path / MARKER).is_file() else None
    start_there = ShardedFolder.open(where) if (where / MARKER).is_file() else None
    trained = None if trained_there is not None else read_adapter(path, allow_others=True)
    if start_folder is None:
        has_one = start_in(path) is not None if trained_there is not None else (path / START_FOLDER).is_dir()
        if not has_one:
            raise ConfigError(
                f"'{path}' keeps no start of its own; name the folder that the training began with as start"
            )
    if (path / REPORT_FILE).is_file():
        raise ConfigError(f"'{path}' was converted already ({REPORT_FILE} says so); use it as it is")

    def shape(base_model: str | None) -> DecoderShape:
        folders = [folder for folder in (trained_there, start_there) if folder is not None]
        known = next((one for folder in folders if (one := known_shape(folder)) is not None), None)
        names = [name for folder in folders if (name := base_name(folder))]
        return decoder_shape(**{"model": None, **said}, known=known, base_model=next(iter(names), base_model))

    start = read_start(where) if start_there is None else read_megatron_start(where, shape=shape(None))
    if has_megatron_names(start.effects) and not (trained is not None and has_megatron_names(trained.factors)):
        written = spelling_in(trained_there) if trained_there is not None else spelling_of(trained.factors)  # type: ignore[union-attr]
        start = start_in_peft_names(start, shape(start.base_model), written)
        if start.config is None:  # it has split nothing, whatever its layers are called
            kept = trained or read_megatron(path, shape=shape(start.base_model))
            start = replace(start, effects=dict.fromkeys(kept.factors, "keeps"))
    keeps = trained_there is not None and (path / START_FOLDER).is_dir()  # not lost, as when one is given in its place
    if start_folder is not None and keeps and (own := start_in(path)) is not None:
        _check_same(read_megatron_start(own, shape=shape(start.base_model)), start, path)
    if trained is None:
        return *read_megatron_trained(path, start, shape(start.base_model)), None
    config_file = path / CONFIG_FILE
    return trained, start, read_object(config_file, read_file(config_file))


def _check_same(kept: Start, given: Start, trained: Path) -> None:
    """Whether a start is the one that the trained folder keeps, however its factors are put together.

    Raises:
        VerificationError: it is another one.
    """
    for name in sorted({*kept.splits, *given.splits}):
        one, other = (_split_of(start, name) for start in (kept, given))
        if one is None or other is None or (one - other).norm() > _SAME * one.norm():
            raise VerificationError(
                f"the start in '{given.folder}' is not the one that '{trained}' was trained from and keeps (they "
                f"differ at '{name}'); leave the start out, so that the kept one is used"
            )


def _split_of(start: Start, name: str) -> torch.Tensor | None:
    """``s₀·B₀ A₀``; None of a layer that has given up nothing."""
    if name not in start.splits or start.config is None:
        return None
    pair = start.factors[name]
    return pair.b.double() @ pair.a.double() * scaling_for(start.config, name, pair.rank)


def residual_weights(
    model: nn.Module, artefact: Artefact, *, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The weights that differ between the base model and the one that the artefact's factors are for.

    Of a split ``W - s·B A``, with the factors as they are rounded when they are stored; of a quantised layer its new
    base. In the shape, dtype and on the device of the model's own; the model is only read.

    Args:
        model: the unmodified base model, not wrapped.
        artefact: the start.
        dtype: that the artefact is, or was, saved with.

    Returns:
        Parameter name -> tensor.

    Raises:
        ModelError: an adapted model; or a weight that cannot be read, or does not fit its dtype.
        UnknownNameError: a layer of the artefact that the model does not have.
        ConfigError: a weight that another layer uses as well.
    """
    if getattr(model, "peft_config", None):
        raise ModelError(f"a {type(model).__name__} carries adapters already; give the base model as it was loaded")
    users = users_of_weights(model)
    weights: dict[str, torch.Tensor] = {}
    for name, pair in artefact.factors.items():
        if pair.effect not in ("splits", "quantises") or not pair.rank:
            continue
        target = Target.of(_submodule(model, name), name)
        sharing = [path for path, _ in users.get(target.stored_weight().data_ptr(), ()) if path != f"{name}.weight"]
        if sharing:
            raise ConfigError(
                f"'{name}' shares its weight with '{sharing[0]}', so the residual of one would be the base of the "
                "other; save the artefact with base='doubled', which leaves the base model alone"
            )
        twin = _with_own_weight(target)
        if pair.effect == "quantises" and pair.base is not None:
            become(twin, pair.base)
        elif pair.effect == "splits":
            give_up(twin, pair.a.to(dtype), pair.b.to(dtype), artefact.plan.scaling(name))
        weights[f"{name}.weight"] = twin.stored_weight()
    return weights


def save_residual_model(
    model: nn.Module,
    artefact: Artefact,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> Path:
    """Write the base model that a splitting or quantising artefact belongs to; ``model`` stays as it is.

    Args:
        model: the unmodified base model: one of transformers, or anything with its ``save_pretrained``.
        artefact: the start.
        folder: where to.
        dtype: that the artefact is, or was, saved with.
        force: replace an existing model folder.

    Raises:
        ConfigError: the artefact keeps the base, so there is nothing to write; or see `residual_weights`.
        ModelError: a model that cannot save itself; or see `residual_weights`.
        OutputError: the folder exists (without ``force``), holds other things, or cannot be written.

    Cost: memory for the weights that change.
    """
    if not callable(getattr(model, "save_pretrained", None)):
        raise ModelError(
            f"a {type(model).__name__} has no save_pretrained; put residual_weights(model, artefact) into its "
            "state dict and save that"
        )
    weights = residual_weights(model, artefact, dtype=dtype)
    if not weights:
        raise ConfigError(
            f"the method '{artefact.recipe.method}' keeps the base model, so there is no residual to write; use the "
            "base model itself"
        )
    with new_folder(folder, force=force, marker="config.json") as unfinished:
        saving: Any = model
        saving.save_pretrained(unfinished, state_dict={**model.state_dict(), **weights})
    return Path(folder)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UnknownNameError(f"the model has no layer '{name}'; is the artefact for another model?") from error


def _with_own_weight(target: Target) -> Target:
    """The same layer with a copy of the weight, which can be written to."""
    target.changeable_weight()  # a parameter, not computed from others
    module = copy.copy(target.module)
    own = torch.nn.Parameter(target.stored_weight().clone(), requires_grad=False)
    module._parameters = {**target.module._parameters, "weight": own}  # noqa: SLF001 - the original keeps its own
    return Target.of(module, target.name)


def _plain_config(trained: Mapping[str, object], conversion: Conversion) -> dict[str, object]:
    """The trained configuration with the new ranks; names that select its targets select them still."""
    patterns = compact_patterns(conversion.plan)
    return {
        **trained,
        **_PLAIN,
        "r": patterns.r,
        "lora_alpha": patterns.lora_alpha,
        "rank_pattern": patterns.rank_pattern,
        "alpha_pattern": patterns.alpha_pattern,
    }


def _report(conversion: Conversion, trained: Path, start: Start) -> str:
    content = {
        "error": conversion.error,
        "errors": dict(conversion.errors),
        "ranks": dict(conversion.plan.ranks),
        "dropped": list(conversion.dropped),
        "start_split": start.splits,
        "trained_sha256": _digest(trained),
    }
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False)


def _digest(folder: Path) -> str:
    """Of the tensors of an adapter folder, of Megatron's in all of its files."""
    files = sorted(folder.glob("shard-*.safetensors")) if (folder / MARKER).is_file() else [folder / TENSOR_FILE]
    digest = hashlib.sha256()
    for file in files:
        digest.update(read_file(file))
    return digest.hexdigest()
