"""What every initialisation must do, on every kind of layer: one suite over the registry."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import smartinit as si
from smartinit.errors import ConfigError, SmartinitError
from smartinit.methods import available_methods

if TYPE_CHECKING:
    from types import ModuleType


def _conftest() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conformance_models", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["conformance_models"] = module
    spec.loader.exec_module(module)
    return module


suite = _conftest()

every_case = pytest.mark.parametrize(
    ("method", "host", "dtype", "scaling", "dora"), suite.CASES, ids=lambda v: {True: "dora", False: "plain"}.get(v, v)
)
each_host = pytest.mark.parametrize(
    ("method", "host"), [(method, host) for method in suite.METHODS for host in suite.hosts_of(method)]
)
split_hosts = pytest.mark.parametrize(
    ("method", "host"),
    [(m, host) for m in suite.METHODS for host in suite.hosts_of(m) if available_methods()[m].effect == "splits"],
)
unquantised_hosts = pytest.mark.parametrize(
    ("method", "host"),
    [(m, host) for m in suite.METHODS for host in suite.hosts_of(m) if available_methods()[m].effect != "quantises"],
)
each_method = pytest.mark.parametrize("method", suite.METHODS)


def expected(case: object, model: torch.nn.Module) -> torch.Tensor:
    """Outputs that the method promises: the base's, or those of the base with ``s·B A`` added where it shifts."""
    if case.effect == "shifts":
        shifted = suite.make_model(case.host, "fp32")
        shifted.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
        with torch.no_grad():
            for name, pair in case.artefact.factors.items():
                delta = pair.delta(case.artefact.plan.scaling(name))
                weight = shifted.get_submodule(name).weight
                flat = delta.mT if case.host in ("conv1d", "embedding") else delta
                weight += flat.reshape(weight.shape)
        return suite.outputs(shifted, case.host)
    return suite.outputs(model, case.host)


@every_case
def test_the_function_is_what_the_method_promises(method, host, dtype, scaling, dora):
    case = suite.case(method, host, dtype, scaling, dora)
    base = suite.make_model(host, dtype)
    wanted = expected(case, base)
    model = case.artefact.apply(case.wrapped(base), base="residual")
    off = suite.distance(suite.outputs(model, host), wanted)
    if case.effect == "quantises":
        bare = suite.make_model(host, dtype)
        with torch.no_grad():
            for name, pair in case.artefact.factors.items():
                weight = bare.get_submodule(name).weight
                flat = pair.base.mT if host in ("conv1d", "embedding") else pair.base
                weight.copy_(flat.reshape(weight.shape))
        assert off < suite.distance(suite.outputs(bare, host), wanted), "the factors do not correct the quantisation"
    else:
        # Two roundings of bf16 lie between: the residual's, and DoRA's own norm.
        assert off < case.tolerance * (3 if case.effect == "shifts" and dtype == "bf16" else 1)


@unquantised_hosts
def test_offset_leaves_the_base_bitwise_and_keeps_the_function(method, host):
    case = suite.case(method, host)
    base = suite.make_model(host)
    wanted, before = expected(case, base), {k: v.clone() for k, v in base.state_dict().items()}
    model = case.artefact.apply(case.wrapped(base), base="offset")
    assert suite.distance(suite.outputs(model, host), wanted) < case.tolerance
    after = model.get_base_model().state_dict()
    for key, value in before.items():
        name, _, leaf = key.rpartition(".")
        assert torch.equal(after.get(key, after.get(f"{name}.base_layer.{leaf}")), value), key


@each_host
def test_the_model_is_left_bitwise_as_it_was(method, host):
    model = suite.make_model(host).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {k: (p.requires_grad, p.grad) for k, p in model.named_parameters()}
    suite.compute(model, suite.lora_config(method, host), host)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {k: (p.requires_grad, p.grad) for k, p in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@each_host
def test_two_runs_are_bitwise_equal(method, host):
    case = suite.case(method, host)
    torch.manual_seed(99)  # the global stream must not matter
    again = suite.compute(suite.make_model(host), case.config, host)
    assert again.recipe.digest == case.artefact.recipe.digest
    for name, pair in case.artefact.factors.items():
        assert torch.equal(pair.a, again.factors[name].a), name
        assert torch.equal(pair.b, again.factors[name].b), name


@each_host
def test_another_default_dtype_changes_nothing(method, host):
    case = suite.case(method, host)
    model = suite.make_model(host)
    torch.set_default_dtype(torch.float64)
    try:
        batches = [
            {k: v.float() if v.is_floating_point() else v for k, v in b.items()} for b in suite.make_batches(host)
        ]
        artefact = si.compute(model, case.config, batches, show_progress_bar=False, seed=suite.SEED)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, pair in case.artefact.factors.items():
        found = artefact.factors[name]
        assert (found.a.dtype, found.b.dtype) == (torch.float32, torch.float32), name
        assert found.a.shape == pair.a.shape


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@each_host
def test_saved_and_loaded_by_plain_peft_gives_the_same_logits(method, host, dora, tmp_path):
    peft = pytest.importorskip("peft")
    case = suite.case(method, host, dora=dora)
    if case.effect == "quantises":
        folder = case.artefact.save(tmp_path / "adapter")
        stored = si.Artefact.load(folder)
        assert all(torch.equal(stored.factors[n].base, pair.base) for n, pair in case.artefact.factors.items())
        return
    kind = "doubled" if case.effect == "splits" else "residual"
    folder = case.artefact.save(tmp_path / "adapter", base=kind)
    base = suite.make_model(host)
    wanted = expected(case, base)
    model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    assert suite.distance(suite.outputs(model, host), wanted) < case.tolerance


@split_hosts
def test_after_training_it_converts_to_plain_lora_on_the_unmodified_base(method, host, tmp_path):
    peft = pytest.importorskip("peft")
    case = suite.case(method, host)
    from smartinit.convert import convert_adapter

    start = case.artefact.save(tmp_path / "start")
    model = case.artefact.apply(case.wrapped(suite.make_model(host)), base="residual").train()
    train(model, host, steps=20)
    trained = suite.outputs(model.eval(), host)
    model.save_pretrained(tmp_path / "trained")
    convert_adapter(tmp_path / "trained", start, tmp_path / "plain")
    plain = peft.PeftModel.from_pretrained(suite.make_model(host), tmp_path / "plain").eval()
    assert suite.distance(suite.outputs(plain, host), trained) < 5e-5
    assert suite.distance(trained, suite.outputs(suite.make_model(host), host)) > 1e-3, "nothing was trained"


def train(model: torch.nn.Module, host: str, *, steps: int) -> None:
    """Real steps of AdamW on the adapter."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    batches = suite.make_batches(host, steps)
    for i, batch in enumerate(batches):
        loss = model(**batch).loss
        assert loss.isfinite(), i
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@each_method
def test_a_rank_above_the_smaller_side_is_refused(method):
    model = suite.make_model("linear")
    with pytest.raises(ConfigError, match=r"above min\(out, in\)"):
        suite.compute(model, suite.lora_config(method, "linear", r=33, lora_alpha=33), "linear")


@pytest.mark.parametrize(
    ("method", "host"),
    [(m, h) for m in suite.METHODS for h in suite.TARGETS if h not in available_methods()[m].hosts],
)
def test_where_the_mathematics_makes_no_sense_an_error_says_so(method, host):
    with pytest.raises(SmartinitError, match=r"convolution|embedding|linear"):
        suite.compute(suite.make_model(host), suite.lora_config(method, host), host)


@each_method
def test_every_method_says_where_it_is_from(method):
    kind = available_methods()[method]
    assert kind.summary
    assert kind.source
    assert kind.__doc__
