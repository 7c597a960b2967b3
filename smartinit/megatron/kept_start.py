"""What the base weights of a model have given up, in adapter folders: kept beside the adapter, known when it is loaded.

A base that a start has changed goes with no other adapter, and an adapter that was trained beside it with no other
base. A model knows what it has given up itself (`smartinit.megatron.writing.GivenUp`), or the start of the folder
that was loaded into it.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.parallel.stored import stored
from smartinit.adapters.parallel.weights import weight_names
from smartinit.errors import ConfigError
from smartinit.formats.megatron_folder import MARKER, ShardedFolder
from smartinit.formats.megatron_start import start_digests, start_in
from smartinit.formats.peft import read_file
from smartinit.megatron.agreement import every_number, everyone, failing_together, own_rank
from smartinit.megatron.shards import number_of, read_part, shards_of
from smartinit.megatron.walk import adapted_layers
from smartinit.megatron.writing import given_up

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smartinit.adapters.parallel.layer import AdaptedLayer
    from smartinit.adapters.parallel.stored import Stored
    from smartinit.megatron.shards import Shard
    from smartinit.megatron.walk import Model
    from smartinit.megatron.writing import GivenUp

_LOADED = "loaded_start"  # an attribute of adapted layers, in no state dict
_ABOUT_THE_MODEL = ("model_shape", "peft_names", "base_model", "task_type")
_FACTOR = re.compile(r"adapter\.(?:(?P<part>adapter_\w+)\.)?linear_(?P<side>in|out)\.weight")
_CLOSE = 1e-3  # what a decomposition may differ by between machines


@dataclass(frozen=True)
class LoadedStart:
    """The start that belongs to what was loaded into a model.

    Attributes:
        digests: file -> digest.
        about: what its folder says of the Hugging Face model.
        files: file -> content, on the first rank that has an adapter; elsewhere empty.
    """

    digests: Mapping[str, str]
    about: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def text(self) -> str:
        """What other ranks are told."""
        return json.dumps({"digests": dict(self.digests), "about": dict(self.about)}, sort_keys=True)


def start_shards(model: Model) -> tuple[dict[str, Shard], str]:
    """What this rank's base weights gave up, by the keys of the adapters; and what that did: "", or an `Effect`."""
    found: dict[str, Shard] = {}
    effects = set()
    for place, layer in adapted_layers(model):
        for shard, part in zip(shards_of(place, layer), stored(layer.adapter, layer.base), strict=True):
            given = _given(layer, part)
            if given is not None:
                numbers, one = given
                effects.add(one.effect)
                found[shard.key] = replace(shard, parameter=numbers, alpha=one.scaling * part.dim)
    return found, min(effects, default="")  # "quantises" before "splits"


def loaded_start(model: Model) -> LoadedStart | None:
    """What `remember` has noted in a model; None: nothing, on this rank."""
    notes = (layer.__dict__.get(_LOADED) for _, layer in adapted_layers(model))
    return next((note for note in notes if isinstance(note, LoadedStart)), None)


def remember(model: Model, start: LoadedStart | None) -> None:
    """Note in a model that its base is what this start has left; None: nothing new."""
    if start is not None:
        for _, layer in adapted_layers(model):
            setattr(layer, _LOADED, start)


def compared(model: Model, saved: ShardedFolder, *, residual_base: bool) -> LoadedStart | None:
    """The start that a model is to remember with the adapter of a folder; collective.

    Args:
        model: adapted.
        saved: the folder.
        residual_base: whether the caller knows that the model's base is the one of the start.

    Raises:
        ArtefactError, VerificationError: the folder's start is lost, or another one.
        ConfigError: the base has given up a start of its own, and the folder is for a base that was split elsewhere.

    Warns:
        UserWarning: the folder is for another base than the model seems to have.
    """
    with failing_together():
        said, kept = start_digests(saved), start_in(saved.path)
        own, _ = start_shards(model)
        before = loaded_start(model)
    split = any(everyone("split" if own else ""))
    texts = [text for text in everyone("" if before is None else before.text()) if text]
    if said is None or kept is None:
        if split or texts:
            _warn(
                f"'{saved.path}' is for a base that gave nothing up, but base weights of this model have given up a "
                "start, so both together are not what was saved; load it into the unmodified base model"
            )
        return None
    if split:
        with failing_together():
            if MARKER not in said:
                raise ConfigError(
                    f"'{saved.path}' goes with the residual base of its own start, but base weights of this model have "
                    "given up another one; load the residual base model (save_residual_model) and adapt it without a "
                    "start"
                )
            differs = _differs(own, start := ShardedFolder.open(kept))
        known = {number for row in every_number([number_of(key) for key in own]) for number in row}
        differs |= any(number_of(key) not in known for key in start.layouts)
        if any(everyone("differs" if differs else "")):
            _warn(
                f"'{saved.path}' goes with a base that gave up another start than this model's has; apply the start "
                "that it was trained from (see its folder 'start') to the unmodified base model first"
            )
        return None
    loaded = LoadedStart(said, {name: saved.config[name] for name in _ABOUT_THE_MODEL if saved.config.get(name)})
    if not residual_base and not any(json.loads(text)["digests"] == said for text in texts):
        _warn(
            f"'{saved.path}' goes with a base that has given its start up: if this model's base is the original one, "
            "outputs are wrong; start the model with that start before (apply), or, if it has the residual weights, "
            "load with residual_base=True"
        )
    with failing_together():
        ranks = everyone("layers" if any(True for _ in adapted_layers(model)) else "")
        if own_rank() == next((rank for rank, has in enumerate(ranks) if has), 0):
            loaded = replace(loaded, files={name: read_file(kept / name) for name in said})
    return loaded


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)


def _differs(own: Mapping[str, Shard], start: ShardedFolder) -> bool:
    """Whether a base gave up something else than a folder holds, on this rank."""
    for key, shard in own.items():
        if key not in start or start.shape(key) != shard.shape:
            return True
        theirs = read_part(start, shard).double()
        ours = shard.parameter.detach().cpu().double()
        if float((ours - theirs).norm()) > _CLOSE * float(ours.norm()):
            return True
    return False


def _given(layer: AdaptedLayer, part: Stored) -> tuple[torch.Tensor, GivenUp] | None:
    """This rank's shard of one factor that a weight, or those of a layer's experts, gave up."""
    match = _FACTOR.fullmatch(part.path)
    if match is None:
        return None
    ending = f"_{match['part']}" if match["part"] else ""
    names = weight_names(part.base)
    notes = [given_up(layer, f"{name}{ending}") for name in (names if part.by_expert else names[:1])]
    first = next((note for note in notes if note is not None), None)
    if first is None:
        return None
    side = "a" if match["side"] == "in" else "b"
    empty = torch.zeros_like(getattr(first, side))
    each = [empty if note is None else getattr(note, side) for note in notes]
    return (torch.stack(each) if part.by_expert else each[0]), first
