"""The modules of a model under their names, also of one that is cut into pieces."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from smartinit.adapters.parallel.collectives import rank_of
from smartinit.adapters.parallel.layer import AdaptedLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.distributed import ProcessGroup

Model = nn.Module | list[nn.Module]
"""A model, or the chunks of one (pipeline parallelism), each of them possibly in a data-parallel wrapper."""

_NUMBER = re.compile(r"\d+")
_LOCAL_EXPERT = re.compile(r"(.*\.)?local_experts\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Place:
    """Where a module is.

    Attributes:
        module: it.
        parent: what it is an attribute of; None: it is a chunk itself.
        name: its full name in its chunk.
        whole_name: its full name in the whole model: layers and experts have the numbers that they have there.
        ep_group: ranks with other experts, if it is in a module of experts.
        first_expert: number, among all experts, of the first (or only) one that it is of.
        config: of the nearest module around it that has one.
    """

    module: nn.Module
    parent: nn.Module | None
    name: str
    whole_name: str
    ep_group: ProcessGroup | None = None
    first_expert: int = 0
    config: Any = None

    @property
    def attribute(self) -> str:
        """Its own name."""
        return self.name.rpartition(".")[2]

    @property
    def prefix(self) -> str:
        """The full name of what it is in."""
        return self.name.rpartition(".")[0]

    @property
    def experts_name(self) -> str:
        """`whole_name` without the number of an expert: equal for the same layer of all experts."""
        found = _LOCAL_EXPERT.fullmatch(self.whole_name)
        return self.whole_name if found is None else f"{found[1] or ''}local_experts.*.{found[3]}"


def chunks_of(model: Model) -> list[nn.Module]:
    """The model's chunks, without data-parallel and precision wrappers around them."""
    return [inner_of(chunk) for chunk in (model if isinstance(model, list) else [model])]


def inner_of(model: nn.Module) -> nn.Module:
    """The model in wrappers that have nothing but a ``module``: DistributedDataParallel, Megatron's, Float16Module."""
    inner = model
    while list(inner._modules) == ["module"] and isinstance(inner.module, nn.Module):  # noqa: SLF001 - its only child
        inner = inner.module
    return inner


def warn_of_wrappers(model: Model) -> None:
    """Say so if a data-parallel wrapper was made before there were adapters: it does not know of them."""
    for chunk in model if isinstance(model, list) else [model]:
        wrapper = next((m for m in _wrappers(chunk) if _averages(m)), None)
        if wrapper is not None:
            warnings.warn(
                f"gradients of adapters are not averaged over data-parallel ranks by a {type(wrapper).__name__} that "
                "was made before them; adapt the model first and wrap it then, or wrap what is in the wrapper again",
                stacklevel=3,
            )
            return


def warn_of_meta(layers: Iterable[AdaptedLayer]) -> None:
    """Say so if adapters have no values yet, which nobody will draw later."""
    meta = [layer.name for layer in layers if any(p.is_meta for p in layer.adapter.parameters())]
    if meta:
        warnings.warn(
            f"the adapters of {len(meta)} layers (the first: '{meta[0]}') are on the meta device, as their layers are, "
            "and have not started; adapt the model once it has values, or load the adapters after to_empty",
            stacklevel=3,
        )


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    inner = inner_of(model)
    while model is not inner:
        yield model
        model = model.module  # type: ignore[assignment]


def _averages(module: nn.Module) -> bool:
    """Torch's wrapper or Megatron's, which is not imported."""
    return any(kind.__name__ == "DistributedDataParallel" for kind in type(module).__mro__)


def places(chunk: nn.Module) -> Iterator[Place]:
    """Every module of a chunk, the chunk itself (with an empty name) first; nothing inside of adapted layers."""
    yield from _walk(Place(chunk, None, "", ""), set())


def adapted_layers(model: Model) -> Iterator[tuple[Place, AdaptedLayer]]:
    """The layers with adapters."""
    for chunk in chunks_of(model):
        for place in places(chunk):
            if isinstance(place.module, AdaptedLayer):
                yield place, place.module


def install(model: Model, chunk: nn.Module, place: Place, module: nn.Module) -> Model:
    """Put a module in a place; the model, which is another one if the place was the model itself."""
    if place.parent is not None:
        place.parent._modules[place.attribute] = module  # noqa: SLF001 - also where names are numbers
        return model
    if isinstance(model, list):
        return [_around(one, chunk, module) for one in model]
    return _around(model, chunk, module)


def _around(outer: nn.Module, chunk: nn.Module, module: nn.Module) -> nn.Module:
    """The wrappers of a chunk around what takes its place."""
    if outer is chunk:
        return module
    wrapper = outer
    while isinstance(wrapper._modules.get("module"), nn.Module) and wrapper.module is not chunk:  # noqa: SLF001
        wrapper = wrapper.module  # type: ignore[assignment]
    if wrapper._modules.get("module") is chunk:  # noqa: SLF001
        wrapper.module = module
    return outer


def _walk(place: Place, seen: set[int]) -> Iterator[Place]:
    yield place
    if isinstance(place.module, AdaptedLayer) or id(place.module) in seen:
        return
    seen.add(id(place.module))
    for name, child in place.module._modules.items():  # noqa: SLF001 - named_children leaves out second names
        if child is not None:
            yield from _walk(_inside(place, name, child), seen)


def _inside(place: Place, name: str, child: nn.Module) -> Place:
    outer: Any = place.module
    group, first, own = place.ep_group, place.first_expert, name
    if getattr(outer, "ep_group", None) is not None:
        group = outer.ep_group
    if place.attribute == "local_experts" and name.isdecimal():
        first = rank_of(group) * len(outer) + int(name)
        own = str(first)
    elif getattr(child, "num_gemms", 0):
        first = rank_of(group) * int(child.num_gemms)  # type: ignore[arg-type]
    elif _NUMBER.fullmatch(name) and isinstance(getattr(child, "layer_number", None), int):
        own = str(int(child.layer_number) - 1)  # type: ignore[arg-type]  # Megatron counts from one, over all pieces
    return Place(
        child,
        outer,
        f"{place.name}.{name}" if place.name else name,
        f"{place.whole_name}.{own}" if place.whole_name else own,
        group,
        first,
        getattr(outer, "config", None) or place.config,
    )


def for_each(model: Model, func: Callable[[nn.Module], None]) -> None:
    """Call something with every module of every chunk."""
    for chunk in chunks_of(model):
        for module in chunk.modules():
            func(module)
