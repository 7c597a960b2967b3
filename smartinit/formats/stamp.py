"""Stamps in the metadata of ``adapter_model.safetensors``: which other files it was written with.

Two files cannot be replaced in one step, and a start in a sub-folder outlives the adapter above it. So the tensors
name the configuration that they were written with, and the start whose base they belong to; a start names the layers
of its adapter. Loaders that know nothing of stamps, PEFT's among them, are not disturbed, and lose them when they save.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from smartinit.factors import Factors

CONFIG_STAMP = "smartinit.config"
"""Of an adapter: `config_digest` of its configuration."""
START_STAMP = "smartinit.start"
"""Of an adapter on a base that gave its start up: `file_digest` of the start's tensor file."""
OWNER_STAMP = "smartinit.start_of"
"""Of a start: `layers_digest` of the adapter."""

# What the tensors mean nothing without. The rest, such as the base model's name, people edit by hand.
_ABOUT_TENSORS = (
    "alpha_pattern",
    "bias",
    "layer_replication",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
)


def config_digest(config: Mapping[str, object]) -> str:
    """Of those fields of ``adapter_config.json`` that say what the tensors compute; sha256, hexadecimal.

    Args:
        config: values that JSON has a form for.
    """
    return _digest({key: config.get(key) for key in _ABOUT_TENSORS})


def layers_digest(factors: Mapping[str, Factors]) -> str:
    """Of an adapter's layers: their names, ranks and sizes, in any order; sha256, hexadecimal."""
    return _digest(sorted([name, pair.rank, pair.a.shape[1], pair.b.shape[0]] for name, pair in factors.items()))


def file_digest(path: Path) -> str:
    """Of a file's content, read in pieces; sha256, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
