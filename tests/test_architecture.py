"""The folders are the flow: what each may import, and what no module may do, read from the source itself."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = Path(__file__).parents[1] / "smartinit"


class Tier(NamedTuple):
    """Units (modules or folders) of one height, and the heights that they may import from."""

    units: frozenset[str]
    may_import: frozenset[int]


def tier(units: str, *may_import: int) -> Tier:
    """A tier from the names of its units."""
    return Tier(frozenset(units.split()), frozenset(may_import))


# Imports point one way: every tier may import itself and lower ones.
TIERS = (
    # tensors and values only
    tier("errors linalg", 0),
    tier("config recipe spectrum factors statistics planning.plan", 0, 1),
    tier("methods planning", 0, 1, 2),
    # the files of others, as values: below the adapters, whose models save and load themselves
    tier("formats", 0, 1, 3),
    # the only nn.Module code; it knows of no method and no planner
    tier("targets activations adapters", 0, 1, 3, 4),
    # the other file code
    tier(
        "data artefact artefact_record convert export megatron_reading megatron_start_names model_shape store "
        "stored_updates",
        0,
        1,
        2,
        3,
        4,
        5,
    ),
    tier("streaming distributed", 0, 1, 2, 3, 4, 5, 6),
    tier(
        "pipeline collect corda_files decomposition gradients initialisation job layer_start observation "
        "quantised rank_request run_options assembly computation reuse eva megatron training_record",
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ),
    tier("report cli demo service __main__", 0, 1, 2, 3, 4, 5, 6, 7, 8),
)
HEIGHT = {unit: height for height, row in enumerate(TIERS) for unit in row.units}
FORMATS, MODULES = 3, 4  # the tiers of formats and of nn.Module code


class Import(NamedTuple):
    """One imported module, by its full dotted name."""

    module: str
    line: int
    type_only: bool


@dataclass(frozen=True)
class Module:
    """One source file of the package; `name` is dotted, relative to the package ("" is its __init__)."""

    name: str
    source: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return _parse(self.source)

    @property
    def unit(self) -> str:
        """The entry of the table above which this module belongs to, or its own name if there is none."""
        return unit_of(self.name)

    @property
    def height(self) -> int:
        """Its tier; what is not in the table is above all (and fails a test of its own)."""
        return HEIGHT.get(self.unit, len(TIERS))

    def imports(self) -> Iterator[Import]:
        """Everything imported, at any depth; names imported from a package count as modules if they may be ones."""
        type_only = {
            id(inner)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for statement in node.body
            for inner in ast.walk(statement)
        }
        for node in ast.walk(self.tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (Import(name, node.lineno, id(node) in type_only) for name in names)

    def own_imports(self) -> Iterator[tuple[str, int]]:
        """Imports from smartinit itself, as a name relative to the package, and the line."""
        yield from ((i.module.partition(".")[2], i.line) for i in self.imports() if within(i.module, "smartinit"))

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = ["smartinit", *filter(None, self.name.split("."))]
        kept = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*kept, *filter(None, [node.module])])


@cache
def _parse(source: str) -> ast.Module:
    return ast.parse(source)


def unit_of(name: str) -> str:
    """The longest prefix of a dotted name that stands in the table, else the first part."""
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in HEIGHT), parts[0])


def within(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of these packages or lies in one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found.append(
            Module(".".join(parts[:-1] if is_package else parts), path.read_text(encoding="utf-8"), is_package)
        )
    return tuple(found)


# --- the rules: each yields what it finds wrong -------------------------------------------------------------------


def has_a_tier(module: Module) -> Iterator[str]:
    """A new module or folder needs a place in the table."""
    if module.name and module.unit not in HEIGHT:
        yield f"'{module.unit}' stands in no tier"


def imports_point_one_way(module: Module) -> Iterator[str]:
    """Types count too: who needs to name a type depends on its module. Only the public names look upwards."""
    if not module.name or module.unit not in HEIGHT:
        return
    allowed = TIERS[module.height].may_import
    for name, line in module.own_imports():
        unit = unit_of(name)
        if not name or unit == "__version__":
            continue
        if HEIGHT.get(unit) not in allowed:
            yield f"line {line}: {module.unit} (tier {module.height}) imports {name} (tier {HEIGHT.get(unit)})"


def linalg_is_pure(module: Module) -> Iterator[str]:
    """linalg/ is tensor functions: torch, numpy, the standard library and the errors."""
    if module.unit != "linalg":
        return
    for found in module.imports():
        fine = found.type_only and within(found.module, "jaxtyping")
        fine |= found.module.split(".")[0] in sys.stdlib_module_names
        if not fine and not within(found.module, "torch", "numpy", "smartinit.errors", "smartinit.linalg"):
            yield f"line {found.line}: imports {found.module}"


def methods_see_tensors_only(module: Module) -> Iterator[str]:
    """methods/ sees no model, hook, file or config: that keeps a method to one short file."""
    if module.unit != "methods":
        return
    forbidden = ("smartinit.config", "os", "pathlib", "shutil", "tempfile", "transformers", "datasets", "peft")
    for found in module.imports():
        if within(found.module, *forbidden):
            yield f"line {found.line}: imports {found.module}"


def no_modules_below_the_adapters(module: Module) -> Iterator[str]:
    """torch.nn (but for its functions) and transformers belong to targets, activations, adapters and above."""
    if module.height >= MODULES:
        return
    for found in module.imports():
        uses_nn = within(found.module, "torch.nn") and not within(found.module, "torch.nn.functional")
        if uses_nn or within(found.module, "transformers"):
            yield f"line {found.line}: imports {found.module}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if within(text, "torch.nn") and text != "torch.nn" and not within(text, "torch.nn.functional"):
                yield f"line {node.lineno}: uses {text}"


def no_files_but_in_file_code(module: Module) -> Iterator[str]:
    """Formats, artefact, store, data and what is above them touch files; nothing else does."""
    if module.height > MODULES or module.height == FORMATS:
        return
    for found in module.imports():
        if within(found.module, "safetensors", "shutil", "tempfile", "datasets", "fsspec"):
            yield f"line {found.line}: imports {found.module}"
    yield from (f"line {line}: calls open" for line in calls(module, "open"))


def has_a_telling_name(module: Module) -> Iterator[str]:
    """A module is named after its concept."""
    for part in module.name.split("."):
        if part.strip("_") in {"utils", "util", "helpers", "helper", "misc", "common"}:
            yield f"'{part}' names no concept"


def is_short(module: Module) -> Iterator[str]:
    """Past 400 lines there are two things in a module."""
    lines = len(module.source.splitlines())
    if lines > 400:
        yield f"{lines} lines; more than 400 means two concepts"


def trusts_no_file(module: Module) -> Iterator[str]:
    """Nothing is pickled and no text becomes code."""
    for found in module.imports():
        if within(found.module, "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.load"):
            yield f"line {found.line}: imports {found.module}"
    harmless = {line for line in calls(module, "exec") if 'exec("")' in module.source.splitlines()[line - 1]}
    yield from (f"line {line}: runs text as code" for line in calls(module, "eval", "exec") if line not in harmless)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}:
            yield f"line {node.lineno}: {ast.unparse(node)} pickles"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"line {node.value.lineno}: allow_pickle"


def names_no_workplace(module: Module) -> Iterator[str]:
    """The package knows nothing of the machine that it was written on."""
    for number, line in enumerate(module.source.splitlines(), 1):
        if re.search(r"(?<![\w.])/work\b|\.\./shared", line):
            yield f"line {number}: {line.strip()}"


def calls(module: Module, *names: str) -> Iterator[int]:
    """Lines that call one of these builtins by its bare name."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node.lineno


# Every rule with modules that break it: a rule that cannot fail would guard nothing.
RULES: dict[Callable[[Module], Iterator[str]], list[Module]] = {
    has_a_tier: [Module("somewhere", ""), Module("somewhere.else_", "")],
    imports_point_one_way: [
        Module("errors", "from smartinit.spectrum import Spectrum"),
        Module("spectrum", "import smartinit.methods.eva"),
        Module("planning.plan", "from . import variance"),
        Module("methods.eva", "def f():\n    from ..activations import capture"),
        Module("methods", "from .. import targets", is_package=True),
        Module("adapters.lora", "if TYPE_CHECKING:\n    from smartinit.methods import Method"),
        Module("targets.select", "from smartinit.planning.variance import redistribute"),
        Module("formats.peft", "from smartinit import pipeline"),
        Module("formats.peft", "from smartinit.adapters import layer"),
        Module("pipeline", "from smartinit.cli import main"),
        Module("config", "from smartinit import unheard_of"),
    ],
    linalg_is_pure: [
        Module("linalg.nystrom", "import scipy.linalg"),
        Module("linalg.nystrom", "from smartinit.spectrum import Spectrum"),
        Module("linalg.nystrom", "from jaxtyping import Float"),
    ],
    methods_see_tensors_only: [
        Module("methods.eva", "from pathlib import Path"),
        Module("methods.eva", "from smartinit.config import EvaConfig"),
    ],
    no_modules_below_the_adapters: [
        Module("methods.eva", "from torch import nn"),
        Module("statistics.gram", "import torch.nn as nn"),
        Module("spectrum", "import torch\ndef f(m: torch.nn.Module): ..."),
        Module("config", "import transformers"),
    ],
    no_files_but_in_file_code: [
        Module("recipe", "with open('x') as f: ..."),
        Module("adapters.state", "from safetensors.torch import save_file"),
    ],
    has_a_telling_name: [Module("linalg.utils", ""), Module("helpers.lora", ""), Module("targets._misc", "")],
    is_short: [Module("spectrum", "x = 1\n" * 401)],
    trusts_no_file: [
        Module("store.local", "import pickle"),
        Module("store.local", "from torch import load"),
        Module("store.local", "torch.load('x', weights_only=True)"),
        Module("store.local", "np.load('x', allow_pickle=True)"),
        Module("data.rows", "eval('1')"),
        Module("data.rows", "exec('1')"),
    ],
    names_no_workplace: [Module("demo", "x = '/work/main'"), Module("demo", "# see ../shared/docs")],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Callable[[Module], Iterator[str]]) -> None:
    found = [f"smartinit.{module.name}: {text}" for module in modules() for text in rule(module)]
    assert not found, f"{rule.__doc__}\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "module"),
    [(rule, module) for rule, broken in RULES.items() for module in broken],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_rule_can_fail(rule: Callable[[Module], Iterator[str]], module: Module) -> None:
    assert list(rule(module))


def test_the_rules_allow_what_is_fine() -> None:
    fine = [
        Module("linalg.nystrom", "import math\nimport torch\nfrom smartinit.errors import ConfigError\nmodel.eval()"),
        Module("methods.eva", "from smartinit.factors import Factors\nfrom torch.nn import functional"),
        Module("planning.variance", "from .plan import Plan\nfrom smartinit.spectrum import Spectrum"),
        Module("adapters.lora", "from torch import nn\nfrom smartinit.planning.plan import Plan"),
        Module("formats.peft", "from safetensors.torch import save_file\nfrom smartinit.factors import Factors"),
        Module("cli", "from smartinit import __version__, pipeline\nx = 'framework/workers'", is_package=True),
    ]
    assert [(module.name, text) for module in fine for rule in RULES for text in rule(module)] == []


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """The names along one cycle of a directed graph, its first name repeated at the end; empty without one."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next(filter(None, (walk(name, []) for name in sorted(edges))), [])


def test_no_import_cycles() -> None:
    known = {module.name for module in modules()}

    def resolve(name: str) -> str:
        return name if name in known else name.rpartition(".")[0]

    edges = {m.name: {resolve(name) for name, _ in m.own_imports()} - {m.name, ""} for m in modules() if m.name}
    assert find_cycle(edges) == []


def test_a_cycle_would_be_found() -> None:
    assert find_cycle({"a": {"b", "d"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
