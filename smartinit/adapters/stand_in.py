"""Parts that stand for a whole module: what is asked of them is asked of the module that is in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.part import AdapterPart
from smartinit.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn


class StandIn(AdapterPart):
    """A part that any kind of module can be in: models read more of it than its output.

    What this class does not have itself (``embedding_dim``, ``weight``, …) is that of the module in use: the active
    adapter's, or the base layer while adapters are disabled or none of the active ones is here.
    """

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (whatever the wrapped module has)
        """What is missing here is looked up in the module that is in use."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Nothing is set yet while an object is being copied; and Python's own protocols are not the wrapped one's.
            if name == "base_layer" or name.startswith("__") or "base_layer" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.in_use, name)

    @property
    def in_use(self) -> nn.Module:
        """The module that answers for this place at present."""
        raise NotImplementedError

    def active_here(self) -> list[str]:
        """The active adapters that have something here; none while adapters are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if self.has(name)]

    def run(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """The forward pass with these adapters, all of which are here; with none of them the base layer's."""
        raise NotImplementedError

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        """The module's output with the active adapters.

        Args:
            *args: for the module.
            adapter_names: an adapter for every row of the first argument, in place of the active ones.
            **kwargs: for the module.

        Raises:
            ArgumentError: another number of names than of rows.
            ConfigError: rows of different adapters, and a module that takes or gives more than one tensor.
        """
        if adapter_names is None or self.disable_adapters:
            return self.run(self.active_here(), *args, **kwargs)
        names = [name if self.has(name) else None for name in adapter_names]
        if len(set(names)) > 1:
            return self._by_row(names, *args, **kwargs)
        return self.run([name for name in names[:1] if name is not None], *args, **kwargs)

    def _by_row(self, names: Sequence[str | None], *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        x, *others = args or (None,)
        if not isinstance(x, torch.Tensor) or any(isinstance(y, torch.Tensor) for y in (*others, *kwargs.values())):
            raise self._not_by_row()
        if len(names) != len(x):
            raise ArgumentError(
                f"adapter_names has {len(names)} entries for a batch of {len(x)} rows; give one per row"
            )
        rows: dict[str | None, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        outputs = []
        for name, some in rows.items():
            output = self.run([] if name is None else [name], x[torch.tensor(some, device=x.device)], *others, **kwargs)
            if not isinstance(output, torch.Tensor) or len(output) != len(some):
                raise self._not_by_row()
            outputs.append(output)
        order = torch.tensor([row for some in rows.values() for row in some], device=outputs[0].device)
        return torch.cat(outputs)[order.argsort()]

    def _not_by_row(self) -> ConfigError:
        return ConfigError(
            f"a {type(self.get_base_layer()).__name__} takes or gives more than one tensor, so its rows cannot have "
            "different adapters; use one adapter per batch"
        )


class Places:
    """Where stand-ins are in a model, so that nothing else is put in, into or around the same place.

    Their adapters each have a module of their own there, and a LoRA layer inside one of those would be no part of the
    others. PEFT refuses most of this as well.

    Args:
        parts: module name -> part, of a model as it is.
    """

    def __init__(self, parts: Mapping[str, AdapterPart]) -> None:
        self._parts = parts
        self._inside: dict[str, str] = {}
        for name in parts:
            for ancestor in _ancestors(name):
                self._inside.setdefault(ancestor, name)

    def check(self, name: str, kind: type[AdapterPart], adapter_name: str) -> None:
        """Whether a part of this kind can be put in a place.

        Raises:
            ConfigError: another kind of part is there, inside or around, and one of the two is a stand-in.
        """
        at = self._parts.get(name)
        if at is not None and isinstance(at, kind):
            return
        near = [] if at is None else [name]
        near += [ancestor for ancestor in _ancestors(name) if isinstance(self._parts.get(ancestor), StandIn)]
        if at is None and issubclass(kind, StandIn) and name in self._inside:
            near.append(self._inside[name])
        for other in near:
            part = self._parts[other]
            if issubclass(kind, StandIn) or isinstance(part, StandIn):
                raise ConfigError(
                    f"adapter '{adapter_name}' cannot have {_MEANT.get(kind.__name__, 'a LoRA layer')} at '{name}': "
                    f"there is {_MEANT.get(type(part).__name__, 'a LoRA layer')} of adapter "
                    f"{', '.join(map(repr, part.adapters()))} at '{other}'; choose one of them"
                )


_MEANT = {
    "SavedModule": "a module trained whole (modules_to_save)",
    "TrainedTokens": "rows trained alone (trainable_token_indices)",
}


def _ancestors(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))
