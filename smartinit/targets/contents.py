"""Values, objects and functions as JSON: what they are, without addresses, and the same in every process."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections import deque
from collections.abc import Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from smartinit.errors import ModelError
from smartinit.targets.source_code import code_digest, global_names, is_library, own_classes, source_digests
from smartinit.targets.tensor_digest import described, tensor_digest

if TYPE_CHECKING:
    from collections.abc import Callable

_DEEPEST = 8
_PLAIN = (complex, bytes, bytearray, range, slice, np.generic, np.dtype, torch.memory_format, torch.layout)


class Contents:
    """Turns values into JSON. Functions and classes are noted once, in the order in which they are met: `code`.

    Args:
        modules: id of a module -> what stands for it.
        configuration: JSON of what a configuration's ``to_dict`` gives.
    """

    def __init__(self, modules: Mapping[int, str], configuration: Callable[[object], object]) -> None:
        self._modules = dict(modules)
        self._configuration = configuration
        self._met: dict[int, tuple[object, int]] = {}  # the object is kept, so that no other gets its id
        self._waiting: deque[FunctionType | type] = deque()
        self._objects: dict[int, tuple[object, str]] = {}
        self._sources: set[str] = set()

    def value(self, value: object, depth: int = 0, *, own: bool = True) -> Any:  # noqa: ANN401 - JSON
        """What a setting is; None for nothing, for tensors that stand in lists and mappings, and for devices.

        Args:
            value: of any type.
            depth: in how many containers it stands.
            own: False: it is a setting of an installed library's, whose other objects are left out.
        """
        if value is None or isinstance(value, (torch.Tensor, torch.device, bool, int, float, str, Enum, torch.dtype)):
            return _simple(value)
        if depth < _DEEPEST and isinstance(value, Mapping):
            found = {self._key(key): self.value(item, depth + 1, own=own) for key, item in value.items()}
            return {key: item for key, item in found.items() if item is not None} or None
        if depth < _DEEPEST and isinstance(value, (list, tuple, deque)):
            listed = [self.value(item, depth + 1, own=own) for item in value]
            return listed if any(item is not None for item in listed) else None
        called = self.callable(value, depth)
        if called is None and (own or own_classes(type(value))):
            return self._other(value, depth)
        return called

    def callable(self, value: object, depth: int = 0) -> Any:  # noqa: ANN401 - JSON
        """What a function, method, partial or class is; None for what is none of them."""
        if isinstance(value, type):
            own = own_classes(value)
            return (
                ["class", value.__qualname__, self._note(value)] if own else f"{value.__module__}:{value.__qualname__}"
            )
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return ["method", self.callable(value.__func__), self.inner(value.__self__, depth + 1)]
        if isinstance(value, (functools.partial, functools.partialmethod)):
            return ["partial", self.inner(value.func, depth), self.inner([value.args, value.keywords], depth)]
        if isinstance(value, (BuiltinFunctionType, np.ufunc)) or inspect.isroutine(value):
            return f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', type(value).__name__)}"
        return None

    def inner(self, value: object, depth: int = 0) -> Any:  # noqa: ANN401 - JSON
        """As `value`, where nobody else sees tensors: in objects, and in what functions take from outside."""
        if isinstance(value, torch.Tensor):
            return self._once(value, lambda: _tensor(value))
        if isinstance(value, nn.Module):
            return self._module(value, depth)
        if depth < _DEEPEST and isinstance(value, Mapping):
            return {self._key(key): self.inner(item, depth + 1) for key, item in value.items()}
        if depth < _DEEPEST and isinstance(value, (list, tuple, deque)):
            return [self.inner(item, depth + 1) for item in value]
        return self.value(value, depth)

    def code(self) -> dict[str, Any]:
        """Everything that was noted, with all that it uses, and the digests of the files that it stands in."""
        noted = []
        while self._waiting:
            one = self._waiting.popleft()
            noted.append(self._class(one) if isinstance(one, type) else self._body(one))
        return {"noted": noted, "files": source_digests(self._sources)}

    def _key(self, key: object) -> str:
        if isinstance(key, (str, int, float, bool)):
            return str(key)
        return json.dumps(self.inner(key), sort_keys=True)

    def _other(self, value: object, depth: int) -> Any:  # noqa: ANN401 - JSON
        kind = type(value).__qualname__
        if isinstance(value, nn.Module):
            return self._module(value, depth)
        if isinstance(value, (*_PLAIN, np.ndarray, torch.jit.ScriptFunction)):
            return [kind, self._once(value, lambda: _text(value))]
        if isinstance(value, ModuleType):
            self._sources.add(value.__name__)
            return None
        if depth >= _DEEPEST or (kind.endswith("Cache") and is_library(type(value).__module__)):
            return None if depth < _DEEPEST else kind
        if isinstance(value, (set, frozenset)):
            return [kind, sorted(json.dumps(self.inner(one, depth + 1), sort_keys=True) for one in value)]
        return self._once(value, lambda: self._object(value, depth))

    def _object(self, value: object, depth: int) -> Any:  # noqa: ANN401 - JSON
        if callable(getattr(type(value), "to_dict", None)) and hasattr(value, "model_type"):
            return self._configuration(value)
        own = own_classes(type(value))
        fields = (
            isinstance(value, SimpleNamespace) or dataclasses.is_dataclass(value) or type(value).__name__ == "Namespace"
        )
        if not own and not fields:
            return type(value).__qualname__
        slots = [name for one in type(value).__mro__ for name in _texts(vars(one).get("__slots__", ()))]
        held = {name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)}
        held |= getattr(value, "__dict__", {})
        items = {name: item for name, item in held.items() if not (name.startswith("_") and "cache" in name)}
        return [self.callable(type(value)), self.inner(items, depth + 1)]

    def _once(self, value: object, made: Callable[[], object]) -> str:
        """Digest of an object, which is made once and ends where the object holds itself."""
        if id(value) not in self._objects:
            self._objects[id(value)] = (value, "itself")
            text = json.dumps(made(), sort_keys=True)
            self._objects[id(value)] = (value, hashlib.sha256(text.encode()).hexdigest())
        return self._objects[id(value)][1]

    def _module(self, module: nn.Module, depth: int) -> object:
        """A module that is held, not registered: the model's own stand for themselves."""
        if id(module) in self._modules or depth >= _DEEPEST:
            return ["module", self._modules.get(id(module), type(module).__qualname__)]
        return self._once(module, lambda: [self.callable(type(module)), self.inner(_held(module), depth + 1)])

    def _function(self, function: FunctionType) -> object:
        if not is_library(function.__globals__.get("__name__")):
            return ["function", function.__qualname__, self._note(function)]
        name = f"{function.__globals__.get('__name__')}:{function.__qualname__}"
        inside = [getattr(function, "__wrapped__", None), *map(_cell, function.__closure__ or ())]
        own = [one for one in inside if isinstance(one, FunctionType) and one is not function]
        return [name, *map(self._function, own)] if own else name

    def _note(self, one: FunctionType | type) -> int:
        if id(one) not in self._met:
            self._met[id(one)] = (one, len(self._met))
            self._waiting.append(one)
        return self._met[id(one)][1]

    def _body(self, function: FunctionType) -> Any:  # noqa: ANN401 - JSON
        self._sources.add(function.__globals__.get("__name__") or "")
        outside = {n: function.__globals__[n] for n in global_names(function.__code__) if n in function.__globals__}
        taken = [function.__defaults__, function.__kwdefaults__, list(map(_cell, function.__closure__ or ())), outside]
        return [code_digest(function.__code__), self.inner(taken)]

    def _class(self, kind: type) -> Any:  # noqa: ANN401 - JSON
        made = []
        for one in own_classes(kind):
            self._sources.add(one.__module__)
            made.append([one.__qualname__, {n: self._member(v) for n, v in vars(one).items() if _counts(kind, n, v)}])
        return made

    def _member(self, member: object) -> Any:  # noqa: ANN401 - JSON
        if isinstance(member, property):
            return [self.inner(one) for one in (member.fget, member.fset)]
        if isinstance(member, (staticmethod, classmethod)):
            return [type(member).__name__, self.inner(member.__func__)]
        if isinstance(member, functools.cached_property):
            return self.inner(member.func)
        return self.inner(member)


def _counts(kind: type, name: str, member: object) -> bool:
    if isinstance(member, (FunctionType, property, staticmethod, classmethod)):
        return True
    return not name.startswith("__") and not any(
        name in vars(one) for one in kind.__mro__ if is_library(one.__module__)
    )


def _held(module: nn.Module) -> dict[str, object]:
    always = vars(nn.Module())
    return {
        **dict(module.named_parameters(recurse=False)),
        **dict(module.named_buffers(recurse=False)),
        **module._modules,  # noqa: SLF001 - under all names
        **{name: one for name, one in vars(module).items() if name not in always and name != "_is_hf_initialized"},
    }


def _cell(cell: Any) -> object:  # noqa: ANN401 - types.CellType
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _texts(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [one for one in value if isinstance(one, str)]  # type: ignore[attr-defined]


def _tensor(tensor: torch.Tensor) -> str:
    try:
        return tensor_digest(tensor)
    except ModelError:
        return f"{type(tensor).__qualname__} {tensor.dtype} {tuple(tensor.shape)}"


def _text(value: Any) -> str:  # noqa: ANN401 - of `_PLAIN`, an array, or a scripted function
    if isinstance(value, torch.jit.ScriptFunction):
        return str(value.graph)
    if not isinstance(value, np.ndarray) or value.dtype.hasobject:
        return described(value.tolist() if isinstance(value, np.ndarray) else value)
    return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"


def _simple(value: object) -> Any:  # noqa: ANN401 - JSON
    if value is None or isinstance(value, (torch.Tensor, torch.device)):
        return None
    if isinstance(value, Enum):
        return [type(value).__qualname__, value.name]
    return str(value) if isinstance(value, torch.dtype) else value
