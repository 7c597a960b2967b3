"""What a model is: one digest of its weights and of what computes with them."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from smartinit.errors import ModelError
from smartinit.targets.structure import base_modules, loose_tensors, structure_of
from smartinit.targets.tensor_digest import tensor_digest, without_numbers
from smartinit.targets.weight import storage_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

__all__ = ["ModelFingerprint", "model_fingerprint", "tensor_digest"]

_ORDINARY = (torch.Tensor, nn.Parameter, nn.Buffer)


@dataclass(frozen=True)
class ModelFingerprint:
    """Digests of a base model, each 64 hexadecimal digits.

    Attributes:
        root: of everything.
        weights: of names and digests of all tensors.
        structure: of the configuration, the classes of the modules and their settings.
        tensors: name in the base model -> `tensor_digest`.
    """

    root: str
    weights: str
    structure: str
    tensors: Mapping[str, str]


def model_fingerprint(model: nn.Module, threads: int | None = None) -> ModelFingerprint:
    """The fingerprint of the base model: the same in any wrapper, with any adapters, in any mode, on any device.

    It differs for one bit of one parameter or buffer, the buffers that are saved nowhere included; for another class,
    setting or configuration; for the user's own code, with the files that it stands in and imports; and for the user's
    hooks, methods put in place of others, and attention registered with transformers. What is left out: names of
    folders, what libraries note for themselves, their hooks, their versions (and so the code of everything installed),
    and private attributes that are named caches. Adapters that are merged have changed the base model, and a start
    that it gave up has too. A weight that is parametrised has no digest under its own name, only its originals have.

    Args:
        model: in `peft.PeftModel`, `smartinit.LoraModel`, DistributedDataParallel, torch.compile, or plain. Parts of
            it that are sharded (DTensor) are gathered one by one: then all ranks must call this.
        threads: that hash at the same time; None: one per core that this process may use. Of n threads each hashes
            whole tensors.

    Cost: one pass over all bytes (sha256: about 2 GB/s per core), a few MB of memory per thread.

    Raises:
        ModelError: a tensor without numbers, such as one on the meta device.
    """
    modules = dict(base_modules(model))
    named = dict(_tensors(model, modules))
    missing = {name: why for name, tensor in named.items() if (why := without_numbers(tensor))}
    if missing:
        first = next(iter(missing))
        more = f" (and {len(missing) - 1} more tensors)" if len(missing) > 1 else ""
        raise ModelError(f"the model has no fingerprint: '{first}'{more} {missing[first]}")
    tensors = _digests(named, threads or _cores())
    structure = _sha256(structure_of(model, modules))
    weights = _sha256(sorted(tensors.items()))
    return ModelFingerprint(_sha256([weights, structure]), weights, structure, tensors)


def _tensors(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterable[tuple[str, torch.Tensor]]:
    own = _originals(model)
    for path, module in modules.items():
        held = {**module._parameters, **module._buffers, **dict(loose_tensors(module))}  # noqa: SLF001 - under all names
        for name, tensor in held.items():
            if tensor is not None:
                yield f"{path}.{name}" if path else name, own.get(id(tensor), tensor)


def _originals(model: nn.Module) -> dict[int, torch.Tensor]:
    """Id of a bias that an adapter trains in place of the model's own -> the model's own."""
    kept = [biases for part in model.modules() for biases in vars(part).get("base_biases", {}).values()]
    return {id(trained): original for biases in kept for trained, original in biases.originals()}


def _digests(named: Mapping[str, torch.Tensor], threads: int) -> dict[str, str]:
    """Name -> digest; tensors that lie in the same place are hashed once."""
    places = {name: _place(tensor) for name, tensor in named.items()}
    unique = {places[name]: (name, tensor) for name, tensor in named.items()}
    # Gathering is a collective: in the order of the model, and in this thread. The others: the largest first, so that
    # no thread is left with one at the end.
    gathered = {place: _digest(*item) for place, item in unique.items() if hasattr(item[1], "placements")}
    others = sorted((place for place in unique if place not in gathered), key=lambda place: -_size(unique[place][1]))
    pool = ThreadPoolExecutor(max(min(threads, len(others)), 1))
    try:
        made = dict(zip(others, pool.map(lambda place: _digest(*unique[place]), others), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    digests = gathered | made
    return {name: digests[place] for name, place in places.items()}


def _digest(name: str, tensor: torch.Tensor) -> str:
    try:
        return tensor_digest(tensor)
    except ModelError as error:
        raise ModelError(f"the model has no fingerprint because of '{name}': {error}") from error


def _place(tensor: torch.Tensor) -> Hashable:
    if type(tensor) in _ORDINARY and not hasattr(tensor, "quant_state"):
        return (*storage_of(tensor), tensor.dtype, tensor.device)
    return id(tensor)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
