"""What an adapter can be called: it becomes a key of modules, a part of state keys and the name of a folder."""

from __future__ import annotations

from torch import nn

from smartinit.adapters.mixed import BASE
from smartinit.errors import ArgumentError, ConfigError

_RESERVED = {
    BASE: "stands for no adapter at all",
    "start": "is the folder in which a split adapter keeps its start",
}
_LONGEST = 200  # bytes; file systems end at 255


def check_adapter_name(name: object) -> str:
    """The name, if modules, state keys and files can have it.

    Raises:
        ArgumentError: it is no string.
        ConfigError: it cannot be.
    """
    if not isinstance(name, str):
        raise ArgumentError(f"an adapter's name is a {type(name).__name__}; expected a string such as 'default'")
    problem = None
    if not name or name != name.strip():
        problem = "is empty or begins or ends with a space"
    elif odd := [character for character in name if character in './\\:*?"<>|' or not character.isprintable()]:
        problem = f"holds {odd[0]!r}, which state keys or file names cannot"
    elif len(name.encode()) > _LONGEST:
        problem = f"is longer than {_LONGEST} bytes"
    elif any(hasattr(kind, name) for kind in (nn.ModuleDict, nn.ParameterDict)) or hasattr(nn.ModuleDict(), name):
        problem = "is the name of something that torch's modules have themselves"
    else:
        problem = _RESERVED.get(name)
    if problem is not None:
        raise ConfigError(f"an adapter cannot be called {name!r}: the name {problem}; choose another")
    return name
