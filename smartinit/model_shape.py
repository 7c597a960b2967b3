"""The shape of a decoder, from what a caller says, a model's folder, or its name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartinit.errors import ConfigError, MissingDependencyError, MissingFileError, ModelError
from smartinit.formats.megatron_fusion import HeadShape
from smartinit.formats.megatron_shape import DecoderShape, lacks_numbers, shape_of

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

_MOST_BYTES = 2**24  # of config.json


def decoder_shape(
    model: str | os.PathLike[str] | None,
    *,
    heads: int | None = None,
    groups: int | None = None,
    head_size: int | None = None,
    gated: bool | None = None,
    expert_count: int | None = None,
    known: DecoderShape | None = None,
    base_model: str | None = None,
) -> DecoderShape:
    """What is said explicitly, over what ``model``'s configuration says, over what is known.

    Args:
        model: folder with a ``config.json``, or a name on the hub.
        heads: of the queries.
        groups: of heads that share a key and a value; None with ``heads``: each its own.
        head_size: of one head.
        gated: whether feed-forward layers have a gate.
        expert_count: experts of a layer.
        known: from the adapter itself.
        base_model: the adapter's name for its model, tried where nothing else says anything; without the network.

    Raises:
        ConfigError: ``heads`` without ``head_size``, or numbers that cannot be.
        MissingFileError: there is no such model.
        ModelError: its configuration is broken.
    """
    shape = known or DecoderShape()
    if model is not None:
        shape = shape_of(model_config(model))
    elif known is None and base_model and heads is None:
        try:
            shape = shape_of(model_config(base_model, local=True))
        except (MissingFileError, MissingDependencyError):
            shape = DecoderShape()
    if heads is not None or groups is not None or head_size is not None:
        shape = replace(shape, heads=_heads(shape.heads, heads, groups, head_size))
    if expert_count is not None:
        if expert_count < 1:
            raise ConfigError(f"expert_count={expert_count}: expected at least 1")
        shape = replace(shape, experts=expert_count)
    return shape if gated is None else replace(shape, gated=gated)


def model_config(model: str | os.PathLike[str], *, local: bool = False) -> Mapping[str, Any]:
    """The configuration of a model as plain values; transformers is asked only for what ``config.json`` leaves out.

    Args:
        model: folder, or a name on the hub.
        local: look on this machine only.

    Raises:
        MissingFileError: there is none.
        ModelError: it is broken.
        MissingDependencyError: a name on the hub, without transformers.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return _of_transformers(str(model), local=local)
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"the model folder '{folder}' has no config.json; is it a transformers model folder?")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ModelError(f"'{path}' has more than {_MOST_BYTES >> 20} MiB, so it is no config.json")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"'{path}' is not JSON ({error}); download the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"'{path}' must hold a JSON object, not a {type(config).__name__}")
    if lacks_numbers(config) and config.get("model_type"):
        try:  # a family's defaults
            return _of_transformers(str(folder), local=True)
        except (MissingFileError, MissingDependencyError):
            return config
    return config


def _of_transformers(name: str, *, local: bool) -> Mapping[str, Any]:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise MissingDependencyError(
            f"'{name}' is no folder, and transformers, which finds models by name, is not installed; name a folder "
            "with config.json in it"
        ) from error
    try:
        values: Mapping[str, Any] = AutoConfig.from_pretrained(name, local_files_only=local).to_dict()
    except Exception as error:  # whatever a loader of configurations finds wrong
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingFileError(
            f"'{name}' is neither a model folder nor a model that can be found by name ({first}); check model (--model)"
        ) from error
    return values


def _heads(known: HeadShape | None, heads: int | None, groups: int | None, size: int | None) -> HeadShape:
    if known is None and (heads is None or size is None):
        raise ConfigError(
            "heads, groups and head_size (--heads, --groups, --head-size) describe the attention together: give heads "
            "and head_size, and groups where several heads share a key"
        )
    return HeadShape(
        heads if heads is not None else known.heads,  # type: ignore[union-attr] # given or known
        groups if groups is not None else (known.groups if known and heads is None else heads),  # type: ignore[arg-type]
        size if size is not None else known.size,  # type: ignore[union-attr]
    )
