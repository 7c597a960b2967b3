"""What was asked for, in canonical form: equal requests have equal digests."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from smartinit.errors import ArgumentError, ConfigError

_MAPPINGS = ("options", "planner", "sampling", "numerics")


@dataclass(frozen=True)
class Recipe:
    """One request: everything that the result depends on, but the model and the data themselves.

    Attributes:
        method: registered name of the initialisation, for instance ``"eva"``.
        options: the method's own options.
        planner: how ranks are given out: planner's name, budget, caps.
        targets: full names of the target modules, in model order.
        sampling: which rows of the data are read: batches, masks, limits.
        numerics: precision and algorithm of the costly part.
        seed: of every random choice.
        version: of the package that made the result.

    All values are JSON: text, numbers, booleans, None, and lists and mappings of these.

    Raises:
        ArgumentError: a value that JSON has no form for, or a mapping's key that is no text.
        ConfigError: NaN or infinity, which have no canonical form.
    """

    method: str
    options: Mapping[str, object]
    planner: Mapping[str, object]
    targets: tuple[str, ...]
    sampling: Mapping[str, object]
    numerics: Mapping[str, object]
    seed: int
    version: str

    def __post_init__(self) -> None:
        """Freeze all values, so that the digest stays true."""
        for name in _MAPPINGS:
            object.__setattr__(self, name, _freeze(getattr(self, name), name))
        object.__setattr__(self, "targets", _freeze(self.targets, "targets"))

    def __hash__(self) -> int:
        """Frozen mappings have no hash of their own."""
        return hash(self.digest)

    def canonical(self) -> str:
        """Canonical JSON text: keys sorted, no white space, ASCII, floats as ``repr`` writes them."""
        return json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @property
    def digest(self) -> str:
        """Sha256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {name: _thaw(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Recipe:
        """The inverse of `as_dict`.

        Raises:
            ConfigError: a field is missing, unknown or of the wrong kind.
        """
        fields = cls.__dataclass_fields__
        if set(data) != set(fields):
            odd = sorted(set(data) ^ set(fields))
            raise ConfigError(f"a recipe has exactly the fields {', '.join(fields)}; missing or unknown: {odd}")
        for name in _MAPPINGS:
            if not isinstance(data[name], Mapping):
                raise ConfigError(f"the recipe's '{name}' must be a mapping, not {type(data[name]).__name__}")
        return cls(**cast("dict[str, object]", dict(data)))  # type: ignore[arg-type]


def _freeze(value: object, path: str) -> object:
    """A read-only copy of ``value``; the error names the place of what cannot be canonical."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                # JSON would write 1 and "1" alike: two requests, one digest.
                raise ArgumentError(f"the key {key!r} of the recipe's '{path}' must be text, not {type(key).__name__}")
        return MappingProxyType({key: _freeze(item, f"{path}.{key}") for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item, f"{path}[{index}]") for index, item in enumerate(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"the recipe's '{path}' is {value}; a recipe holds finite numbers only")
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise ArgumentError(
        f"the recipe's '{path}' is a {type(value).__name__}; expected text, a number, a boolean, None, a list or a "
        "mapping of these"
    )


def _thaw(value: object) -> object:
    """Mappings as dict, tuples as list: what `json` reads back."""
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_thaw(item) for item in value]
    return value
