"""Adapters added into base weights, and taken out of them again.

While adapters are merged, the original weights are kept in the host's memory, so that unmerging gives back the very
bits: adding and subtracting a product would not. Every merged weight is computed from the original, with digits to
spare, and rounded once, however many adapters come in and in however many calls.

A weight that several modules use (tied embeddings, replicated layers) is merged once if all of its users are changed
alike. If they are not, each gets a weight of its own, since one weight cannot be all of them; `unmerge_adapters` ties
them again.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from smartinit.adapters.finite import require_finite, require_finite_merged, require_finite_replacements
from smartinit.adapters.injection import parts_of_model
from smartinit.adapters.merge_plan import groups_of, require_changeable, slots_of
from smartinit.adapters.merged_weight import MergedWeight
from smartinit.adapters.restoring import changed_layers
from smartinit.adapters.training import set_trained
from smartinit.adapters.weight_change import write_changed
from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from smartinit.adapters.merge_plan import Slot
    from smartinit.adapters.part import AdapterPart
    from smartinit.config import LoraConfig


@torch.inference_mode(mode=False)  # what is made in here must be good for training, whoever calls
@torch.no_grad()
def merge_adapters(
    root: nn.Module, adapter_names: Sequence[str], *, safe_merge: bool = False, progressbar: bool = False
) -> None:
    """Add adapters into the base weights of all layers of a model; after an error every weight is as it was.

    Adapters that are merged already stay so, and the new ones come after them.

    Args:
        root: the model with adapter parts in it.
        adapter_names: which, in this order; one that is merged already is passed over with a warning.
        safe_merge: refuse new weights with NaN or Inf.
        progressbar: show one, over weights.

    Raises:
        ConfigError: an adapter that cannot be merged (a bias for a layer that has none).
        ModelError: a weight that cannot be changed, or (``safe_merge``) would not be finite.

    Cost: of one weight, see `smartinit.adapters.weight_change.write_changed`; host memory for the originals.
    """
    parts = parts_of_model(root)
    merged = _merged(parts)
    new = [name for name in dict.fromkeys(adapter_names) if name not in merged]
    if merged:
        also = f", and {', '.join(new)} is now merged as well" if new else "; nothing is left to do"
        warnings.warn(f"{', '.join(merged)} is merged into the base weights already{also}", stacklevel=3)
    if new:
        with _undone_on_error(parts):
            _merge(root, parts, [*merged, *new], safe_merge=safe_merge, progressbar=progressbar)


def check_unmerged(root: nn.Module, adapter_name: str, config: LoraConfig) -> None:
    """Refuse a new adapter that starts from what the base model is, while the base model is another one.

    Raises:
        ConfigError: adapters are merged, and the new one has magnitudes, biases, rows or modules of the base.
    """
    merged = _merged(parts_of_model(root))
    reads = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices") if getattr(config, name)]
    if config.bias != "none":
        reads.append("bias")
    if merged and reads:
        raise ConfigError(
            f"adapter '{adapter_name}' has {reads[0]}={getattr(config, reads[0])!r}, which starts from the values of "
            f"the base model, but {', '.join(merged)} is merged into these: call unmerge_adapter() first"
        )


@torch.inference_mode(mode=False)
@torch.no_grad()
def unmerge_adapters(root: nn.Module) -> None:
    """Give all layers of a model their original weights back; nothing where nothing is merged."""
    for part in parts_of_model(root).values():
        part.unmerge()


@torch.inference_mode(mode=False)
@torch.no_grad()
def merge_into(
    root: nn.Module,
    adapter_names: Sequence[str],
    *,
    safe_merge: bool = False,
    progressbar: bool = False,
    trainable: Collection[nn.Parameter] = (),
) -> None:
    """`merge_adapters`, and then the base layers (or trained copies of them) take their parts' places.

    Args:
        root: the model with adapter parts in it.
        adapter_names: which are merged, after those that are already.
        safe_merge: as of `merge_adapters`.
        progressbar: as of `merge_adapters`.
        trainable: the parameters of the model that were trained before it got adapters: these, and what has taken
            their places, are trainable afterwards, all others frozen.

    Raises:
        As `merge_adapters`.
    """
    parts = parts_of_model(root)
    merged = _merged(parts)
    names = list(dict.fromkeys([*merged, *adapter_names]))
    with _undone_on_error(parts):
        if set(names) != set(merged):
            _merge(root, parts, names, safe_merge=safe_merge, progressbar=progressbar)
        elif safe_merge:
            require_finite_replacements(root, parts, names)
            require_finite_merged(parts)
        trained = {id(parameter) for parameter in trainable}
        replaced = [w for part in parts.values() for w in part.merged_weights if w.values is None]
        trained |= {id(getattr(*place)) for w in replaced if id(w.original) in trained for place in w.places}
        try:
            for path, part in reversed(list(parts.items())):
                module = part.merged_module(names)
                root.set_submodule(path, module)
                before = dict(part.base_layer.named_parameters())
                trained |= {id(p) for name, p in module.named_parameters() if id(before.get(name)) in trained}
            _say_untied(root)
            _say_changed(parts, names)
        except BaseException:
            for path, part in parts.items():  # from the outside, or there is no such path
                root.set_submodule(path, part)
            raise
    for part in parts.values():
        part.merged_weights.clear()  # the copies are of no use any more
    for parameter in root.parameters():
        set_trained(parameter, trained=id(parameter) in trained)


def _merged(parts: Mapping[str, AdapterPart]) -> list[str]:
    """The adapters that are merged anywhere, in their order."""
    return list(dict.fromkeys(name for part in parts.values() for name in part.merged_adapters))


def _merge(
    root: nn.Module, parts: Mapping[str, AdapterPart], names: Sequence[str], *, safe_merge: bool, progressbar: bool
) -> None:
    """Write merged weights, each from its original."""
    for part in parts.values():
        part.check_active(names)  # what cannot act together cannot be merged together
    if safe_merge:
        require_finite_replacements(root, parts, names)
    for part in parts.values():
        part.unmerge()
    slots = slots_of(parts, names)
    for slot in slots:
        require_changeable(slot)
    groups = groups_of(root, slots)
    untied = [slot.path for group, alone in groups for slot in group if not alone]
    for group, alone in tqdm(groups, desc="merging", unit="weight", disable=not progressbar):
        _write(group, alone=alone, safe_merge=safe_merge)
    for slot in slots:
        for part in slot.parts:
            part.merged_adapters = [name for name in names if part.has(name)]
    if untied:
        warnings.warn(
            f"{len(untied)} layers share a weight with others that are not changed alike, so while adapters are merged "
            f"each has one of its own: {', '.join(untied)}",
            stacklevel=4,
        )


def _write(group: Sequence[Slot], *, alone: bool, safe_merge: bool) -> None:
    """Give the layers of a group their merged parameter."""
    first = group[0]
    original = first.value
    in_place = alone and not original.is_inference()  # made in torch's inference mode: nobody can write to it
    merged = MergedWeight([(slot.module, slot.parameter) for slot in group], original, in_place=in_place)
    for slot in group:
        for part in slot.parts:
            merged.parts.append(part)
            part.merged_weights.append(merged)  # before it is written: an interrupt must find it
    own = original if in_place else nn.Parameter(torch.empty_like(original), requires_grad=original.requires_grad)
    write_changed(own.detach(), original.detach(), first.changes)
    if safe_merge:
        names = [change.adapter_name for change in first.changes]
        require_finite(f"the {first.parameter} of layer '{first.path}'", names, own)
    for slot in group:
        setattr(slot.module, slot.parameter, own)


def _say_untied(root: nn.Module) -> None:
    """Let the configuration of a transformers model say that its embeddings are no longer tied, if they are not."""
    config: Any = getattr(root, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(root, "get_output_embeddings"):
        return
    model: Any = root
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(end, "weight", None) for end in ends]
    if len({weight.data_ptr() for weight in weights if isinstance(weight, torch.Tensor)}) > 1:
        config.tie_word_embeddings = False
        warnings.warn(
            "the input and output embeddings are no longer one weight after merging, so the model's configuration now "
            "says tie_word_embeddings=False",
            stacklevel=4,
        )


def _say_changed(parts: Mapping[str, AdapterPart], merged: Sequence[str]) -> None:
    """Warn of base weights that have lost something to an adapter which is not merged, and so is lost itself."""
    unmerged = {name for part in parts.values() for name in part.adapters()}.difference(merged)
    for adapter_name in sorted(unmerged):
        layers = changed_layers(parts, adapter_name)
        if layers:
            warnings.warn(
                f"the base weights of {len(layers)} layers were changed for the start of adapter '{adapter_name}', "
                "which is not merged: they stay so, without it; to have the original ones, call "
                f"delete_adapter('{adapter_name}') first",
                stacklevel=4,
            )


@contextmanager
def _undone_on_error(parts: Mapping[str, AdapterPart]) -> Iterator[None]:
    """Put everything back that is merged inside, Ctrl-C included; what was merged before is merged again then."""
    before = [(part, list(part.merged_adapters), list(part.merged_weights)) for part in parts.values()]
    weights = {id(weight): weight for _, _, kept in before for weight in kept}.values()
    places = [(*place, getattr(*place)) for weight in weights for place in weight.places]
    values = [(parameter, parameter.detach().to("cpu", copy=True)) for _, _, parameter in places]
    try:
        yield
    except BaseException:
        for part in parts.values():
            part.unmerge()
        for module, name, parameter in places:
            setattr(module, name, parameter)
        for parameter, value in values:
            parameter.copy_(value)
        for part, adapters, kept in before:
            part.merged_adapters, part.merged_weights = adapters, kept
        raise
