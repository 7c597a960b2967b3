"""A folder with Megatron's adapters as what a PEFT folder holds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from smartinit.config import LoraConfig
from smartinit.errors import ArtefactError
from smartinit.factors import Factors
from smartinit.formats.megatron_experts import parameter_matrices
from smartinit.formats.megatron_folder import MARKER, ShardedFolder
from smartinit.formats.megatron_names import Spelling, spelling_of, to_megatron
from smartinit.formats.megatron_shape import shape_of
from smartinit.formats.megatron_start import start_in
from smartinit.formats.megatron_to_peft import peft_adapter
from smartinit.formats.patterns import compact_patterns
from smartinit.formats.peft import StoredAdapter
from smartinit.formats.start import as_start, read_start
from smartinit.formats.tensors import Form
from smartinit.model_shape import decoder_shape
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    import torch

    from smartinit.factors import Effect
    from smartinit.formats.megatron_shape import DecoderShape
    from smartinit.formats.megatron_to_peft import PeftAdapter
    from smartinit.formats.start import Start


def read_megatron(
    folder: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    spelling: Spelling | None = None,
    shape: DecoderShape | None = None,
) -> StoredAdapter:
    """An adapter folder of Megatron's as what `smartinit.formats.peft.read_adapter` makes of one of PEFT's.

    Args:
        folder: with ``megatron_adapter.json``.
        model: the base model's folder or name; see `export_adapter`.
        spelling: how the model writes its names; None: what the folder says, or else as most do.
        shape: of the model; None: from ``model`` or the folder.

    Raises:
        As `export_adapter`.
    """
    stored = ShardedFolder.open(folder)
    known = shape or decoder_shape(model, known=known_shape(stored), base_model=base_model(stored))
    made = peft_adapter(tensors_of(stored), stored.config, known, spelling or spelling_in(stored))
    config, _, factors, _ = as_peft(stored.config, stored.path, made)
    return StoredAdapter(stored.path, config, factors, {name: Form() for name in factors})


def read_megatron_start(
    folder: str | os.PathLike[str], *, shape: DecoderShape | None = None, spelling: Spelling | None = None
) -> Start:
    """What the base gave up for a Megatron folder before its training.

    One that `smartinit.export.export_adapter` or `smartinit.megatron.save_adapter` has written says so. Of any other
    the base is taken to have given up ``s·B A`` if that is not zero, as of PEFT's folders.

    Args:
        folder: with ``megatron_adapter.json``.
        shape: of the model, if the caller knows more than the folder.
        spelling: how the model writes its names; None: as the folder says, each expert a module, because stacked ones
            cannot be converted.

    Raises:
        ArtefactError: it is no such folder, or its start is lost.
        VerificationError: the start is another one.
        ConfigError: the shape of the model is needed and not known.
    """
    stored = ShardedFolder.open(folder)
    names = spelling or replace(spelling_in(stored), experts="modules")
    kept = start_in(stored.path)
    if kept is not None and (kept / MARKER).is_file():
        return replace(_sharded_start(kept, shape, names), base_model=base_model(stored))
    if kept is not None:
        return replace(read_start(kept), base_model=base_model(stored))
    if "effect" in stored.config:  # the start in another folder, named by itself
        return _sharded_start(stored.path, shape, names)
    adapter = read_megatron(folder, shape=shape)
    effect: Effect = "keeps" if "start" in stored.config else "splits"
    return replace(as_start(adapter), effects=dict.fromkeys(adapter.factors, effect), base_model=base_model(stored))


def _sharded_start(folder: Path, shape: DecoderShape | None, spelling: Spelling) -> Start:
    """A start that a parallel model's base gave up, see `smartinit.megatron.kept_start`."""
    said = ShardedFolder.open(folder).config.get("effect")
    if said not in ("splits", "quantises"):
        raise ArtefactError(f"'{folder / MARKER}' says effect={said!r:.200}; expected 'splits' or 'quantises'")
    adapter = read_megatron(folder, shape=shape, spelling=spelling)
    effect: Effect = "quantises" if said == "quantises" else "splits"
    return replace(as_start(adapter), effects=dict.fromkeys(adapter.factors, effect))


def read_megatron_trained(
    folder: str | os.PathLike[str], start: Start, shape: DecoderShape
) -> tuple[StoredAdapter, Start]:
    """A trained Megatron folder in the names of its start; and that start, which knows of all of its layers.

    A fused layer trains projections that had no adapter at the start: their base has given nothing up.

    Args:
        folder: with ``megatron_adapter.json``.
        start: what the training began with.
        shape: of the model.

    Raises:
        As `read_megatron`.
    """
    trained = read_megatron(folder, spelling=spelling_of(start.effects), shape=shape)
    places = {to_megatron(name, gated=shape.gated).module for name in start.effects}
    effects = dict(start.effects)
    for name in trained.factors:
        if name not in effects and to_megatron(name, gated=shape.gated).module in places:
            effects[name] = "keeps"
    return trained, replace(start, effects=effects)


def tensors_of(stored: ShardedFolder) -> dict[str, torch.Tensor]:
    """All tensors, whole."""
    return {key: stored.read(key) for key in stored.layouts}


def known_shape(stored: ShardedFolder) -> DecoderShape | None:
    """What a Megatron folder says of its model."""
    said = stored.config.get("model_shape")
    if not isinstance(said, dict):
        return None
    return shape_of(said)


def as_peft(
    values: Mapping[str, Any], folder: Path, made: PeftAdapter
) -> tuple[LoraConfig, Plan, dict[str, Factors], dict[str, str]]:
    """Configuration, ranks, matrices, and which names are parameters', as PEFT's files have them.

    Args:
        values: what the folder says besides: ``dropout``, ``task_type``, ``base_model``.
        folder: for messages.
        made: the adapter.

    Raises:
        ArtefactError: it has no layer.
    """
    factors = {name: Factors(u.a, u.b, magnitude=u.magnitude) for name, u in made.layers.items()}
    updates = {name: (u.rank, u.alpha) for name, u in made.layers.items()}
    parameters: dict[str, str] = {}
    for name, update in made.stacks.items():  # of two parts around one module the first is the inner one
        module = name.rpartition(".")[0]
        both = [one for one in made.stacks if one.rpartition(".")[0] == module]
        path = f"{module}.base_layer" if len(both) > 1 and name.endswith(".gate_up_proj") else module
        factors[path] = Factors(*parameter_matrices(update))
        updates[path] = update.rank, update.alpha
        parameters[path] = name
    if not factors:
        raise ArtefactError(f"'{folder}' holds no adapter weights")
    plan = Plan({name: r for name, (r, _) in updates.items()}, {name: alpha for name, (_, alpha) in updates.items()})
    dropout, task, model = values.get("dropout", 0.0), values.get("task_type"), values.get("base_model")
    full = {name: parameters.get(name, name) for name in updates}  # patterns know parameters by their own names
    patterns = compact_patterns(
        Plan({full[n]: r for n, r in plan.ranks.items()}, {full[n]: alpha for n, alpha in plan.alphas.items()})
    )
    config = LoraConfig(
        r=patterns.r,
        lora_alpha=patterns.lora_alpha,
        rank_pattern=patterns.rank_pattern,
        alpha_pattern=patterns.alpha_pattern,
        lora_dropout=float(dropout) if isinstance(dropout, (int, float)) and not parameters else 0.0,
        target_modules=[name for name in plan.ranks if name not in parameters] or None,
        target_parameters=list(parameters.values()) or None,
        use_dora=any(update.magnitude is not None for update in made.layers.values()),
        task_type=task if isinstance(task, str) else None,
        base_model_name_or_path=model if isinstance(model, str) else None,
        inference_mode=True,
    )
    return config, plan, factors, parameters


def base_model(stored: ShardedFolder) -> str | None:
    """The name of the adapter's model, if the folder has it."""
    name = stored.config.get("base_model")
    return name if isinstance(name, str) else None


def spelling_in(stored: ShardedFolder) -> Spelling:
    """How the folder says that the model writes its names; else as transformers 5 does."""
    said = stored.config.get("peft_names")
    if said is not None:
        return Spelling.from_dict(said)
    seeing = any(key.startswith("language_model.") for key in stored.layouts)
    return Spelling(prefix="model.language_model.") if seeing else Spelling()
