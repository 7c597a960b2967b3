"""Starts that were computed beside Megatron's layers, in the names of a Hugging Face model.

`smartinit.megatron.LoRA.initialize` returns, and `smartinit.Artefact.save` writes, the names of Megatron's layers; of a
projection of one ``….linear_qkv.adapter_q``, of one expert of a grouped layer ``….experts.linear_fc1.weight3``.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from smartinit.errors import ArtefactError
from smartinit.formats.megatron_names import grouped, local_expert
from smartinit.formats.megatron_to_peft import peft_adapter
from smartinit.formats.tensors import Form
from smartinit.megatron_reading import as_peft
from smartinit.targets.patterns import alpha_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

    from smartinit.config import LoraConfig
    from smartinit.factors import Effect, Factors
    from smartinit.formats.megatron_names import Spelling
    from smartinit.formats.megatron_shape import DecoderShape
    from smartinit.formats.peft import StoredAdapter
    from smartinit.formats.start import Start

_NAME = re.compile(r"(?P<module>.+?)(?:\.weight(?P<expert>\d+))?(?:\.(?P<part>adapter_(?:q|k|v|gate|up)))?")


def has_megatron_names(names: Iterable[str]) -> bool:
    """Whether these are names of Megatron's layers, or of their projections and experts."""
    return any(_module(name) is not None for name in names)


def start_in_peft_names(start: Start, shape: DecoderShape, spelling: Spelling) -> Start:
    """A start with Megatron's names as one with those of a Hugging Face model.

    Args:
        start: as `smartinit.formats.start.read_start` reads it.
        shape: of the model.
        spelling: how the model writes its names.

    Raises:
        ArtefactError: a name that is not known; rows that do not fit the model.
        ConfigError: the shape is needed and not known.
    """
    if start.config is None:
        return start
    factors: dict[str, Factors] = {}
    effects: dict[str, Effect] = {}
    config: LoraConfig = start.config
    for effect in sorted({start.effects[name] for name in start.factors}):
        some = {name: pair for name, pair in start.factors.items() if start.effects[name] == effect}
        config, made = _renamed(start.folder, start.config, some, shape, spelling)
        factors |= made
        effects |= dict.fromkeys(made, effect)
    if len(set(effects.values())) > 1:
        raise ArtefactError(f"'{start.folder}' splits some layers and not others; a start of one kind is expected")
    return replace(start, config=config, factors=factors, forms={name: Form() for name in factors}, effects=effects)


def adapter_in_peft_names(stored: StoredAdapter, shape: DecoderShape, spelling: Spelling) -> StoredAdapter:
    """An adapter folder of PEFT with Megatron's names, as `start_in_peft_names`.

    Raises:
        As `start_in_peft_names`.
    """
    config, factors = _renamed(stored.folder, stored.config, stored.factors, shape, spelling)
    return replace(stored, config=config, factors=factors, forms={name: Form() for name in factors})


def _renamed(
    folder: Path, config: LoraConfig, factors: Mapping[str, Factors], shape: DecoderShape, spelling: Spelling
) -> tuple[LoraConfig, dict[str, Factors]]:
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, pair in factors.items():
        match = _NAME.fullmatch(name)
        if match is None or _module(name) is None:
            raise ArtefactError(f"'{name}' in '{folder}' is no layer of Megatron's, as the others are")
        module = match["module"] if match["expert"] is None else local_expert(match["module"], int(match["expert"]))
        inner = f".{match['part']}" if match["part"] else ""
        tensors[f"{module}.adapter{inner}.linear_in.weight"] = pair.a
        tensors[f"{module}.adapter{inner}.linear_out.weight"] = pair.b
        if pair.magnitude is not None:
            tensors[f"{module}.adapter{inner}.weight_magnitude"] = pair.magnitude
        alpha = alpha_for(config, name) * (math.sqrt(pair.rank) if config.use_rslora else 1)
        layers[f"{module}{inner}"] = {"dim": pair.rank, "alpha": alpha}
    values = {
        "alpha": config.lora_alpha,
        "layers": layers,
        "dropout": config.lora_dropout,
        "task_type": config.task_type,
        "base_model": config.base_model_name_or_path,
    }
    made = peft_adapter(tensors, values, shape, replace(spelling, experts="modules"))
    found, _, renamed, _ = as_peft(values, folder, made)
    found.init_lora_weights = config.init_lora_weights
    return found, renamed


def _module(name: str) -> str | None:
    """Megatron's name of the layer; None: it is not known."""
    match = _NAME.fullmatch(name)
    try:
        return None if match is None else grouped(match["module"]).module
    except ArtefactError:
        return None
