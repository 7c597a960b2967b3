"""Adapters of a model in kohya's format for image models; the format itself is `smartinit.formats.kohya`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from smartinit.adapters.bare import bare_module_names
from smartinit.adapters.injection import drop
from smartinit.adapters.loading import put_in, require_finite
from smartinit.adapters.state import adapter_state, as_matrices, residual_starts, stored_layers, stored_others
from smartinit.config import LoraConfig
from smartinit.errors import ArtefactError, ConfigError
from smartinit.formats.kohya import read_kohya, write_kohya
from smartinit.formats.patterns import compact_patterns, exact_target_modules
from smartinit.formats.peft import StoredAdapter

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import torch

    from smartinit.adapters.adapted import AdaptedModel
    from smartinit.adapters.layer import LoraLayer
    from smartinit.formats.tensors import Form


def save_kohya(
    model: AdaptedModel,
    file: str | os.PathLike[str],
    adapter_name: str,
    prefix: str,
    *,
    dtype: torch.dtype | None,
    others: Mapping[str, torch.Tensor] | None,
) -> None:
    """See `smartinit.LoraModel.save_kohya`."""
    config, layers = model.config_of(adapter_name), stored_layers(model.model, adapter_name)
    beyond = next(iter(stored_others(model.model, adapter_name, config)), None)
    if beyond is not None or config.target_parameters:
        what = f"'{beyond}'" if beyond is not None else f"target_parameters={config.target_parameters!r}"
        raise ConfigError(
            f"adapter '{adapter_name}' has more than LoRA's matrices ({what}), for which kohya's format has no place; "
            "save it with save_pretrained"
        )
    if residual_starts(layers, adapter_name) is not None:
        raise ConfigError(
            f"the base has given up the start of adapter '{adapter_name}', which kohya's format cannot say: save it "
            "with save_pretrained and path_initial_model_for_weight_conversion, and load that into the unmodified base"
        )
    state = adapter_state(layers, adapter_name)
    write_kohya(file, state.plan, state.factors, prefix=prefix, forms=state.forms, dtype=dtype, others=others)


def load_kohya(
    model: AdaptedModel, file: str | os.PathLike[str], adapter_name: str, prefix: str, *, is_trainable: bool
) -> None:
    """See `smartinit.LoraModel.load_kohya`."""
    names = bare_module_names(model.model)
    read = read_kohya(file, names, prefix)
    patterns = compact_patterns(read.plan)
    said = {  # as a file says it: alphas need not be positive there
        "peft_type": "LORA",
        "r": patterns.r,
        "lora_alpha": patterns.lora_alpha,
        "rank_pattern": patterns.rank_pattern,
        "alpha_pattern": patterns.alpha_pattern,
        "target_modules": exact_target_modules(read.factors, names, complete=True),
        "use_dora": _uses_dora(file, {name: pair.magnitude is not None for name, pair in read.factors.items()}),
        "inference_mode": not is_trainable,
    }
    config = LoraConfig.from_dict(said)
    stored = StoredAdapter(Path(file), config, read.factors, read.forms)
    require_finite(stored)
    model.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
    try:
        layers = stored_layers(model.model, adapter_name)
        forms = {name: _form(layers[name], adapter_name, form) for name, form in read.forms.items()}
        put_in(model.model, adapter_name, replace(stored, forms=forms), config)
    except BaseException:
        drop(model.model, adapter_name)
        del model.peft_config[adapter_name]
        raise


def _form(layer: LoraLayer, adapter_name: str, form: Form) -> Form:
    """The layer's form where the file has a kernel of single points for a linear layer, or the other way round."""
    own = as_matrices(layer, adapter_name)[1]
    same = not own.embedding and math.prod(form.kernel) == math.prod(own.kernel) == 1
    return own if same else form


def _uses_dora(file: str | os.PathLike[str], decomposed: Mapping[str, bool]) -> bool:
    if len(set(decomposed.values())) > 1:
        plain = next(name for name, dora in decomposed.items() if not dora)
        raise ArtefactError(f"'{file}' decomposes some layers (DoRA) but not '{plain}'; an adapter is either one")
    return all(decomposed.values())
