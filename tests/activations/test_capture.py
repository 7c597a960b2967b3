"""What reaches the layers is what counts; what is not needed does not run; the model is left as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from smartinit.activations.capture import Capture
from smartinit.config import LoraConfig
from smartinit.errors import ArgumentError, NonFiniteError
from smartinit.statistics.gram import GramStatistic
from smartinit.targets.select import select_targets


def capture_of(model, target_modules="all-linear", **options):
    targets = select_targets(model, LoraConfig(target_modules=target_modules), none_means="all")
    return Capture(model, targets, lambda t, device: GramStatistic(t.in_features, device=device), **options)


def ids(seed=0, shape=(3, 7), vocabulary=64):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, shape, generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class Calls:
    """Counts forward calls of some modules through hooks of its own."""

    def __init__(self, **modules):
        self.counts = dict.fromkeys(modules, 0)
        for name, module in modules.items():
            module.register_forward_hook(lambda *_a, name=name: self.counts.__setitem__(name, self.counts[name] + 1))


def by_leader(capture):
    return {tuple(name.rpartition(".")[2] for name in site.names) for site in capture.sites}


def test_targets_that_read_one_tensor_share_a_site(tiny_llama):
    model = tiny_llama()
    with capture_of(model) as capture:
        capture.run(ids())
        capture.run(ids(1))
    assert by_leader(capture) == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
    assert len(capture.sites) == 8
    assert {site.statistic.rows for site in capture.sites} == {42}


def test_rows_are_those_that_reach_the_layer(tiny_llama):
    model = tiny_llama()
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].detach().clone())
    )
    with capture_of(model, ["down_proj"]) as capture:
        capture.run(ids())
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    site = capture.sites[1]
    assert torch.allclose(site.statistic.mean, rows.double().mean(0), atol=1e-6)
    centred = (rows - rows.mean(0)).double()
    assert torch.allclose(site.statistic.matrix(), centred.T @ centred, atol=1e-5)


def test_equal_values_in_different_tensors_are_different_sites():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x) + self.b(x.clone())
            x = x * 1.0
            x.add_(1)  # same memory, other values: not the tensor that `a` saw
            return y + self.c(x)

    model = Twins()
    with capture_of(
        model, forward_fn=lambda m, b: m(b["x"]), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None
    ) as capture:
        capture.run({"x": torch.randn(5, 4)})
    assert [site.names for site in capture.sites] == [["a"], ["b"], ["c"]]


def test_changed_in_place_between_two_layers_is_not_shared():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            x.mul_(2)
            return y + self.b(x)

    with capture_of(
        InPlace(), forward_fn=lambda m, b: m(b["x"]), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None
    ) as capture:
        capture.run({"x": torch.randn(5, 4)})
    assert len(capture.sites) == 2


def test_memory_that_is_handed_out_again_is_not_mistaken_for_a_shared_input():
    class Reuse(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(30))

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x) + 1)  # each input is freed before the next is allocated
            return x

    with capture_of(
        Reuse(), forward_fn=lambda m, b: m(b["x"]), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None
    ) as capture:
        for _ in range(3):
            capture.run({"x": torch.randn(8, 64)})
    assert len(capture.sites) == 30


def test_the_head_never_runs_and_no_cache_is_filled(tiny_llama):
    model = tiny_llama()
    calls = Calls(head=model.lm_head, trunk=model.model.norm)
    caches = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _m, _a, kwargs: caches.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    batch = ids() | {"labels": ids()["input_ids"]}
    with capture_of(model) as capture:
        for _ in range(3):
            capture.run(batch)
    assert calls.counts["head"] == 0
    assert caches == [None] * 3
    model(**batch)
    assert calls.counts["head"] == 1, "the hook that ends a pass is gone"


def test_the_pass_ends_after_the_last_open_site(tiny_llama):
    model = tiny_llama(num_hidden_layers=4)
    layers = model.model.layers
    calls = Calls(**{f"mlp{i}": layer.mlp.gate_proj for i, layer in enumerate(layers)})
    with capture_of(model) as capture:
        capture.run(ids())
        for site in capture.sites:
            site.open = site.names[0] == "model.layers.1.self_attn.q_proj"
        capture.run(ids(1))
        assert calls.counts == {"mlp0": 2, "mlp1": 1, "mlp2": 1, "mlp3": 1}
        rows = {site.names[0]: site.statistic.rows for site in capture.sites}
        assert rows["model.layers.1.self_attn.q_proj"] == 42
        assert rows["model.layers.0.self_attn.q_proj"] == 21, "a settled site stops paying"
        for site in capture.sites:
            site.open = True
        capture.run(ids(2))
    assert calls.counts["mlp3"] == 2, "opened again, it runs again"


def test_a_custom_forward_runs_to_its_end(tiny_llama):
    model = tiny_llama()
    calls = Calls(head=model.lm_head)
    with capture_of(model, forward_fn=lambda m, b: (m(**b), m(**b))) as capture:
        capture.run(ids())
        capture.run(ids())
    assert calls.counts["head"] == 4
    assert capture.sites[0].statistic.rows == 4 * 21


class Experts(nn.Module):
    """Routes each token to one expert; an expert without tokens does not run."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(8, 8), "w3": nn.Linear(8, 8)}) for _ in range(3))
        self.last = nn.Linear(8, 8)

    def forward(self, x, choice):
        self.gate(x.view(-1, 8))
        out = torch.zeros_like(x.view(-1, 8))
        for i, expert in enumerate(self.experts):
            mine = (choice == i).nonzero().squeeze(1)
            if mine.numel():
                tokens = x.view(-1, 8)[mine]
                out[mine] = expert["w1"](tokens) * expert["w3"](tokens)
        return self.last(out.view_as(x))


def test_experts_see_their_tokens_and_may_start_late():
    model = Experts()
    x = torch.randn(2, 6, 8)
    first = torch.tensor([0] * 8 + [1] * 4)
    second = torch.tensor([2] * 5 + [0] * 7)
    with capture_of(
        model,
        forward_fn=lambda m, b: m(b["x"], b["choice"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
    ) as capture:
        capture.run({"x": x, "choice": first})
        capture.run({"x": x + 1, "choice": second})
    rows = {tuple(site.names): site.statistic.rows for site in capture.sites}
    assert rows == {
        ("gate",): 24,
        ("experts.0.w1", "experts.0.w3"): 15,
        ("experts.1.w1", "experts.1.w3"): 4,
        ("experts.2.w1", "experts.2.w3"): 5,
        ("last",): 24,
    }


def test_a_target_that_stops_sharing_founds_its_own_site():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, apart):
            return self.a(x) + self.b(x * 2 if apart else x)

    with capture_of(
        Fickle(), forward_fn=lambda m, b: m(**b), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None
    ) as capture:
        capture.run({"x": torch.randn(5, 4), "apart": False})
        assert [site.names for site in capture.sites] == [["a", "b"]]
        capture.run({"x": torch.randn(5, 4), "apart": True})
    assert [(site.names, site.statistic.rows) for site in capture.sites] == [(["a"], 10), (["b"], 5)]


def test_a_module_that_runs_several_times_per_pass_counts_every_time():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(3):
                x = self.block(x)
            return x

    with capture_of(
        Shared(), forward_fn=lambda m, b: m(**b), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None
    ) as capture:
        capture.run({"x": torch.randn(5, 4)})
    assert capture.sites[0].statistic.rows == 15


class BoomError(RuntimeError):
    pass


def test_defect_18_everything_is_restored_after_an_exception(tiny_llama):
    model = tiny_llama()
    model.train()
    model.model.layers[0].mlp.eval()  # a mixture that model.train() would not bring back
    model.model.layers[1].eval()
    flags = {n: m.training for n, m in model.named_modules()}
    kept = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: None)
    before = {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def explode(model, batch):
        torch.rand(3), np.random.random(3), random.random()
        model(**batch)
        raise BoomError

    with pytest.raises(BoomError), capture_of(model, forward_fn=explode) as capture:
        capture.run(ids())
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert torch.is_grad_enabled()
    kept.remove()


def test_nothing_is_left_behind_when_entering_fails(tiny_llama):
    model = tiny_llama().train()
    capture = capture_of(model)

    class NoHooks(nn.Linear):
        def register_forward_pre_hook(self, *_args, **_kwargs):
            raise BoomError

    object.__setattr__(capture._targets[3], "module", NoHooks(2, 2))
    with pytest.raises(BoomError):
        capture.__enter__()
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_nan_names_layer_and_batch(tiny_llama):
    model = tiny_llama()
    bad = torch.full((1, 7, 32), float("nan"))
    with capture_of(model) as capture:
        capture.run(ids())
        handle = model.model.layers[1].input_layernorm.register_forward_hook(lambda *_: bad.expand(3, 7, 32))
        with pytest.raises(NonFiniteError, match=r"'model\.layers\.1\.self_attn\.q_proj' holds NaN or Inf in batch 1"):
            capture.run(ids())
        handle.remove()


def test_bad_batches_are_counted_skipped_and_leave_no_trace(tiny_llama):
    def rows_of(batches, **options):
        model = tiny_llama()
        embed = model.model.embed_tokens
        with torch.no_grad():
            embed.weight[63] = float("nan")
        with capture_of(model, skip_bad_batches=True, **options) as capture:
            used = [capture.run(batch) for batch in batches]
        return capture, used

    good = [ids(i, vocabulary=60) for i in range(3)]
    bad = ids(9, vocabulary=60)
    bad["input_ids"][1, 2] = 63
    clean, _ = rows_of(good)
    mixed, used = rows_of([bad, good[0], bad, good[1], good[2]])
    assert used == [False, True, False, True, True]
    assert mixed.bad_batches == [0, 2]
    for one, other in zip(clean.sites, mixed.sites, strict=True):
        assert one.names == other.names
        assert torch.equal(one.statistic.matrix(), other.statistic.matrix())


def test_custom_functions_share_only_when_they_agree(tiny_llama):
    names = []

    def first_token(layer_input, model_input, layer_name):
        names.append(layer_name)
        x = layer_input[0]
        return x[:, 0] * (2 if "k_proj" in layer_name else 1)

    with capture_of(tiny_llama(), prepare_layer_inputs_fn=first_token) as capture:
        capture.run(ids())
    assert by_leader(capture) >= {("q_proj", "v_proj"), ("k_proj",)}
    assert capture.sites[0].statistic.rows == 3
    assert "model.layers.0.self_attn.k_proj" in names


def test_defect_04_a_mapping_of_functions_is_only_read(tiny_llama):
    functions = {"model.layers.0.mlp.down_proj": lambda x, _m, _n: x[0][:, 0]}
    kept = dict(functions)
    with capture_of(tiny_llama(), prepare_layer_inputs_fn=functions) as capture:
        capture.run(ids())
    assert functions == kept
    rows = {site.names[0]: site.statistic.rows for site in capture.sites}
    assert rows["model.layers.0.mlp.down_proj"] == 3
    assert rows["model.layers.1.mlp.down_proj"] == 21
    with pytest.raises(ValueError, match="no target is called \\['nowhere'\\]"):
        capture_of(tiny_llama(), prepare_layer_inputs_fn={"nowhere": len})


@pytest.mark.parametrize("result", [torch.ones(3), [1, 2], None])
def test_a_custom_function_must_return_rows(tiny_llama, result):
    with (
        pytest.raises(ArgumentError, match="2-D tensor"),
        capture_of(tiny_llama(), prepare_layer_inputs_fn=lambda *_: result) as capture,
    ):
        capture.run(ids())


def test_padding_and_prompt_tokens_do_not_count(tiny_llama):
    batch = ids()
    batch["attention_mask"][0, 4:] = 0
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][1, :3] = -100
    with capture_of(tiny_llama()) as capture:
        capture.run(batch)
    assert {site.statistic.rows for site in capture.sites} == {21 - 3 - 3}
    assert capture.tokens == 15


def test_defect_28_layers_without_a_token_dimension(assets):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(assets / "all-minilm-l6-v2", dtype=torch.float32)
    batch = ids(vocabulary=30000)
    batch["attention_mask"][2] = 0
    with capture_of(model, ["dense"]) as capture:
        capture.run(batch)
    rows = {site.names[0]: site.statistic.rows for site in capture.sites}
    assert rows["pooler.dense"] == 2, "one row per sample that has a token"
    assert rows["encoder.layer.0.output.dense"] == 14


def test_skipping_a_bad_batch_also_undoes_what_it_did_to_the_sites():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, apart):
            return self.a(x) + self.b(x * float("nan") if apart else x)

    with capture_of(
        Fickle(),
        forward_fn=lambda m, b: m(**b),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        skip_bad_batches=True,
    ) as capture:
        for apart in (False, True, False):
            capture.run({"x": torch.randn(5, 4), "apart": apart})
    assert [(site.names, site.statistic.rows) for site in capture.sites] == [(["a", "b"], 10)]


def test_a_follower_that_deviates_in_a_shortened_pass_is_seen():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, apart=False):
            return self.a(x) + self.b(x * 2 if apart else x)

    with capture_of(Fickle(), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None) as capture:
        for apart in (False, False, True):
            capture.run({"x": torch.randn(5, 4), "apart": apart})
    assert [(site.names, site.statistic.rows) for site in capture.sites] == [(["a"], 15), (["b"], 5)]
