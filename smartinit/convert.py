"""Between a split and the unmodified base: write the residual model, and bring a trained split back to plain LoRA."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.base_weight import become, give_up
from smartinit.adapters.conversion import Conversion, convert
from smartinit.errors import ConfigError, ModelError, UnknownNameError
from smartinit.formats.card import converted_card
from smartinit.formats.files import new_folder, write_file
from smartinit.formats.patterns import compact_patterns
from smartinit.formats.peft import CONFIG_FILE, TENSOR_FILE, read_adapter, read_file, read_object, write_files
from smartinit.formats.record import START_FOLDER
from smartinit.formats.start import read_start
from smartinit.formats.tensors import stored_tensors
from smartinit.targets.sharing import users_of_weights
from smartinit.targets.weight import Target

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import nn

    from smartinit.artefact import Artefact
    from smartinit.formats.start import Start

__all__ = ["Conversion", "convert_adapter", "residual_weights", "save_residual_model"]

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
) -> Conversion:
    """Write what was trained from a split start as plain LoRA for the unmodified base model.

    The result needs neither the residual model nor the start: it has twice the rank, or ``rank`` with the error that
    costs. modules_to_save, biases, DoRA's magnitudes, embeddings and trained tokens come along.

    Args:
        trained_folder: the adapter after training, in PEFT's format.
        start_folder: the artefact's folder, or an adapter that PEFT has saved before training; None: the start that
            the trained folder itself keeps.
        out_folder: where to.
        rank: at most this rank per layer, by truncated SVD; None: twice the rank, exactly.
        dtype: of the matrices; None: the wider of the two that come in.
        force: replace an existing adapter folder.

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
    trained = read_adapter(trained_folder, allow_others=True)
    if start_folder is None and not (trained.folder / START_FOLDER).is_dir():
        raise ConfigError(
            f"'{trained.folder}' keeps no start of its own; name the folder that the training began with as start"
        )
    if (trained.folder / REPORT_FILE).is_file():
        raise ConfigError(f"'{trained.folder}' was converted already ({REPORT_FILE} says so); use it as it is")
    start = read_start(trained.folder if start_folder is None else start_folder)
    conversion = convert(trained, start, rank=rank, dtype=dtype)
    tensors: dict[str, torch.Tensor] = dict(conversion.others)
    tensors |= stored_tensors(conversion.factors, dtype=None, forms=trained.forms)
    config_file = trained.folder / CONFIG_FILE
    config = _plain_config(read_object(config_file, read_file(config_file)), conversion)
    base_model = start.base_model or trained.config.base_model_name_or_path
    config["base_model_name_or_path"] = base_model
    with new_folder(out_folder, force=force, marker=CONFIG_FILE) as unfinished:
        write_files(unfinished, config, tensors)
        write_file(unfinished / REPORT_FILE, _report(conversion, trained.folder, start).encode())
        card = converted_card(conversion.plan, base_model=base_model, error=conversion.error)
        write_file(unfinished / CARD_FILE, card.encode())
    return conversion


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


def _plain_config(trained: dict[str, object], conversion: Conversion) -> dict[str, object]:
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
        "trained_sha256": hashlib.sha256(read_file(trained / TENSOR_FILE)).hexdigest(),
    }
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
