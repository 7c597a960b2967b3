"""Gradients of weights read off the backward pass are autograd's own, and the model is left as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from smartinit.activations.backward import BackwardCapture
from smartinit.config import LoraConfig
from smartinit.errors import ArgumentError, DataError, NonFiniteError
from smartinit.statistics.gradient import GradientSketch
from smartinit.targets.select import select_targets
from smartinit.targets.weight import Target
from tests.oracles.gradient_splits import mean_gradients


def targets_of(model, names):
    return [Target.of(model.get_submodule(name), name) for name in names]


def sketches_of(targets):
    # As many components as a layer has make the sketch exact.
    return {t.name: GradientSketch(*t.shape, min(t.shape)) for t in targets}


def capture_of(model, targets, loss=None, **options):
    return BackwardCapture(model, targets, sketches_of(targets), loss=loss or squares, **options)


def squares(model, batch):
    return model(batch["x"]).square().sum()


def language_loss(model, batch):
    return model(**batch, labels=batch["input_ids"]).loss


def gradient(sketch):
    """The mean gradient that a sketch holds, ``(out, in)``."""
    found = sketch.triplets(min(sketch.shape))
    return (found.u.double() * found.s) @ found.v.double()


def ids(seed=0, shape=(3, 7)):
    return {"input_ids": torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))}


def assert_close(sketch, expected, tolerance=1e-5):
    error = torch.linalg.norm(gradient(sketch) - expected) / torch.linalg.norm(expected)
    assert error <= tolerance, float(error)


class Blocks(nn.Module):
    """Three layers with whatever may happen around them."""

    def __init__(self, kind="plain", layer=nn.Linear):
        super().__init__()
        self.kind = kind
        make = (lambda a, b: Conv1D(b, a)) if layer is Conv1D else nn.Linear
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.a, self.b, self.c = make(6, 10), make(10, 10), make(10, 4)
            self.unused = make(6, 6)

    def block(self, x):
        y = self.a(x)
        if "in place" in self.kind:
            y += 1
            y = y * 1.5
            y *= 2
        y = self.b(y)
        if "in place" in self.kind:
            y.mul_(3)
        if "twice" in self.kind:
            y = self.b(torch.tanh(y))
        return self.c(torch.tanh(y))

    def forward(self, x):
        if "checkpoint" in self.kind:
            return checkpoint(self.block, x, use_reentrant="reentrant" in self.kind)
        return self.block(x)


@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
@pytest.mark.parametrize(
    "kind",
    ["plain", "in place", "twice", "checkpoint", "checkpoint in place", "reentrant checkpoint", "twice in place"],
)
def test_what_passes_by_is_the_gradient(seed, kind, layer):
    model = Blocks(kind, layer)
    generator = torch.Generator().manual_seed(seed)
    batches = [{"x": torch.randn(2, 3, 6, generator=generator, requires_grad=True)} for _ in range(2)]
    expected = mean_gradients(model, [{"x": b["x"].detach().double().requires_grad_()} for b in batches], squares)
    targets = targets_of(model, "abc")
    with capture_of(model, targets) as capture:
        for batch in batches:
            assert capture.run(batch)
    for name in "abc":
        true = expected[f"{name}.weight"]
        assert_close(capture.sketches[name], true.T if layer is Conv1D else true)
    assert all(p.grad is None for p in model.parameters())


def test_a_frozen_model_without_inputs_that_require_gradients(tiny_llama):
    model = tiny_llama().requires_grad_(False)
    expected = mean_gradients(model, [ids(), ids(1)], language_loss)
    targets = select_targets(model, LoraConfig(target_modules="all-linear"))
    with capture_of(model, targets, language_loss) as capture:
        capture.run(ids())
        capture.run(ids(1))
    for target in targets:
        assert_close(capture.sketches[target.name], expected[f"{target.name}.weight"])
    assert {t.name for t in targets} == capture.ran
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # transformers 5 renamed it
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_kept(tiny_llama, reentrant):
    model = tiny_llama()
    targets = select_targets(model, LoraConfig(target_modules="all-linear"))
    expected = mean_gradients(model, [ids()], language_loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    handle = model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    with capture_of(model, targets, language_loss) as capture:
        capture.run(ids())
    handle.remove()
    assert len(calls) == 2, "it ran once more in the backward pass"
    for target in targets:
        assert_close(capture.sketches[target.name], expected[f"{target.name}.weight"])
    assert not model.model.layers[0].training


def test_modules_that_share_a_weight_get_the_gradient_of_their_own_use(seed):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model = Tied()
    batch = {"x": torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))}
    total = mean_gradients(model, [{"x": batch["x"].double()}], squares)["a.weight"]
    with capture_of(model, targets_of(model, "ab")) as capture:
        capture.run(batch)
    a, b = (gradient(capture.sketches[name]) for name in "ab")
    assert torch.linalg.norm(a + b - total) <= 1e-5 * torch.linalg.norm(total)
    assert torch.linalg.norm(a) > 1e-3 * torch.linalg.norm(total) < torch.linalg.norm(b) * 1e3


@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [
        (nn.Conv2d, (9, 8), {}),
        (nn.Conv2d, (9, 8), {"stride": 2, "padding": 1}),
        (nn.Conv2d, (9, 8), {"padding": "same", "dilation": 2}),
        (nn.Conv2d, (9, 8), {"padding": (2, 1), "padding_mode": "circular", "kernel_size": (3, 2)}),
        (nn.Conv1d, (9,), {"stride": 2, "dilation": 2, "padding": 1}),
        (nn.Conv3d, (4, 5, 6), {"kernel_size": (2, 3, 1), "stride": (1, 2, 3), "padding": (1, 0, 2)}),
    ],
)
def test_a_convolution_is_a_product_with_its_patches(seed, kind, size, options):
    model = nn.Sequential(kind(3, 5, **{"kernel_size": 3, **options}), nn.Tanh())
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    expected = mean_gradients(model, [{"x": x.double()}], squares)["0.weight"]
    with capture_of(model, targets_of(model, "0")) as capture:
        capture.run({"x": x})
    assert_close(capture.sketches["0"], expected.flatten(1))


def test_an_embedding_is_a_product_with_one_hot_rows(seed):
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=2), nn.Tanh())
    x = torch.tensor([[1, 2, 5, 5], [8, 2, 0, 1]])
    expected = mean_gradients(model, [{"x": x}], squares)["0.weight"]
    with capture_of(model, targets_of(model, "0")) as capture:
        capture.run({"x": x})
    assert_close(capture.sketches["0"], expected.T)


def test_a_layer_that_never_runs_sees_nothing():
    model = Blocks()
    with capture_of(model, targets_of(model, ["a", "unused"])) as capture:
        capture.run({"x": torch.ones(2, 6)})
    assert capture.ran == {"a"}
    assert capture.sketches["unused"].rows == 0
    assert capture.sketches["a"].rows == 2


def test_a_changed_input_is_noticed():
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x * 1
            y = self.b(self.a(x))
            x.zero_()  # what `a` read is gone when its gradient comes
            return y + x

    model = Changed()
    with capture_of(model, targets_of(model, "ab")) as capture, pytest.raises(RuntimeError, match="inplace operation"):
        capture.run({"x": torch.ones(2, 4)})


class Everything:
    """All that a capture could leave behind."""

    def __init__(self, model):
        self.model = model
        self.training = {name: m.training for name, m in model.named_modules()}
        self.hooks = {n: (len(m._forward_hooks), len(m._backward_hooks)) for n, m in model.named_modules()}
        self.trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        self.grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.attributes = {name: set(vars(m)) for name, m in model.named_modules()}
        self.random = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
        self.modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())

    def assert_unchanged(self):
        now = Everything(self.model)
        assert (now.training, now.hooks, now.trainable) == (self.training, self.hooks, self.trainable)
        assert now.attributes == self.attributes
        assert now.modes == self.modes
        for name, value in self.values.items():
            assert torch.equal(value, now.values[name])
            before, after = self.grads[name], now.grads[name]
            assert (before is None) == (after is None), name
            assert before is None or torch.equal(before, after)
        assert now.random[0] == self.random[0]
        assert (now.random[1] == self.random[1]).all()
        assert torch.equal(now.random[2], self.random[2])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tiny_llama, fails):
    model = tiny_llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    language_loss(model, ids()).backward()  # gradients of someone else's training step
    before = Everything(model)

    def loss(model, batch):
        torch.rand(3), random.random(), np.random.rand()
        if fails and "stop" in batch:
            raise KeyError("stop")
        return language_loss(model, batch)

    targets = select_targets(model, LoraConfig(target_modules="all-linear"))
    with torch.no_grad():
        before.modes = (False, False)
        try:
            with capture_of(model, targets, loss) as capture:
                capture.run(ids())
                if fails:
                    capture.run({"stop": True})
        except KeyError:
            assert fails
        before.assert_unchanged()


def test_in_inference_mode(tiny_llama):
    model = tiny_llama()
    targets = select_targets(model, LoraConfig(target_modules=["q_proj"]))
    capture = capture_of(model, targets, language_loss)
    with torch.inference_mode(), capture:
        capture.run({"input_ids": ids()["input_ids"].clone()})
    assert gradient(capture.sketches[targets[0].name]).any()


def test_adapters_are_switched_off(tiny_llama):
    peft = pytest.importorskip("peft")
    base = tiny_llama()
    expected = mean_gradients(base, [ids()], language_loss)
    model = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, r=4)
    )
    before = Everything(model)
    targets = select_targets(model, None, adapter_name="default")
    with capture_of(model, targets, language_loss) as capture:
        capture.run(ids())
    for target in targets:
        assert_close(capture.sketches[target.name], expected[f"{target.name}.weight"])
    before.assert_unchanged()


def test_dropout_is_no_noise():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).train()
    batch = {"x": torch.ones(3, 4)}
    with capture_of(model, targets_of(model, "02")) as capture:
        capture.run(batch)
    expected = mean_gradients(model, [{"x": batch["x"].double()}], squares)
    assert_close(capture.sketches["0"], expected["0.weight"])


class Poisoned(nn.Module):
    """``middle``'s gradient is NaN for some batches, though the loss is finite."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.middle(self.first(x))
        if x[0, 0] == 7:
            y = y + (y * 0).abs().sqrt()  # the root's slope at 0 is infinite
        return self.last(y)


def test_a_bad_gradient_is_named_with_layer_and_batch():
    model = Poisoned()
    good, bad = {"x": torch.ones(2, 4)}, {"x": torch.full((2, 4), 7.0)}
    with capture_of(model, targets_of(model, ["first", "middle", "last"])) as capture:
        capture.run(good)
        with pytest.raises(NonFiniteError, match=r"the gradient at layer 'middle' holds NaN or Inf in batch 1") as info:
            capture.run(bad)
    assert (info.value.layer, info.value.batch) == ("middle", 1)
    assert "skip_bad_batches=True" in str(info.value)


def test_a_bad_batch_is_skipped_without_a_trace():
    model = Poisoned()
    names = ["first", "middle", "last"]
    good, bad = {"x": torch.ones(2, 4)}, {"x": torch.full((2, 4), 7.0)}
    with capture_of(model, targets_of(model, names), skip_bad_batches=True) as capture:
        assert capture.run(good)
        assert not capture.run(bad)
        assert not capture.run({"x": torch.full((2, 4), float("nan"))})
        assert capture.run(good)
    assert capture.bad_batches == [1, 2]
    expected = mean_gradients(model, [{"x": good["x"].double()}], squares)
    for name in names:
        assert_close(capture.sketches[name], expected[f"{name}.weight"])
        assert capture.sketches[name].batches == 2


def test_a_bad_loss_is_named_with_its_batch():
    model = Blocks()
    with capture_of(model, targets_of(model, "a")) as capture:
        capture.run({"x": torch.ones(2, 6)})
        with pytest.raises(DataError, match=r"the loss of batch 1 is nan"):
            capture.run({"x": torch.full((2, 6), float("nan"))})


def test_a_loss_must_be_a_scalar_that_depends_on_the_targets():
    model = Blocks()
    with (
        capture_of(model, targets_of(model, "a"), lambda m, b: m(b["x"])) as capture,
        pytest.raises(ArgumentError, match=r"must be a scalar tensor, got shape \(2, 4\)"),
    ):
        capture.run({"x": torch.ones(2, 6)})
    with (
        capture_of(model, targets_of(model, "a"), lambda _m, _b: 1.0) as capture,
        pytest.raises(ArgumentError, match="got float"),
    ):
        capture.run({"x": torch.ones(2, 6)})
    with (
        capture_of(model, targets_of(model, ["unused"])) as capture,
        pytest.raises(DataError, match="depends on none of the 1 target layers"),
    ):
        capture.run({"x": torch.ones(2, 6)})


def test_bfloat16_and_autocast(tiny_llama):
    expected = mean_gradients(tiny_llama(), [ids()], language_loss)
    for model, options in (
        (tiny_llama(dtype=torch.bfloat16), {}),
        (tiny_llama(), {"autocast": torch.bfloat16}),
    ):
        targets = select_targets(model, LoraConfig(target_modules="all-linear"))
        with capture_of(model, targets, language_loss, **options) as capture:
            capture.run(ids())
        for target in targets:
            assert_close(capture.sketches[target.name], expected[f"{target.name}.weight"], 0.06)


def test_half_precision_gradients_are_scaled_out_of_underflow():
    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.a = nn.Linear(8, 8, bias=False).half()

        def forward(self, x):
            return self.a(x.half())

    model = Faint()
    batch = {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))}
    true = model.a(batch["x"].half()).double().T @ batch["x"].double() * 2e-8  # far below fp16's smallest number
    with capture_of(model, targets_of(model, "a"), lambda m, b: m(b["x"]).float().square().sum() * 1e-8) as capture:
        capture.run(batch)
    assert_close(capture.sketches["a"], true, 2e-3)
    # And gradients that overflow at the first scale are had at a smaller one, the batch counted once.
    with capture_of(model, targets_of(model, "a"), lambda m, b: m(b["x"]).float().square().sum() * 1e2) as capture:
        capture.run(batch)
    assert_close(capture.sketches["a"], true * 1e10, 2e-3)
    assert capture.sketches["a"].batches == 1
    assert capture.sketches["a"].rows == 4
