"""The names that users write are a contract."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import smartinit as si

EVA_TAIL = {
    "forward_fn": callable,
    "prepare_model_inputs_fn": callable,
    "prepare_layer_inputs_fn": callable,
    "adapter_name": "default",
    "gather_distributed_inputs": True,
    "show_progress_bar": True,
}
SIGNATURES = {
    "get_eva_state_dict": {
        "model": inspect.Parameter.empty,
        "dataloader": inspect.Parameter.empty,
        "peft_config": None,
        **EVA_TAIL,
    },
    "initialize_lora_eva_weights": {
        "model": inspect.Parameter.empty,
        "dataloader": None,
        "eva_state_dict": None,
        **EVA_TAIL,
    },
}


def defaults(function: object) -> dict[str, object]:
    """Parameter names in order, with their defaults; a default that is a function counts as `callable`."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: callable if inspect.isfunction(p.default) else p.default for p in parameters}


@pytest.mark.parametrize("name", si.__all__)
def test_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(si, name)
    if name == "__version__":
        assert value
        assert all(part.isdigit() for part in value.split("."))
        return
    assert isinstance(value, ModuleType) or value.__name__ == name
    # A dataclass without a docstring gets its own signature as one.
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}(")


def test_public_names_are_sorted_and_listed() -> None:
    assert list(si.__all__) == sorted(si.__all__)
    assert set(si.__all__) <= set(dir(si))


def test_table_of_names_equals_the_imports_for_type_checkers() -> None:
    tree = ast.parse(Path(si.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == si._MODULE_OF
    assert set(typed) == set(si.__all__) - {"__version__", "errors"}


def test_star_import_gives_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from smartinit import *", namespace)  # noqa: S102 - the only way to write a star import in a function
    assert set(si.__all__) <= set(namespace)


def test_second_access_is_the_same_object() -> None:
    assert si.Plan is si.Plan is importlib.import_module("smartinit.planning.plan").Plan


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'smartinit' has no attribute 'compte'"):
        _ = si.compte
    assert not hasattr(si, "LoraConfigs")


@pytest.mark.parametrize("name", SIGNATURES)
def test_eva_signature_is_the_contract(name: str) -> None:
    ours = defaults(getattr(si, name))
    assert ours.pop("store") is None  # by keyword, after PEFT's own
    assert list(ours.items()) == list(SIGNATURES[name].items())


@pytest.mark.parametrize("name", SIGNATURES)
def test_contract_is_the_signature_of_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    assert list(defaults(getattr(peft, name)).items()) == list(SIGNATURES[name].items())
