"""A bounded run over the data, forwards and backwards: losses, errors, ranks, and how much is ever held."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from smartinit.config import LoraConfig
from smartinit.errors import ArgumentError, ConfigError, DataError, NonFiniteError
from smartinit.gradients import collect_gradients
from smartinit.targets.select import select_targets
from smartinit.targets.weight import Target
from tests.oracles.gradient_splits import mean_gradients


def batches_of(count=3, shape=(3, 9), labels=True):
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(count):
        ids = torch.randint(3, 64, shape, generator=generator)
        out.append({"input_ids": ids, **({"labels": ids} if labels else {})})
    return out


def run(model, batches, rank=4, targets="all-linear", **options):
    found = select_targets(model, LoraConfig(target_modules=targets))
    options.setdefault("show_progress_bar", False)
    return collect_gradients(model, found, batches, {t.name: rank for t in found}, **options)


def own_loss(model, batch):
    return model(**batch).loss


def assert_leading(sketch, gradient, k=4, tolerance=1e-3):
    """The directions hold the energy of the best ones, within ``tolerance``."""
    found = sketch.triplets(k)
    best = float(torch.linalg.svdvals(gradient)[:k].square().sum())
    assert float((found.u.double().T @ gradient).square().sum()) >= (1 - tolerance) * best
    assert float((gradient @ found.v.double().T).square().sum()) >= (1 - tolerance) * best


def test_the_directions_are_those_of_the_mean_gradient(tiny_llama):
    model = tiny_llama(hidden_size=128, intermediate_size=160, num_key_value_heads=4)
    batches = batches_of()
    expected = mean_gradients(model, batches, own_loss)
    result = run(model, batches, passes=4)
    assert 2 <= result.passes <= 4
    assert (result.batches, result.tokens) == (3, 81)
    assert result.seconds > 0
    assert not result.idle
    assert not any(sketch.exact for sketch in result.sketches.values())
    for name, sketch in result.sketches.items():
        assert_leading(sketch, expected[f"{name}.weight"], tolerance=2e-3)


def test_a_second_pass_finds_more(tiny_llama):
    model = tiny_llama(hidden_size=128, intermediate_size=160, num_key_value_heads=4)
    batches = batches_of()
    expected = mean_gradients(model, batches, own_loss)

    def lost(passes):
        out = 0.0
        for name, sketch in run(model, batches, passes=passes).sketches.items():
            gradient = expected[f"{name}.weight"]
            best = float(torch.linalg.svdvals(gradient)[:4].square().sum())
            out = max(out, 1 - float((gradient @ sketch.triplets(4).v.double().T).square().sum()) / best)
        return out

    assert lost(2) < lost(1) / 2


def test_the_passes_end_when_nothing_moves_any_more(tiny_llama):
    model = tiny_llama(hidden_size=128, intermediate_size=160, num_key_value_heads=4)
    batches = batches_of(1, shape=(1, 6))  # gradients of rank 6, which the first pass knows
    result = run(model, batches, passes=9)
    assert result.passes == 2
    expected = mean_gradients(model, batches, own_loss)
    for name, sketch in result.sketches.items():
        assert sketch.triplets(6).certificate.residual < 1e-3
        assert_leading(sketch, expected[f"{name}.weight"], k=5, tolerance=1e-6)


def test_a_generator_gets_one_pass(tiny_llama):
    model = tiny_llama(hidden_size=128, intermediate_size=160, num_key_value_heads=4)
    result = run(model, (batch for batch in batches_of()))
    assert (result.passes, result.batches) == (1, 3)
    assert result.sketches["model.layers.0.self_attn.q_proj"].triplets(4).certificate.residual is None


def test_small_models_are_exact_in_one_pass(tiny_llama):
    model = tiny_llama()
    expected = mean_gradients(model, batches_of(), own_loss)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    result = run(model, batches_of())
    assert len(forwards) == 3
    for name, sketch in result.sketches.items():
        true = expected[f"{name}.weight"]
        found = sketch.triplets(4)
        u, s, v = torch.linalg.svd(true, full_matrices=False)
        best = (u[:, :4] * s[:4]) @ v[:4]
        assert torch.linalg.norm((found.u.double() * found.s) @ found.v.double() - best) <= 1e-5 * torch.linalg.norm(
            best
        )


def test_max_batches_bounds_every_pass(tiny_llama):
    model = tiny_llama(hidden_size=128, intermediate_size=160, num_key_value_heads=4)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    assert run(model, batches_of(5), max_batches=2, passes=2).batches == 2
    assert len(forwards) == 4


def test_labels_of_a_causal_model_are_its_tokens_without_the_padding(tiny_llama):
    model = tiny_llama()
    plain = batches_of(2, labels=False)
    for batch in plain:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, 6:] = 0
    labelled = [{**b, "labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in plain]
    kept = [dict(b) for b in plain]
    ours = run(model, plain)
    theirs = run(model, labelled)
    assert ours.tokens == 36
    for name, sketch in theirs.sketches.items():
        assert torch.equal(ours.sketches[name].state()["sums.0"], sketch.state()["sums.0"])
    assert all(
        b.keys() == k.keys() and torch.equal(b["input_ids"], k["input_ids"]) for b, k in zip(plain, kept, strict=True)
    )


def test_a_loss_function_of_the_caller(tiny_llama):
    model = tiny_llama()

    def loss_fn(output, batch):
        return nn.functional.cross_entropy(output.logits[:, -1], batch["input_ids"][:, 0])

    batches = batches_of(2)
    expected = mean_gradients(model, batches, lambda m, b: loss_fn(m(**b), b))
    result = run(model, batches, loss_fn=loss_fn)
    for name, sketch in result.sketches.items():
        assert float(sketch.triplets(1).s[0]) == pytest.approx(
            float(torch.linalg.svdvals(expected[f"{name}.weight"])[0]), rel=1e-4
        )


def plain_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def run_plain(batches, model=None, names=("0", "2"), **options):
    model = plain_model() if model is None else model
    targets = [Target.of(model.get_submodule(name), name) for name in names]
    options.setdefault("forward_fn", lambda m, b: m(b))
    options.setdefault("loss_fn", lambda output, _batch: output.square().mean())
    options.setdefault("show_progress_bar", False)
    return collect_gradients(model, targets, batches, dict.fromkeys(names, 2), **options)


def test_any_module_with_any_forward_function():
    result = run_plain([torch.ones(4, 6)])
    assert set(result.sketches) == {"0", "2"}
    assert result.tokens == 0
    assert set(run_plain([torch.ones(4, 6)], forward_fn=lambda m, b: m(b).sum(), loss_fn=None).sketches) == {"0", "2"}
    result = run_plain([torch.ones(4, 6)], forward_fn=lambda m, b: {"loss": m(b).sum()}, loss_fn=None)
    assert set(result.sketches) == {"0", "2"}


def test_what_gets_no_gradient_is_idle_and_named():
    model = plain_model()
    model.other = nn.Linear(3, 3)
    model.dead = nn.Linear(6, 3)
    names = ("0", "2", "other", "dead")
    with pytest.warns(UserWarning, match=r"2 of 4 layers got no gradient from 1 batches \(the first: 'other'\)"):
        result = run_plain(
            [torch.ones(4, 6)], model, names, forward_fn=lambda m, b: m[2](m[1](m[0](b))) + 0 * m.dead(b)
        )
    assert result.idle == ("other", "dead")
    assert set(result.sketches) == {"0", "2"}


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, DataError, "the dataloader is empty"),
        (iter([]), {}, DataError, "gave no batch to compute gradients from"),
        ([torch.ones(4, 6)], {"passes": 0}, ConfigError, "passes=0"),
        ([torch.full((4, 6), float("nan"))], {}, DataError, "the loss of batch 0 is nan"),
        ([torch.full((4, 6), float("nan"))], {"skip_bad_batches": True}, DataError, "all 1 batches have NaN"),
        ([torch.ones(4, 6)], {"loss_fn": None}, ArgumentError, "must be a scalar tensor|holds no loss"),
        (
            [torch.ones(4, 6)],
            {"loss_fn": lambda output, _batch: (output * 0).sum()},
            DataError,
            "gradients of all 2 target layers are zero in all 1 batches",
        ),
        ([torch.ones(4, 6)], {"loss_fn": lambda _output, batch: batch.sum()}, DataError, "depends on none of the 2"),
        ([[1.0]], {"forward_fn": None, "loss_fn": None}, ArgumentError, "a batch must be a mapping"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(batches, options, error, message):
    from smartinit.activations.rows import forward_fn_dict

    if "forward_fn" in options:
        options = {**options, "forward_fn": forward_fn_dict}
    if options.get("loss_fn", 1) is None and error is ArgumentError and isinstance(batches[0], torch.Tensor):
        error = DataError
    with pytest.raises(error, match=message):
        run_plain(batches, **options)


def test_a_model_without_a_loss_is_told_what_to_do(tiny_llama):
    trunk = tiny_llama().model
    targets = select_targets(trunk, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(DataError, match=r"holds no loss; put 'labels' into the batches, or pass loss_fn"):
        collect_gradients(
            trunk, targets, batches_of(1, labels=False), {t.name: 2 for t in targets}, show_progress_bar=False
        )


def test_masked_labels_are_named(tiny_llama):
    batches = batches_of(2)
    batches[1]["labels"] = torch.full_like(batches[1]["labels"], -100)
    with pytest.raises(DataError, match=r"the loss of batch 1 is nan .* all masked"):
        run(tiny_llama(), batches)
    result = run(tiny_llama(), batches, skip_bad_batches=True)
    assert (result.batches, result.bad_batches) == (1, [1])


def test_bad_weights_are_named_by_layer(tiny_llama):
    model = tiny_llama()

    def loss_fn(output, batch):
        output.logits.register_hook(lambda gradient: gradient * float("inf"))
        return output.loss

    with pytest.raises(NonFiniteError, match=r"layer 'model.layers.1.mlp.down_proj' holds NaN or Inf in batch 0"):
        run(model, batches_of(1), loss_fn=loss_fn)


def test_the_second_pass_must_have_data(tiny_llama):
    class Once:
        def __init__(self):
            self.data = batches_of(2)

        def __iter__(self):
            data, self.data = self.data, []
            return iter(data)

    with pytest.raises(DataError, match=r"gave no batch in pass 2; .* or passes=1"):
        run(tiny_llama(hidden_size=128, intermediate_size=160, num_key_value_heads=4), Once())


def test_the_same_seed_gives_the_same_sketch(tiny_llama):
    model = tiny_llama(hidden_size=128, intermediate_size=160, num_key_value_heads=4)
    first, again = run(model, batches_of(), seed=3), run(model, batches_of(), seed=3)
    other = run(model, batches_of(), seed=4)
    for name, sketch in first.sketches.items():
        for key, tensor in sketch.state().items():
            assert torch.equal(again.sketches[name].state()[key], tensor)
        assert not torch.equal(other.sketches[name].state()["sums.0"], sketch.state()["sums.0"])


class Shapes(TorchDispatchMode):
    """Shapes of all matrices that any operation makes, forwards and backwards, but for views of parameters."""

    def __init__(self, model):
        super().__init__()
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for thing in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(thing, torch.Tensor) and thing.untyped_storage().data_ptr() not in self.parameters:
                self.seen.add(tuple(thing.shape))
        return out


def test_the_gradient_of_a_large_layer_is_never_formed(tiny_llama):
    model = tiny_llama(hidden_size=256, intermediate_size=320)
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if "proj" in n}
    with Shapes(model) as formed:
        result = run(model, batches_of(2))
    assert not formed.seen & shapes
    held = sum(t.numel() for sketch in result.sketches.values() for t in sketch.state().values())
    assert held < 0.9 * sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    with Shapes(model) as formed:  # what autograd does when a weight requires its gradient
        own_loss(model, batches_of(1)[0]).backward()
    assert shapes <= formed.seen


def test_bfloat16(tiny_llama):
    batches = batches_of(2)
    expected = mean_gradients(tiny_llama(), batches, own_loss)
    result = run(tiny_llama(dtype=torch.bfloat16), batches)
    for name, sketch in result.sketches.items():
        assert_leading(sketch, expected[f"{name}.weight"], k=1, tolerance=2e-2)
        assert sketch.triplets(1).v.dtype == torch.float32
    result = run(tiny_llama(), batches, autocast=torch.bfloat16)
    for name, sketch in result.sketches.items():
        assert_leading(sketch, expected[f"{name}.weight"], k=1, tolerance=2e-2)


def test_an_encoder_decoder_and_a_classifier():
    from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=1,
            num_decoder_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )
    batch = {"input_ids": torch.full((2, 5), 7), "labels": torch.full((2, 3), 9)}
    assert len(run(t5, [batch], targets=["q", "wo"]).sketches) == 5
    bert = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=3,
        )
    )
    batch = {"input_ids": torch.full((2, 5), 7), "labels": torch.tensor([0, 2])}
    assert len(run(bert, [batch], targets=["query", "dense"]).sketches) == 5
