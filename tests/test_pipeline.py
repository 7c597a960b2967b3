"""EVA end to end on real models: against a float64 PCA, against PEFT, and PEFT's defects one by one."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import smartinit as si
from smartinit.errors import ConfigError, DataError, NonFiniteError, TargetError
from smartinit.pipeline import compute

_SPEC = importlib.util.spec_from_file_location("pca_oracle", Path(__file__).parent / "oracles" / "pca.py")
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)

SETTINGS = dict(show_progress_bar=False)


def config(**options):
    options = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": "eva"} | options
    eva = options.pop("eva", {})
    return si.LoraConfig(**options, eva_config=si.EvaConfig(**eva))


def batches(count=6, size=4, length=16, vocabulary=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        ids = torch.randint(3, vocabulary, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


def rows_of(model, names, data):
    """Every unmasked row that reaches the named modules, through hooks of the test's own."""
    found = {name: [] for name in names}
    mask = None
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _m, a, n=n: found[n].append(a[0][mask].clone()))
        for n in names
    ]
    with torch.no_grad():
        for batch in data:
            mask = batch["attention_mask"].bool()
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.fixture(scope="module")
def real(assets):
    """A real language model and real text: Grimm's tales, characters as tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(assets / "babyllama-0.9m").eval()
    tokenizer = AutoTokenizer.from_pretrained(assets / "babyllama-0.9m")
    ids = torch.tensor(tokenizer((assets / "grimm" / "grimm.txt").read_text()[:26000])["input_ids"])[: 10 * 8 * 200]
    out = []
    for part in ids.view(-1, 8, 200):
        mask = torch.ones_like(part)
        mask[1, 150:] = 0
        out.append({"input_ids": part, "attention_mask": mask})
    return model, out


def test_captured_variance_is_within_half_a_percent_of_the_optimum_and_not_below_pefts(real):
    peft = pytest.importorskip("peft")
    model, data = real
    defaults = si.get_eva_state_dict(model, data, config(r=16, lora_alpha=16), **SETTINGS)
    ours = si.get_eva_state_dict(model, data, config(r=16, lora_alpha=16, eva={"tau": 1.0}), **SETTINGS)
    linear = peft.LoraConfig(
        r=16, init_lora_weights="eva", target_modules=r".*_proj", eva_config=peft.EvaConfig(tau=1.0)
    )
    theirs = peft.get_eva_state_dict(model, Stops(model, data), linear, show_progress_bar=False)
    rows = rows_of(model, list(ours), data)
    assert set(ours) == set(theirs)
    for name, basis in ours.items():
        matrix = oracle.scatter(rows[name])
        assert oracle.captured(matrix, defaults[name]) >= 0.995, name
        assert oracle.captured(matrix, basis) >= 0.999, name
        count = min(basis.shape[0], theirs[name].shape[0])
        assert oracle.captured(matrix, basis[:count]) >= oracle.captured(matrix, theirs[name][:count]) - 1e-4, name
    assert sum(len(b) for b in ours.values()) == sum(len(b) for b in theirs.values()) == 16 * len(ours)
    moved = sum(abs(len(ours[n]) - len(theirs[n])) for n in ours)
    assert moved <= 0.05 * 16 * len(ours), "the two redistribute alike"


class Stops:
    """Ends PEFT's endless loop: after the last batch all is declared converged."""

    def __init__(self, model, data):
        self.model, self.data = model, data

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        yield from self.data
        for module in self.model.modules():
            for hook in module._forward_hooks.values():
                if hasattr(hook, "converged"):
                    hook.converged = torch.ones_like(hook.converged)
        yield self.data[0]


def test_two_runs_are_bitwise_equal(tiny_llama, tmp_path):
    for run in ("a", "b"):
        artefact = compute(tiny_llama(), config(), batches(), **SETTINGS)
        artefact.save(tmp_path / run)
    first, second = ((tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("a", "b"))
    assert first == second
    assert compute(tiny_llama(), config(), batches(), **SETTINGS).plan.digest == artefact.plan.digest


def test_batch_size_and_order_do_not_matter(real):
    model, data = real
    whole = {key: torch.cat([batch[key] for batch in data]) for key in data[0]}
    options = config(r=8, lora_alpha=8, eva={"tau": 1.0})
    rows = None
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    for size, index in ((8, None), (20, None), (8, order)):
        again = {key: value if index is None else value[index] for key, value in whole.items()}
        loader = [{key: value[i : i + size] for key, value in again.items()} for i in range(0, 80, size)]
        state = si.get_eva_state_dict(model, loader, options, **SETTINGS)
        rows = rows or {n: oracle.scatter(r) for n, r in rows_of(model, list(state), data).items()}
        assert min(oracle.captured(rows[name], basis) for name, basis in state.items() if len(basis)) > 0.996


def test_redistribution_keeps_budget_and_scaling(tiny_llama):
    artefact = compute(tiny_llama(), config(lora_alpha=8, use_rslora=False), batches(), **SETTINGS)
    assert artefact.plan.total == 4 * 14
    assert len(set(artefact.plan.ranks.values())) > 1
    assert {round(artefact.plan.scaling(n), 12) for n, r in artefact.plan.ranks.items() if r} == {2.0}
    uniform = compute(tiny_llama(), config(), batches(), planner="uniform", **SETTINGS)
    assert set(uniform.plan.ranks.values()) == {4}
    multiples = compute(tiny_llama(), config(), batches(), rank_multiple_of=2, min_rank=2, max_rank=6, **SETTINGS)
    assert set(multiples.plan.ranks.values()) <= {2, 4, 6}
    assert multiples.plan.total <= 4 * 14
    small = compute(tiny_llama(), config(), batches(), params=1500, **SETTINGS)
    assert 1300 < sum(r * sum(small.layers[n].shape) for n, r in small.plan.ranks.items()) <= 1500


def test_rank_pattern_and_alpha_pattern_reach_the_plan(tiny_llama):
    pattern = {r"^model\.layers\.0\.mlp\.down_proj$": 8, "o_proj": 2}
    artefact = compute(
        tiny_llama(),
        config(rank_pattern=pattern, alpha_pattern={"o_proj": 16}, eva={"rho": 1.0}),
        batches(),
        **SETTINGS,
    )
    ranks = artefact.plan.ranks
    assert ranks["model.layers.0.mlp.down_proj"] == 8
    assert ranks["model.layers.1.mlp.down_proj"] == 4
    assert ranks["model.layers.1.self_attn.o_proj"] == 2
    assert ranks["model.layers.1.self_attn.k_proj"] == 4
    assert artefact.plan.scaling("model.layers.0.self_attn.o_proj") == 8.0


def test_rho_one_gives_the_same_rank_everywhere(tiny_llama):
    artefact = compute(tiny_llama(), config(eva={"rho": 1.0}), batches(), **SETTINGS)
    assert set(artefact.plan.ranks.values()) == {4}


def test_the_model_is_left_as_it_was(tiny_llama):
    model = tiny_llama().train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    compute(model, config(), batches(), **SETTINGS)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_certificates_say_what_was_found(real):
    model, data = real
    artefact = compute(model, config(r=8, lora_alpha=8), data, **SETTINGS)
    rows = rows_of(model, list(artefact.layers), data)
    for name, layer in artefact.layers.items():
        rank, certificate = artefact.plan.ranks[name], layer.certificate
        matrix = oracle.scatter(rows[name])
        q = artefact.factors[name].a.double().numpy().T
        assert certificate.components == rank
        assert certificate.captured == pytest.approx(np.trace(q.T @ matrix @ q) / np.trace(matrix), abs=0.01)
        assert 0 < certificate.captured_held_out <= 1
        assert certificate.split_half_angle >= 0


def test_gpt2_conv1d_layers(seed):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    ).eval()
    artefact = compute(model, config(target_modules=None, fan_in_fan_out=True), batches(), **SETTINGS)
    assert {n.rpartition(".")[2] for n in artefact.layers} == {"c_attn"}
    assert artefact.layers["transformer.h.0.attn.c_attn"].shape == (96, 32)
    state = si.get_eva_state_dict(
        model, batches(), config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), **SETTINGS
    )
    rows = rows_of(model, list(state), batches())
    assert min(oracle.captured(oracle.scatter(rows[n]), b) for n, b in state.items() if len(b)) > 0.999


def test_a_model_that_is_no_language_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [torch.randn(32, 8) for _ in range(4)]
    state = si.get_eva_state_dict(
        model,
        data,
        config(r=2, lora_alpha=2, target_modules=["0", "2"]),
        forward_fn=lambda m, x: m(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    assert {n: b.shape[1] for n, b in state.items()} == {"0": 8, "2": 16}


@pytest.mark.parametrize("target", ["q_proj", "all-linear"])
def test_keys_on_a_peft_model_carry_its_prefix(tiny_llama, target):
    peft = pytest.importorskip("peft")
    eva = peft.LoraConfig(
        r=4,
        target_modules="all-linear" if target == "all-linear" else [target],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(tiny_llama(), eva)
    on_peft = si.get_eva_state_dict(wrapped, batches(), **SETTINGS)
    plain = si.get_eva_state_dict(tiny_llama(), batches(), eva, **SETTINGS)
    assert list(on_peft) == [f"base_model.model.{name}" for name in plain]
    for name, basis in plain.items():
        assert torch.equal(on_peft[f"base_model.model.{name}"], basis)
    assert isinstance(si.initialize_lora_eva_weights(wrapped, batches(), **SETTINGS), peft.PeftModel)


def test_defect_01_whitening_is_applied_once_per_layer(tiny_llama):
    plain = si.get_eva_state_dict(tiny_llama(), batches(), config(eva={"rho": 1.0}), **SETTINGS)
    white = si.get_eva_state_dict(tiny_llama(), batches(), config(eva={"rho": 1.0, "whiten": True}), **SETTINGS)
    q, k, v = (white[f"model.layers.0.self_attn.{p}_proj"] for p in "qkv")
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    rows = rows_of(tiny_llama(), ["model.layers.0.self_attn.q_proj"], batches())
    sigma = np.sqrt(oracle.best_values(oracle.scatter(*rows.values()), 4))
    norms = torch.linalg.vector_norm(q, dim=1).numpy()
    np.testing.assert_allclose(norms, sigma**-0.5, rtol=1e-3)
    np.testing.assert_allclose(torch.linalg.vector_norm(plain["model.layers.0.self_attn.q_proj"], dim=1), 1, atol=1e-5)


def test_defect_02_the_state_dict_can_be_saved(tiny_llama, tmp_path):
    state = si.get_eva_state_dict(tiny_llama(), batches(), config(), **SETTINGS)
    save_file(state, tmp_path / "eva.safetensors")
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)


def test_defect_04_a_mapping_of_prepare_functions_stays_as_it_was(tiny_llama):
    functions = {"model.layers.0.self_attn.q_proj": lambda x, _b, _n: x[0].reshape(-1, 32)}
    kept = dict(functions)
    si.get_eva_state_dict(tiny_llama(), batches(), config(), prepare_layer_inputs_fn=functions, **SETTINGS)
    assert functions == kept
    with pytest.raises(ValueError, match="nowhere"):
        si.get_eva_state_dict(tiny_llama(), batches(), config(), prepare_layer_inputs_fn={"nowhere": len}, **SETTINGS)


def test_defect_16_all_linear_on_a_plain_model(tiny_llama):
    state = si.get_eva_state_dict(tiny_llama(), batches(), config(target_modules="all-linear"), **SETTINGS)
    assert len(state) == 14
    assert "lm_head" not in state


def test_defect_17_small_batches_end_and_count(tiny_llama):
    model, passes = tiny_llama(), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    tiny = batches(count=20, size=1, length=6)  # three unmasked tokens, below every number of components
    state = si.get_eva_state_dict(model, tiny, config(r=8, lora_alpha=8), **SETTINGS)
    assert len(passes) == 20
    assert sum(len(b) for b in state.values()) == 8 * 14
    rows = rows_of(tiny_llama(), list(state), tiny)
    assert min(oracle.captured(oracle.scatter(rows[n]), b) for n, b in state.items() if len(b)) > 0.99


def test_the_loop_ends_with_the_data_or_max_batches_or_when_all_has_settled(tiny_llama):
    def endless():
        while True:
            yield from batches(count=8, size=16, length=64)

    model = tiny_llama()
    assert compute(model, config(), endless(), max_batches=5, **SETTINGS).provenance["batches"] == 5
    settled = compute(model, config(eva={"tau": 0.2}), endless(), **SETTINGS)
    assert settled.provenance["sites_settled"] == 8
    assert all(layer.certificate.settled for layer in settled.layers.values())
    never = compute(model, config(eva={"tau": 1.0}), batches(count=8, size=16, length=64), **SETTINGS)
    assert never.provenance["batches"] == 8
    assert not any(layer.certificate.settled for layer in never.layers.values()), "what has not converged is reported"


def test_defect_18_the_model_survives_an_exception(tiny_llama):
    model = tiny_llama().train()
    bad = [*batches(2), {"input_ids": torch.tensor([[999]]), "attention_mask": torch.ones(1, 1)}]
    with pytest.raises(IndexError):
        compute(model, config(), bad, **SETTINGS)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_defect_19_inputs_that_a_hash_confuses_stay_apart():
    assert hash((-1.0,)) == hash((-2.0,))

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(1, 4), nn.Linear(1, 4)

        def forward(self, x):
            return self.a(x) + self.b(x - 1)

    artefact = compute(
        Twins(),
        config(r=1, lora_alpha=1, target_modules=["a", "b"]),
        [torch.full((4, 1), -1.0) * torch.arange(1, 5).view(4, 1)],
        forward_fn=lambda m, x: m(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        **SETTINGS,
    )
    assert artefact.sites == (("a",), ("b",))


def test_defect_28_a_pooler_has_no_token_dimension(assets):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(assets / "all-minilm-l6-v2", dtype=torch.float32)
    state = si.get_eva_state_dict(
        model, batches(count=3, size=8, vocabulary=30000), config(target_modules=["dense"]), **SETTINGS
    )
    assert "pooler.dense" in state
    assert sum(len(b) for b in state.values()) == 4 * len(state)


class TestBadInput:
    def test_too_few_tokens(self, tiny_llama):
        with pytest.raises(
            DataError, match=r"too few tokens: layer '.*' saw 3, but 4 centred directions need at least 5"
        ):
            compute(tiny_llama(), config(), batches(count=1, size=1, length=6), **SETTINGS)

    def test_no_data(self, tiny_llama):
        with pytest.raises(ValueError, match="dataloader is empty"):
            compute(tiny_llama(), config(), [], **SETTINGS)
        with pytest.raises(ValueError, match="gave no batch"):
            compute(tiny_llama(), config(), iter([]), **SETTINGS)
        with pytest.raises(ConfigError, match="pass a dataloader"):
            compute(tiny_llama(), config(), **SETTINGS)

    def test_everything_masked(self, tiny_llama):
        masked = [b | {"labels": torch.full_like(b["input_ids"], -100)} for b in batches()]
        with pytest.raises(DataError, match="no token counts in any of 6 batches"):
            compute(tiny_llama(), config(), masked, **SETTINGS)

    def test_nan_activations(self, tiny_llama):
        model = tiny_llama()
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
        with pytest.raises(
            NonFiniteError, match=r"layer 'model\.layers\.1\.mlp\.gate_proj' holds NaN or Inf in batch 0"
        ):
            compute(model, config(), batches(), **SETTINGS)
        with pytest.raises(DataError, match="all 6 batches hold NaN"):
            compute(model, config(), batches(), skip_bad_batches=True, **SETTINGS)

    def test_options(self, tiny_llama):
        for options, text in (
            (dict(planner="magic"), "planner='magic'"),
            (dict(max_batches=0), "max_batches=0"),
            (dict(budget=0), "budget=0"),
        ):
            with pytest.raises(ConfigError, match=text):
                compute(tiny_llama(), config(), batches(), **options, **SETTINGS)
        for options, text in (
            (dict(captured=1.5), "captured=1.5"),
            (dict(method="corde"), "'corde' is not known; available: .*eva"),
        ):
            with pytest.raises(ConfigError, match=text):
                compute(tiny_llama(), config(), batches(), **options, **SETTINGS)
        odd = si.LoraConfig(target_modules="all-linear", init_lora_weights="eva", init_options={"whitten": True})
        with pytest.raises(ConfigError, match="'eva' has no option 'whitten'; its options are whiten; closest"):
            compute(tiny_llama(), odd, batches(), **SETTINGS)
        with pytest.raises(ConfigError, match="'eva' needs activations: pass a dataloader"):
            compute(tiny_llama(), config(), **SETTINGS)

    def test_targets(self, tiny_llama):
        with pytest.raises(TargetError, match="matched none of 15 linear layers; closest: 'q_proj'"):
            compute(tiny_llama(), config(target_modules=["q_prj"]), batches(), **SETTINGS)
        with pytest.raises(ConfigError, match=r"rank 64 .* above min\(out, in\)"):
            compute(tiny_llama(), config(r=64), batches(), **SETTINGS)


def test_experts_that_never_run_start_by_default_with_one_warning():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            return self.experts[0](x) + self.experts[1](x * 2) + self.experts[3](x[:2] * 3).mean(0)

    with pytest.warns(UserWarning, match="2 of 4 layers saw too few tokens") as seen:
        artefact = compute(
            Experts(),
            config(r=2, lora_alpha=2, target_modules=["0", "1", "2", "3"]),
            [torch.randn(20, 8)],
            forward_fn=lambda m, x: m(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            **SETTINGS,
        )
    assert len(seen) == 1
    assert set(artefact.factors) == {f"experts.{i}" for i in range(4)}
    assert artefact.plan.ranks["experts.2"] == 2
    default = artefact.factors["experts.2"]
    assert default.a.abs().max() <= 8**-0.5
    assert default.a.any()
    assert not default.b.any()


def test_artefact_is_a_peft_folder_that_changes_no_output(tiny_llama, tmp_path):
    peft = pytest.importorskip("peft")
    artefact = compute(
        tiny_llama(num_hidden_layers=4), config(r=2, lora_alpha=2, eva={"rho": 8.0}), batches(), budget=24, **SETTINGS
    )
    assert 0 in artefact.plan.ranks.values(), "the case has a layer without adapter"
    artefact.save(tmp_path / "adapter")
    base, inputs = tiny_llama(num_hidden_layers=4), batches(1)[0]
    expected = base(**inputs).logits
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert torch.equal(wrapped(**inputs).logits, expected)
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default"): module.weight.shape[0]
        for name, module in wrapped.named_modules()
        if name.endswith("lora_A.default")
    }
    assert ranks == {name: rank for name, rank in artefact.plan.ranks.items() if rank}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["init_lora_weights"] is True


class TestHosts:
    """What a model may be and how it may be run."""

    def test_autocast_does_not_reach_the_statistics(self, tiny_llama):
        model = tiny_llama(hidden_size=256, num_attention_heads=4)
        data = batches(count=8, size=8, length=40)

        def state(**options):
            return si.get_eva_state_dict(model, data, config(eva={"rho": 1.0}), **options, **SETTINGS)

        plain = state()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = state()
        assert inside.keys() == plain.keys()
        for name, basis in inside.items():
            assert torch.allclose(basis @ basis.mT, torch.eye(4), atol=1e-5), name

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_other_precisions(self, tiny_llama, dtype):
        model = tiny_llama(hidden_size=256, num_attention_heads=4, dtype=dtype)
        state = si.get_eva_state_dict(model, batches(count=8, size=8, length=40), config(), **SETTINGS)
        assert {t.dtype for t in state.values()} == {torch.float32}

    def test_another_default_dtype(self, tiny_llama):
        model = tiny_llama(hidden_size=256, num_attention_heads=4)
        torch.set_default_dtype(torch.float64)
        try:
            state = si.get_eva_state_dict(model, batches(count=8, size=8, length=40), config(), **SETTINGS)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {t.dtype for t in state.values()} == {torch.float32}

    def test_a_loader_of_a_stream(self, tiny_llama):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield from batches()

        loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
        assert compute(tiny_llama(), config(), loader, **SETTINGS).provenance["batches"] == 6

    def test_compiled_layers_are_seen(self, tiny_llama):
        model = tiny_llama()
        for layer in model.model.layers:
            layer.compile(backend="eager")
        with torch.no_grad():
            model(**batches(1)[0])
        plain = compute(tiny_llama(), config(), batches(), **SETTINGS)
        assert compute(model, config(), batches(), **SETTINGS).plan == plain.plan

    def test_a_frozen_adapter_stays_frozen_and_a_merged_one_is_refused(self, tiny_llama):
        peft = pytest.importorskip("peft")
        eva = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig()
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(tiny_llama(), eva)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.0" in name and "lora_A" in name)
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        si.get_eva_state_dict(model, batches(), **SETTINGS)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
        model.merge_adapter()
        weights = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match="is merged into its base layer; unmerge it first"):
            si.get_eva_state_dict(model, batches(), **SETTINGS)
        assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())

    def test_the_adapter_that_is_named_is_the_one(self, tiny_llama):
        peft = pytest.importorskip("peft")

        def eva(modules):
            return peft.LoraConfig(r=4, target_modules=modules, init_lora_weights="eva", eva_config=peft.EvaConfig())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(tiny_llama(), eva(["q_proj"]), adapter_name="a")
            model.add_adapter("b", eva(["v_proj", "up_proj"]))
        model.set_adapter("b")
        state = si.get_eva_state_dict(model, batches(), adapter_name="b", **SETTINGS)
        assert {name.rpartition(".")[2] for name in state} == {"v_proj", "up_proj"}
        si.initialize_lora_eva_weights(model, eva_state_dict=state, adapter_name="b")

    def test_encoder_and_decoder_count_their_own_tokens(self):
        transformers = pytest.importorskip("transformers")
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**shape, decoder_start_token_id=0, pad_token_id=0)
        ).eval()
        data = batches(count=2)
        for batch in data:  # as long as the inputs, so that the shape does not tell
            batch["labels"] = torch.where(torch.arange(16) < 10, batch["input_ids"], -100)
        artefact = compute(
            model, config(r=2, lora_alpha=2, target_modules=["q", "k", "v", "o", "wi", "wo"]), data, **SETTINGS
        )
        rows = {name: layer.certificate.rows for name, layer in artefact.layers.items()}
        encoder, decoder = 2 * (4 * 16 - 8), 2 * 4 * 10
        assert rows["encoder.block.0.layer.0.SelfAttention.q"] == encoder
        assert rows["decoder.block.0.layer.0.SelfAttention.q"] == decoder
        assert rows["decoder.block.0.layer.1.EncDecAttention.k"] == encoder
        assert rows["decoder.block.0.layer.1.EncDecAttention.q"] == decoder

    def test_a_constant_input_gets_no_rank(self):
        class Constant(nn.Module):
            def __init__(self):
                super().__init__()
                self.prompt = nn.Parameter(torch.randn(1, 512) * 7)
                self.a, self.b = nn.Linear(512, 64), nn.Linear(512, 64)

            def forward(self, x):
                return self.a(x) + self.b(self.prompt.expand(x.shape[0], -1) * 1)

        torch.manual_seed(0)
        for data in ([torch.randn(1500, 512) for _ in range(6)], [torch.randn(40, 512) for _ in range(3)]):
            artefact = compute(
                Constant(),
                config(r=8, lora_alpha=8, target_modules=["a", "b"]),
                data,
                forward_fn=lambda m, x: m(x),
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=None,
                **SETTINGS,
            )
            assert artefact.plan.ranks == {"a": 16, "b": 0}

    @pytest.mark.parametrize("options", [dict(rank_multiple_of=32), dict(params=10), dict(min_rank=4, budget=20)])
    def test_bounds_that_cannot_be_kept_are_refused_before_any_pass(self, tiny_llama, options):
        model = tiny_llama()
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
        with pytest.raises(ConfigError, match=r"no layer would get any rank|above the budget"):
            compute(model, config(), batches(), **options, **SETTINGS)
