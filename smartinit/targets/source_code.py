"""Code that is not an installed library's: which it is, what Python made of it, and the files that it stands in."""

from __future__ import annotations

import ast
import dis
import hashlib
import re
import sys
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING

from smartinit.targets.tensor_digest import described

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
_LIBRARIES = frozenset(("builtins", "torch", "transformers", "peft", "accelerate", "numpy", "smartinit"))
_SCRIPTS = frozenset(("__main__", "__mp_main__"))
_MOST_FILES = 2000


def is_library(module: str | None) -> bool:
    """Whether a module, by its name, belongs to Python or to an installed library; not what is typed in or run."""
    if not module:
        return True
    return _is_library(module, getattr(sys.modules.get(module), "__file__", None) or "")


@lru_cache(4096)
def _is_library(module: str, file: str) -> bool:
    top = module.partition(".")[0]
    known = top in _LIBRARIES or (top in sys.stdlib_module_names and module not in _SCRIPTS)
    return known or bool(_INSTALLED.search(file))


def own_classes(kind: type) -> list[type]:
    """A class and those it inherits from, those of libraries left out."""
    return [one for one in kind.__mro__ if not is_library(one.__module__)]


def code_digest(code: CodeType) -> str:
    """Of what a function does; the same wherever it stands, in every process of one version of Python."""
    return hashlib.sha256(repr(_made(code)).encode()).hexdigest()


def _made(code: CodeType) -> list[object]:
    names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
    shape = [code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags]
    return [code.co_code, names, shape, [_constant(one) for one in code.co_consts]]


def _constant(value: object) -> object:
    if isinstance(value, CodeType):
        return _made(value)
    if isinstance(value, frozenset):  # its order is another one in every process
        return sorted(map(described, value))
    return described(value)


@lru_cache(4096)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The names that a function, and those within it, look up outside; sorted."""
    names = {one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names.update(global_names(inner))
    return tuple(sorted(names))


def source_digests(modules: Iterable[str]) -> list[str]:
    """Digests of the files of these modules and of all that they import, sorted; libraries and scripts left out.

    A script is left out as it changes with every run's settings: what a model takes from it is followed one by one.
    """
    waiting, seen = list(modules), set(_SCRIPTS)
    digests: set[str] = set()
    while waiting and len(digests) < _MOST_FILES:
        name = waiting.pop()
        if name in seen or is_library(name) or name not in sys.modules:
            continue
        seen.add(name)
        file = getattr(sys.modules[name], "__file__", None)
        try:
            content = Path(file).read_bytes() if file else b""
        except OSError:  # in an archive, or gone
            continue
        digests.add(hashlib.sha256(content).hexdigest())
        package = getattr(sys.modules[name], "__package__", None) or ""
        waiting += _imports(content, package)
    return sorted(digests)


@lru_cache(4096)
def _imports(content: bytes, package: str) -> tuple[str, ...]:
    try:
        return tuple(_imported(ast.parse(content), package))
    except (SyntaxError, ValueError, RecursionError):  # compiled
        return ()


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield from (".".join(parts[: count + 1]) for count in range(len(parts)))
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
