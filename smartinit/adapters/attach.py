"""Write computed factors into a model that carries adapters: a `LoraModel` or a ``peft.PeftModel``."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.bare import bare_module_names
from smartinit.adapters.base_weight import Written, become, changes_of_base, give_up
from smartinit.adapters.host import adapter_parameters, factor_parameters, find_host, parts_of
from smartinit.adapters.layer import LoraLayer
from smartinit.adapters.magnitude import set_magnitude
from smartinit.adapters.offset import subtract_start
from smartinit.adapters.rollback import undone_on_error
from smartinit.adapters.start import OriginalWeight, Start, forget_start, start_of, starts_of
from smartinit.adapters.tied_factors import is_tied, with_tied
from smartinit.errors import ArtefactError, ConfigError, UnknownNameError
from smartinit.formats.patterns import compact_patterns, exact_target_modules
from smartinit.planning.plan import Plan
from smartinit.targets.names import match_names
from smartinit.targets.weight import Target, host_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from smartinit.adapters.host import Host
    from smartinit.adapters.rollback import BaseCopies
    from smartinit.adapters.start import Base
    from smartinit.factors import Factors, Trains


def write_factors(
    model: nn.Module,
    factors: Mapping[str, Factors],
    plan: Plan,
    adapter_name: str = "default",
    base: Base = "residual",
) -> nn.Module:
    """Give one adapter of ``model`` the ranks and alphas of ``plan`` and the values of ``factors``, in place.

    A layer of rank 0 loses the adapter, and its LoRA layer if no other adapter is on it. A layer that the plan does
    not name starts by default, and one warning names all of these. Layers whose matrices are those of an embedding
    (``ensure_weight_tying``) have its start: one for all of them. Dtype and device of the adapter stay what they
    were, ``requires_grad`` too where both matrices are trained, and its configuration is replaced by one that says
    what is now in the model. Values are copied: factors may share memory, the adapter's weights do not.

    What happens to the base layers depends on ``Factors.effect``. ``"keeps"`` and ``"shifts"`` leave them alone.
    ``"splits"`` with ``base="residual"`` takes ``s·B A`` off the weight, as PEFT does: of A and B *as the adapter
    holds them*, rounded, so that base and adapter together are the original weight to its own precision; a weight
    that several layers use gives it up once. From then on the model without its adapter (``disable_adapter()``,
    PEFT's ``unload()``) is the residual, not the original. `LoraModel.unload` gives the original back: for that, a copy
    of every changed weight stays in the host's memory, as large as these weights are, for as long as the layer lives.
    With ``base="offset"`` the weights stay bitwise what they are, the model without its adapter is the original, and
    the layer subtracts the frozen start: `smartinit.adapters.offset` says how PEFT's layers do. Either way the start is
    kept as ``layer.start[adapter_name]``. ``"quantises"`` puts `Factors.base` in the weight's place. DoRA's magnitudes
    become the row norms of the base and ``s·B A`` together.

    Args:
        model: a `LoraModel`, a ``peft.PeftModel``, or a model in which PEFT injected layers.
        factors: target name -> ``a (rank, in)``, ``b (out, rank)``; not needed where the rank is 0.
        plan: rank and alpha by the same names, which may have prefixes that wrappers put before them.
        adapter_name: which adapter.
        base: what a split does to the base layers.

    Returns:
        ``model``. After an error, Ctrl-C included, it is as it was, bit for bit; for that, changed base weights are
        copied to the host's memory until all is written.

    Raises:
        ModelError: the model carries no adapters; a base weight that must change is quantised, sharded, not finite, or
            cannot hold the result (float16).
        UnknownNameError: there is no such adapter, or no such layer.
        ArtefactError: a matrix does not fit its layer, is not finite there, or has another rank than the plan says.
        ConfigError: plan and adapter differ in ``use_rslora``; no layer would be left; an adapter is merged; a changed
            base weight would change what other layers or adapters compute; the base was split already; DoRA with
            ``base="offset"``.
    """
    host = find_host(model)
    config = host.config(adapter_name)
    if bool(config.use_rslora) != plan.use_rslora:
        raise ConfigError(
            f"the factors are planned for use_rslora={plan.use_rslora}, but adapter '{adapter_name}' has "
            f"use_rslora={config.use_rslora}; make both the same"
        )
    layers = host.layers(adapter_name)
    _refuse_merged(layers)
    factors, plan = with_tied(layers, adapter_name, factors, plan)
    layer_of = match_names(plan.ranks, layers)
    _check_names(host, plan, layer_of, adapter_name)
    written = {
        layer_name: _checked(layer_name, layers[layer_name], adapter_name, factors.get(name), plan, name)
        for name, layer_name in layer_of.items()
        if plan.ranks[name] > 0
    }
    planned = set(layer_of.values())
    unplanned = [name for name in layers if name not in planned]
    if not unplanned and not written:
        raise ConfigError(f"all {len(layer_of)} layers have rank 0, so no adapter would be left; give a larger rank")
    changes = changes_of_base(host, written, adapter_name, base)

    start = copy.copy(config)
    start.init_lora_weights = True  # creates a layer of another rank, without running the method the config names
    with torch.no_grad(), undone_on_error(host, layers, adapter_name) as copies:
        for name, layer_name in layer_of.items():
            if layer_name in written:
                _write(written[layer_name], adapter_name, plan.alphas[name], start, base)
            else:
                _remove(host.root, layer_name, layers[layer_name], adapter_name)
        for name in unplanned:
            _reset(layers[name], adapter_name, start)
        for group in changes:
            _change_base(group, adapter_name, copies)
        for layer_name in (*written, *unplanned):
            one = written.get(layer_name)
            set_magnitude(layers[layer_name], adapter_name, one.factors.magnitude if one else None)
        host.configs[adapter_name] = _describe(host, config, adapter_name)
    if unplanned:
        warnings.warn(
            f"{len(unplanned)} layers with adapter '{adapter_name}' had no factors and start by default (A random, B "
            f"zero): {', '.join(unplanned)}",
            stacklevel=3,  # the caller of `Artefact.apply` or `initialize_lora_eva_weights`
        )
    return model


def _refuse_merged(layers: Mapping[str, nn.Module]) -> None:
    """What a base weight is cannot be told while adapters are in it, and unmerging would undo what is written."""
    for name, layer in layers.items():
        merged: Any = getattr(layer, "merged_adapters", ())
        if merged:
            raise ConfigError(
                f"adapter {', '.join(merged)} is merged into the base weight of '{name}': call unmerge_adapter() "
                "before a start is written"
            )


def _check_names(host: Host, plan: Plan, layer_of: Mapping[str, str], adapter_name: str) -> None:
    """Every planned layer must be there; one of rank 0 may have lost its adapter already."""
    absent = [name for name in plan.ranks if name not in layer_of]
    bare = match_names(absent, bare_module_names(host.root)) if absent else {}
    for name in absent:
        if name not in bare:
            raise UnknownNameError(f"the model has no layer '{name}'; are the factors for another model?")
        if plan.ranks[name] > 0:
            raise UnknownNameError(
                f"layer '{bare[name]}' has no adapter '{adapter_name}' to write {plan.ranks[name]} ranks into; name it "
                "in the adapter's target_modules"
            )


def _checked(
    layer_name: str,
    layer: Any,  # noqa: ANN401
    adapter_name: str,
    pair: Factors | None,
    plan: Plan,
    name: str,
) -> Written:
    """What one layer gets; nothing is changed yet."""
    rank = plan.ranks[name]
    if pair is None:
        raise ArtefactError(f"the plan gives layer '{layer_name}' rank {rank}, but there are no factors for it")
    module = layer.get_base_layer()
    if host_of(module) is None:
        raise ArtefactError(
            f"layer '{layer_name}' wraps a {type(module).__name__}, which is no linear layer, convolution without "
            "groups or embedding"
        )
    target = Target.of(module, layer_name)
    for label, matrix, fits in (
        ("A", pair.a, (rank, target.in_features)),
        ("B", pair.b, (target.out_features, rank)),
    ):
        if tuple(matrix.shape) != fits:
            raise ArtefactError(
                f"{label} of layer '{layer_name}' has shape {tuple(matrix.shape)}, but {fits} is needed for rank "
                f"{rank}; are the factors for another model?"
            )
    _check_convolution(layer_name, layer, adapter_name, module)
    for label, matrix, kept in zip("AB", (pair.a, pair.b), factor_parameters(layer, adapter_name), strict=True):
        if not torch.isfinite(matrix.to(kept.dtype)).all():
            raise ArtefactError(
                f"{label} of layer '{layer_name}' holds NaN or Inf as {str(kept.dtype).removeprefix('torch.')}, the "
                f"dtype of adapter '{adapter_name}'"
            )
    return Written(target, layer, pair, plan.scaling(name))


def _check_convolution(name: str, layer: Any, adapter_name: str, base: nn.Module) -> None:  # noqa: ANN401
    """PEFT's A has the base layer's stride and padding, but no dilation and no padding mode: another product."""
    if not isinstance(base, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
        return
    made = layer.lora_A[adapter_name]
    for field in ("dilation", "padding_mode"):
        if getattr(made, field) != getattr(base, field):
            raise ConfigError(
                f"layer '{name}' is a convolution with {field}={getattr(base, field)!r}, which PEFT's adapter does "
                "not follow; wrap the model with smartinit.LoraModel, or leave the layer out of target_modules"
            )


def _write(one: Written, adapter_name: str, alpha: float, start: Any, base: Base) -> None:  # noqa: ANN401
    """Give one layer its matrices."""
    layer: Any = one.layer
    kept = start_of(layer, adapter_name)
    if kept is not None and kept.base == "offset":
        forget_start(layer, adapter_name)
    _resize(layer, adapter_name, one.factors.rank, alpha, start)
    layer.scaling[adapter_name] = one.scaling
    a, b = factor_parameters(layer, adapter_name)
    if not is_tied(layer, adapter_name):  # else they have been written into the layer that has them
        a.copy_(one.factors.a.reshape(a.shape))
        b.copy_(one.factors.b.reshape(b.shape))
    _set_trained(layer, adapter_name, one.factors.trains)
    if one.factors.effect == "splits":
        ours = isinstance(layer, LoraLayer)
        a, b = a.detach().flatten(1).clone(), b.detach().flatten(1).clone()  # type: ignore[assignment]
        starts_of(layer)[adapter_name] = Start(a, b, one.scaling, base, persistent=ours and base == "offset")
        if base == "offset" and not ours:
            subtract_start(layer)


def _set_trained(layer: Any, adapter_name: str, trains: Trains) -> None:  # noqa: ANN401
    """Freeze the matrix that is not trained; an adapter that is frozen stays so."""
    if is_tied(layer, adapter_name):
        return
    a, b = factor_parameters(layer, adapter_name)
    trained = a.requires_grad or b.requires_grad
    a.requires_grad_(trained and trains in ("a", "both"))
    b.requires_grad_(trained and trains in ("b", "both"))
    if isinstance(layer, LoraLayer):
        layer.trains[adapter_name] = trains
    elif hasattr(layer, "frozen_peft_weight_names"):  # what PEFT's `set_adapter` leaves frozen
        embedding = adapter_name in layer.lora_embedding_A
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        frozen = {"a": names[1:], "b": names[:1], "both": ()}[trains]
        others = {name: kept for name, kept in layer.frozen_peft_weight_names.items() if name != adapter_name}
        layer.frozen_peft_weight_names = others | ({adapter_name: frozen} if frozen else {})


def _change_base(group: tuple[Written, ...], adapter_name: str, copies: BaseCopies) -> None:
    one = group[0]
    original = OriginalWeight(copies.keep(one.target.changeable_weight()), adapter_name)
    for layer in (other.layer for other in group):
        if isinstance(layer, LoraLayer) and layer.original_weight is None:
            layer.original_weight = original
    if one.factors.effect == "quantises" and one.factors.base is not None:
        become(one.target, one.factors.base)
        return
    a, b = factor_parameters(one.layer, adapter_name)
    give_up(one.target, a.detach().flatten(1), b.detach().flatten(1), one.scaling)


def _resize(layer: Any, adapter_name: str, rank: int, alpha: float, start: Any) -> None:  # noqa: ANN401
    if is_tied(layer, adapter_name):
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, alpha
    elif layer.r[adapter_name] == rank and not factor_parameters(layer, adapter_name)[0].is_meta:
        layer.lora_alpha[adapter_name] = alpha
    else:
        _renew(layer, adapter_name, rank, alpha, start)


def _reset(layer: Any, adapter_name: str, start: Any) -> None:  # noqa: ANN401
    if is_tied(layer, adapter_name):
        forget_start(layer, adapter_name)
    elif any(parameter.is_meta for parameter in adapter_parameters(layer, adapter_name)):
        _renew(layer, adapter_name, layer.r[adapter_name], layer.lora_alpha[adapter_name], start)
    else:
        forget_start(layer, adapter_name)
        layer.reset_lora_parameters(adapter_name, True)
        _set_trained(layer, adapter_name, "both")


def _renew(layer: Any, adapter_name: str, rank: int, alpha: float, start: Any) -> None:  # noqa: ANN401
    """Make new matrices that start by default; what `update_layer` takes from the base layer is put back as it was.

    PEFT's takes the base layer's dtype, which leaves half precision beside the float32 of the layers whose rank stays.
    """
    former = adapter_parameters(layer, adapter_name)[0]
    trained = {parameter: parameter.requires_grad for parameter in layer.parameters()}
    layer.update_layer(adapter_name=adapter_name, r=rank, lora_alpha=alpha, config=start)
    for parameter, requires_grad in trained.items():
        parameter.requires_grad_(requires_grad)
    device = adapter_parameters(layer, adapter_name)[0].device if former.is_meta else former.device
    for part in parts_of(layer):
        kept = getattr(layer, part)
        if adapter_name not in kept:
            continue
        made = kept[adapter_name]
        if isinstance(made, torch.nn.Module):
            made.to(device=device, dtype=former.dtype).requires_grad_(former.requires_grad).train(layer.training)
        elif isinstance(made, torch.nn.Parameter):
            made = made.to(device=device, dtype=former.dtype)
            kept[adapter_name] = torch.nn.Parameter(made, requires_grad=former.requires_grad)


def _remove(root: nn.Module, name: str, layer: Any, adapter_name: str) -> None:  # noqa: ANN401
    for part in parts_of(layer):
        kept = getattr(layer, part)
        if adapter_name in kept:
            del kept[adapter_name]
    if not layer.r:
        root.set_submodule(name, layer.get_base_layer())


def _describe(host: Host, config: Any, adapter_name: str) -> Any:  # noqa: ANN401
    """A configuration that makes a loader build exactly the layers that the adapter now has."""
    layers: dict[str, Any] = dict(host.layers(adapter_name))
    patterns = compact_patterns(
        Plan(
            {name: layer.r[adapter_name] for name, layer in layers.items()},
            {name: layer.lora_alpha[adapter_name] for name, layer in layers.items()},
            use_rslora=bool(config.use_rslora),
        )
    )
    modules = exact_target_modules(layers, bare_module_names(host.root), complete=True)
    described = copy.copy(config)
    described.r = patterns.r
    described.lora_alpha = patterns.lora_alpha
    described.rank_pattern = patterns.rank_pattern
    described.alpha_pattern = patterns.alpha_pattern
    # A set, as PEFT keeps it itself: merging adapters refuses a list.
    described.target_modules = modules if isinstance(modules, str) else set(modules)
    described.layers_to_transform = described.layers_pattern = None  # the names say it
    return described
