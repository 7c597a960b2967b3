"""EVA (arXiv 2410.07170) through the two functions that PEFT has for it, with PEFT's signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from smartinit.activations.rows import (
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from smartinit.adapters.attach import write_factors
from smartinit.adapters.host import find_host
from smartinit.config import EvaConfig, LoraConfig
from smartinit.errors import ArgumentError, ConfigError, ModelError, UnknownNameError
from smartinit.factors import Factors
from smartinit.planning.scaling import plan_with_alphas
from smartinit.targets.names import match_names
from smartinit.targets.patterns import alpha_for, rank_for

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from torch import nn

    from smartinit.activations.rows import ForwardFn, PrepareLayerInputs, PrepareModelInputs
    from smartinit.adapters.host import Host
    from smartinit.planning.plan import Plan
    from smartinit.store import Store


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,  # noqa: ANN401  (a LoraConfig of this package or of PEFT)
    forward_fn: ForwardFn = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        PrepareLayerInputs | Mapping[str, PrepareLayerInputs] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    store: Store | str | os.PathLike[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Principal directions of every target layer's input, as many as its share of the rank budget.

    Args:
        model: a plain module, a `smartinit.LoraModel` or a ``peft.PeftModel``; it is left exactly as it was.
        dataloader: batches for the forward pass, iterated at most once.
        peft_config: what to adapt; None: the configuration of ``adapter_name`` on a wrapped model. On a plain module
            ``target_modules=None`` means every linear layer.
        forward_fn: ``(model, batch)``.
        prepare_model_inputs_fn: ``(batch, config)``, called once per batch; its result goes to the next.
        prepare_layer_inputs_fn: ``(layer_input, model_input, layer_name) -> (rows, features)``, or a mapping of such
            functions by module name, or None for all rows.
        adapter_name: which configuration of a wrapped model.
        gather_distributed_inputs: with several ranks, merge what they saw.
        show_progress_bar: on stderr.
        store: see `smartinit.compute`.

    Returns:
        Module name -> ``(rank, in_features)`` with orthonormal rows, in model order, on the model's device; rank 0 is
        possible. Names begin with ``base_model.model.`` if ``model`` is a ``peft.PeftModel``. No two tensors share
        memory, so `safetensors.torch.save_file` takes the dictionary.

    Raises:
        ConfigError: a plain module without ``peft_config``; options that cannot be; targets that match nothing.
        DataError: no data, too few tokens, or NaN in a layer's input.
    """
    from smartinit.pipeline import compute

    host = _host_or_none(model)
    if peft_config is None:
        if host is None:
            raise ConfigError(
                f"peft_config is required, because a {type(model).__name__} carries no adapter; pass a LoraConfig"
            )
        peft_config = host.config(adapter_name)
    artefact = compute(
        model,
        peft_config,
        dataloader,
        method="eva",
        forward_fn=forward_fn,
        prepare_model_inputs_fn=prepare_model_inputs_fn,
        prepare_layer_inputs_fn=prepare_layer_inputs_fn,
        adapter_name=adapter_name,
        gather_distributed_inputs=gather_distributed_inputs,
        show_progress_bar=show_progress_bar,
        none_means="all",
        store=store,
    )
    prefix = host.prefix if host else ""
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))
    # Copies: layers that read one input have the same directions, and files refuse shared memory.
    return {
        f"{prefix}{name}": artefact.factors[name].a.detach().to(device=device, copy=True).contiguous()
        for name in artefact.plan.ranks
        if name in artefact.factors
    }


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, torch.Tensor] | None = None,
    forward_fn: ForwardFn = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        PrepareLayerInputs | Mapping[str, PrepareLayerInputs] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    store: Store | str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Compute EVA's directions, unless they are given, and write them into an adapter (see `write_factors`).

    Args:
        model: a `smartinit.LoraModel` or a ``peft.PeftModel`` with ``init_lora_weights="eva"``; changed in place.
        dataloader: see `get_eva_state_dict`; not needed with a state dictionary.
        eva_state_dict: what `get_eva_state_dict` returned, here or in PEFT, for the wrapped or for the plain model.
            It is only read.
        forward_fn: see `get_eva_state_dict`.
        prepare_model_inputs_fn: see `get_eva_state_dict`.
        prepare_layer_inputs_fn: see `get_eva_state_dict`.
        adapter_name: which adapter.
        gather_distributed_inputs: see `get_eva_state_dict`.
        show_progress_bar: see `get_eva_state_dict`.
        store: see `smartinit.compute`.

    Returns:
        ``model``. After an error it is as it was.

    Raises:
        ModelError: the model carries no adapters, or several are active.
        ConfigError: ``init_lora_weights`` is not ``"eva"``, or neither data nor a state dictionary is given.
        ArgumentError: an entry of the state dictionary is no matrix.
        UnknownNameError: there is no such adapter, or an entry is for a layer that has none.
        ArtefactError: a matrix does not fit its layer.
    """
    host = find_host(model)
    config = host.config(adapter_name)
    active = _active_adapters(model)
    if len(active) > 1:
        raise ModelError(
            f"EVA needs a single active adapter, but {len(active)} are: {', '.join(active)}; call "
            f"model.set_adapter('{adapter_name}') first"
        )
    if config.init_lora_weights != "eva":
        raise ConfigError(
            f"adapter '{adapter_name}' has init_lora_weights={config.init_lora_weights!r}; initialize_lora_eva_weights "
            "needs a configuration with init_lora_weights='eva'"
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("pass a dataloader to compute EVA's directions from, or an eva_state_dict with them")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
            store=store,
        )
    factors, plan = _as_factors(host, LoraConfig.from_any(config), eva_state_dict, adapter_name)
    return write_factors(model, factors, plan, adapter_name)


def _host_or_none(model: nn.Module) -> Host | None:
    try:
        return find_host(model)
    except ModelError:
        return None


def _as_factors(
    host: Host, config: LoraConfig, state_dict: Mapping[str, torch.Tensor], adapter_name: str
) -> tuple[dict[str, Factors], Plan]:
    """The directions as factors by target name, and the ranks and alphas that they imply."""
    layers: dict[str, Any] = dict(host.layers(adapter_name))
    layer_of = match_names(state_dict, layers)
    if not layer_of:
        raise UnknownNameError(
            f"none of the {len(state_dict)} names in eva_state_dict is a layer with adapter '{adapter_name}'; is it "
            "for another model?"
        )
    factors, ranks = {}, {}
    for name, directions in state_dict.items():
        if getattr(directions, "ndim", None) != 2:  # noqa: PLR2004  (a matrix)
            shape = tuple(getattr(directions, "shape", ()))
            raise ArgumentError(
                f"eva_state_dict['{name}'] is a {type(directions).__name__} of shape {shape}; expected a tensor of "
                "shape (rank, in_features)"
            )
        target = layer_of.get(name, name)  # write_factors names an unknown one
        ranks[target] = directions.shape[0]
        out_features = layers[target].out_features if target in layers else 0
        factors[target] = Factors(directions, directions.new_zeros(out_features, ranks[target]))
    plan = plan_with_alphas(
        ranks,
        {name: rank_for(config, name) for name in ranks},
        {name: alpha_for(config, name) for name in ranks},
        use_rslora=config.use_rslora,
        adjust=(config.eva_config or EvaConfig()).adjust_scaling_factors,
    )
    return factors, plan


def _active_adapters(model: nn.Module) -> list[str]:
    """A property on wrapped models, a method on models in which PEFT injected layers."""
    active: Any = getattr(model, "active_adapters", ())
    return list(active() if callable(active) else active)
