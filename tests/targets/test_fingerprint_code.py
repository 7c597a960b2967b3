"""Whatever changes what a model computes changes its fingerprint: the user's code, settings, hooks, functions."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import subprocess
import sys
from enum import Enum
from types import MethodType, SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

import smartinit
from smartinit.targets.fingerprint import model_fingerprint


def root(model: nn.Module) -> str:
    return model_fingerprint(model, threads=1).root


# --- code ------------------------------------------------------------------------------------------------------------

NET = {
    "a helper of the same file": {
        "net.py": "import torch\nfrom torch import nn\n\ndef helper(x):\n    return x.abs()\n\n"
        "class Net(nn.Linear):\n    def forward(self, x):\n        return helper(x)\n"
    },
    "a module of the same package": {
        "pack/__init__.py": "",
        "pack/inner.py": "def helper(x):\n    return x.abs()\n",
        "pack/middle.py": "from pack.inner import helper\n\ndef more(x):\n    return helper(x)\n",
        "net.py": "from torch import nn\nfrom pack import middle\n\n"
        "class Net(nn.Linear):\n    def forward(self, x):\n        return middle.more(x)\n",
    },
    "a function imported late, by a name relative to the package": {
        "net/__init__.py": "from .model import Net\n",
        "net/names.py": "CHOSEN = 'abs'\n",
        "net/model.py": "from torch import nn\nfrom .names import CHOSEN\n\n"
        "class Net(nn.Linear):\n    def forward(self, x):\n        return getattr(x, CHOSEN)()\n",
    },
}
TAKE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from net import Net
from smartinit.targets.fingerprint import model_fingerprint
torch.manual_seed(0)
print(model_fingerprint(Net(2, 2)).root)
"""


@functools.cache
def said(program: str, *arguments: object, hash_seed: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize("files", NET.values(), ids=NET)
def test_code_outside_the_class_counts(files, tmp_path):
    roots = []
    for folder, function in (("one", "abs"), ("two", "sin"), ("three", "abs")):
        for name, text in files.items():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(text.replace("abs", function))
        roots.append(said(TAKE, tmp_path / folder, hash_seed=len(roots)))
    assert (roots[0] == roots[2], roots[0] != roots[1]) == (True, True)


SCRIPT = """
import torch
from dataclasses import dataclass
from torch import nn
from smartinit.targets.fingerprint import model_fingerprint

SCALE = 2.0
LEARNING_RATE = 1.0
ACTS = {"one": torch.abs}

def inner(x):
    return x if x.dim() in {1, 2, 3} and str(x.dtype) not in {"a", "b", "c", "d"} else -x

def helper(x):
    return inner(x) * SCALE

class Net(nn.Linear):
    factor = 1
    def forward(self, x):
        return ACTS["one"](helper(x)) * self.factor

torch.manual_seed(0)
print(model_fingerprint(Net(2, 2)).root)
"""
EDITS = {
    "a constant": ("SCALE = 2.0", "SCALE = 3.0"),
    "a function that a function calls": ("else -x", "else x"),
    "a table of functions": ("torch.abs", "torch.sin"),
    "a constant of the class": ("factor = 1", "factor = 2"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_script_counts_as_far_as_the_model_uses_it(edit):
    before = said(SCRIPT)
    assert said(SCRIPT.replace(*edit)) != before
    assert said(SCRIPT.replace("LEARNING_RATE = 1.0", "LEARNING_RATE = 2.0\n# a comment"), hash_seed=7) == before


def test_classes_without_a_source_that_can_be_read():
    names: dict = {"nn": nn, "__name__": "gone"}
    text = "def helper(x):\n    return x.abs()\n"
    text += "class Net(nn.Linear):\n    def forward(self, x):\n        return helper(x)\n"
    roots = []
    for code in (text, text.replace("abs", "sin"), text):
        exec(code, names)  # noqa: S102
        torch.manual_seed(0)
        roots.append(root(names["Net"](2, 2)))
    assert (roots[0] == roots[2], roots[0] != roots[1]) == (True, True)


def test_a_method_that_was_put_into_a_librarys_class(tiny_llama, monkeypatch):
    model = tiny_llama()
    before = root(model)
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: x * self.weight)
    assert root(model) != before


def test_generated_code_counts():
    def traced(function):
        class Net(nn.Module):
            def forward(self, x):
                return function(x)

        return torch.fx.symbolic_trace(Net())

    assert root(traced(torch.abs)) == root(traced(torch.abs)) != root(traced(torch.sin))


# --- settings --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    act: object = F.relu


class Mode(Enum):
    ADD = 1
    MULTIPLY = 2


class Policy:
    __slots__ = ("_step", "cfg")

    def __init__(self, step):
        self.cfg, self._step = Config(), step


class Net(nn.Module):
    """A user's: what it holds is given by keywords."""

    def __init__(self, **held):
        super().__init__()
        vars(self).update(held)


def closure(factor):
    return lambda x: x * factor


def holding(value):
    own = Config()
    own.scale = own.more = value
    return own


def held_tensor(fill):
    return SimpleNamespace(of=torch.full((2,), fill))


def linear(fill):
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, fill)
    nn.init.zeros_(module.bias)
    return module


SETTINGS = {
    "a function": (F.relu, F.silu),
    "a builtin function": (torch.sin, torch.cos),
    "two functions of one's own": (closure, linear),
    "a closure": (closure(1), closure(2)),
    "a closure over a tensor": (closure(torch.zeros(1)), closure(torch.ones(1))),
    "a partial": (functools.partial(F.elu, alpha=0.1), functools.partial(F.elu, alpha=0.2)),
    "a method": (Config(1.0).__eq__, Config(2.0).__eq__),
    "a dataclass": (Config(1.0), Config(2.0)),
    "a function in a dataclass": (Config(act=F.relu), Config(act=F.silu)),
    "a simple namespace": (SimpleNamespace(a=1), SimpleNamespace(a=2)),
    "a tensor in a namespace": (held_tensor(1.0), held_tensor(2.0)),
    "an object that holds more": (holding(1), holding({2})),
    "an object with slots": (Policy(1), Policy(2)),
    "an array": (np.arange(3.0), np.arange(3.0) + 1),
    "the type of an array": (np.zeros(2, np.float32), np.zeros(2, np.int32)),
    "a number of numpy": (np.float32(1), np.float32(2)),
    "a set": ({"a", "b"}, {"a", "c"}),
    "an enum": (Mode.ADD, Mode.MULTIPLY),
    "a complex number": (1j, 2j),
    "a class": (nn.ReLU, nn.SiLU),
    "a list of modules": ([linear(1.0)], [linear(2.0)]),
    "another type": (Config(), SimpleNamespace()),
}  # fmt: skip


@pytest.mark.parametrize("name", ["setting", "_setting"])
@pytest.mark.parametrize(("one", "other"), SETTINGS.values(), ids=SETTINGS)
def test_every_setting_of_a_module_of_ones_own_counts(name, one, other):
    before = root(Net(**{name: one}))
    assert root(Net(**{name: other})) != before
    assert root(Net(**{name: one})) == before == root(copy.deepcopy(Net(**{name: one})))


def test_private_settings_of_ones_own_module():
    assert root(Net(_p=1)) == root(Net(_p=1)) != root(Net(_p=2))
    assert root(Net(_t=torch.zeros(1))) != root(Net(_t=torch.ones(1)))
    assert root(Net()) == root(Net(_seq_len_cached=3, _cos_cached=torch.ones(2), _gradient_checkpointing_func=F.relu))


def test_an_object_that_holds_itself_ends():
    ring = SimpleNamespace(a=1)
    ring.ring, other = ring, SimpleNamespace(a=2)
    other.ring = other
    model = Net(ring=ring)
    ring.model = model
    assert root(model) == root(model) != root(Net(ring=other))


def test_functions_in_a_librarys_module_count():
    def layer(activation):
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, activation=activation)

    assert root(layer(F.silu)) == root(layer(F.silu)) != root(layer(torch.tanh))


def test_the_configuration_of_a_part_counts(tiny_llama):
    def around(**options):
        return root(Net(_modules={"inner": tiny_llama(**options)}))

    assert around() == around() != around(initializer_range=0.5)


def mine(*_, **__):
    return 1


def another(*_, **__):
    return 2


def test_the_loss_function_counts(tiny_llama):
    roots = []
    for function in (None, mine, another):
        model = tiny_llama()
        if function is not None:
            model.loss_function = function
        roots.append(root(model))
    assert len(set(roots)) == 3


def test_a_method_replaced_on_one_module(tiny_llama):
    roots = []
    for function in (None, mine, another):
        model = tiny_llama()
        if function is not None:
            model.model.norm.forward = MethodType(function, model.model.norm)
        roots.append(root(model))
    assert len(set(roots)) == 3


def test_the_seed_of_hashing_and_addresses_change_nothing():
    program = """
import functools, numpy, torch, types
from torch import nn
from torch.nn import functional as F
from smartinit.targets.fingerprint import model_fingerprint
class Own:
    def __init__(self): self.names = {"a", "b", "c", "d"}
class Net(nn.Module):
    def forward(self, x):
        return x if "a" in {"a", "b", "c"} else x
net = Net()
net.of, net.names, net.part = Own(), {"x": {"a", "b", "z"}}, functools.partial(F.relu, inplace=True)
net._p, net.key = object(), {object: 1, Own: 2}
net.register_forward_hook(lambda *_: Own() and None)
print(model_fingerprint(net).root)
"""
    assert len({said(program, hash_seed=seed) for seed in (0, 7)}) == 1


# --- registered functions and hooks ----------------------------------------------------------------------------------


def test_attention_that_was_registered_counts(tiny_llama):
    from transformers import AttentionInterface

    def scaled(factor):
        def attention(module, query, *_, **__):
            return query * factor, None

        return attention

    roots = [root(tiny_llama())]
    try:
        for name, function in (("mine", scaled(1)), ("mine", scaled(2)), ("mine_too", scaled(2)), ("sdpa", scaled(1))):
            kept = AttentionInterface._global_mapping.get(name)
            AttentionInterface.register(name, function)
            model = tiny_llama()
            model.set_attn_implementation(name)
            roots.append(root(model))
            if kept is not None:
                AttentionInterface.register(name, kept)
    finally:
        for name in ("mine", "mine_too"):
            AttentionInterface._global_mapping.pop(name, None)
    assert len(set(roots)) == 5
    usual = tiny_llama()
    usual.set_attn_implementation("sdpa")
    assert root(usual) == roots[0]


def hooked(model, register, hook):
    getattr(model.model.norm, register)(hook)
    return model


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_users_hooks_count(tiny_llama, register):
    roots = [root(tiny_llama())] + [root(hooked(tiny_llama(), register, hook)) for hook in (mine, another, closure(1))]
    assert len(set(roots)) == 4
    assert root(hooked(tiny_llama(), register, mine)) == roots[1]


def test_a_users_hook_on_a_part_of_an_adapter_and_on_all_modules(tiny_llama):
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    before = root(model)
    model.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(mine)
    assert root(model) != before
    hook = nn.modules.module.register_module_forward_hook(mine)
    try:
        assert root(tiny_llama()) != before
    finally:
        hook.remove()
    assert root(tiny_llama()) == before


def test_the_hooks_of_libraries_do_not_count(tiny_llama):
    accelerate = pytest.importorskip("accelerate")
    before = root(tiny_llama())
    model = accelerate.dispatch_model(tiny_llama(), {"": "cpu"}, force_hooks=True)
    assert hasattr(model, "_hf_hook")
    assert root(model) == before
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert root(model) == before
    capturing = tiny_llama()
    adapted = smartinit.LoraModel(capturing, smartinit.LoraConfig(target_modules=["q_proj"]))
    assert root(adapted) == before


def test_parametrised_weights_have_no_digest_under_their_own_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.utils.parametrizations.weight_norm(model[1])
    found = model_fingerprint(model).tensors
    assert ("0.weight" in found, "1.weight" in found) == (True, False)
