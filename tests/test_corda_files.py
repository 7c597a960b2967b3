"""CorDA's ``covariance_file`` and ``cache_file``: read back only for the same model, data and wishes."""

from __future__ import annotations

import os

import pytest
import torch
import transformers

import smartinit as si
from smartinit.errors import ArtefactError, ConfigError, VerificationError

SEED = int(os.environ.get("SMARTINIT_TEST_SEED", "0"))


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    return transformers.LlamaForCausalLM(config).eval()


def batches(seed: int = SEED) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (4, 4, 16), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": batch} for batch in ids]


def run(model, data, r=4, options=None, **files):
    config = si.LoraConfig(
        r=r, lora_alpha=r, target_modules=["q_proj", "v_proj"], init_lora_weights="corda",
        corda_config=si.CordaConfig(**{name: str(path) for name, path in files.items()}), init_options=options or {},
    )  # fmt: skip
    return si.compute(model, config, data, show_progress_bar=False)


def forwards(model):
    count = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: count.append(1))
    return count


@pytest.mark.parametrize("kind", ["covariance_file", "cache_file"])
def test_the_second_run_runs_no_model(model, tmp_path, kind):
    file = tmp_path / "sub" / "kept.safetensors"
    count = forwards(model)
    first = run(model, batches(), **{kind: file})
    assert len(count) == 4
    assert file.is_file()
    second = run(model, batches(), **{kind: file})
    assert len(count) == 4, "the model ran although everything was there"
    for name, pair in first.factors.items():
        assert torch.equal(pair.b @ pair.a, second.factors[name].b @ second.factors[name].a)


def test_second_moments_serve_other_ranks_and_options(model, tmp_path):
    file = tmp_path / "moments.safetensors"
    run(model, batches(), covariance_file=file)
    count = forwards(model)
    kept = run(model, batches(), r=8, options={"corda_method": "kpm"}, covariance_file=file)
    assert not count
    fresh = run(model, batches(), r=8, options={"corda_method": "kpm"})
    for name, pair in fresh.factors.items():
        product = pair.b @ pair.a
        assert (kept.factors[name].b @ kept.factors[name].a - product).norm() < 1e-4 * product.norm()


@pytest.mark.parametrize("kind", ["covariance_file", "cache_file"])
def test_other_data_or_weights_are_refused(model, tmp_path, kind):
    file = tmp_path / "kept.safetensors"
    run(model, batches(), **{kind: file})
    before = file.read_bytes()
    with pytest.raises(VerificationError, match="another model, other data"):
        run(model, batches(SEED + 1), **{kind: file})
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    with pytest.raises(VerificationError, match="another model, other data"):
        run(model, batches(), **{kind: file})
    assert file.read_bytes() == before


def test_pickles_and_single_use_data_are_refused(model, tmp_path):
    file = tmp_path / "kept.pt"
    torch.save({"q_proj": torch.eye(32)}, file)
    with pytest.raises(ArtefactError, match="pickled"):
        run(model, batches(), covariance_file=file)
    with pytest.raises(ConfigError, match="read twice"):
        run(model, iter(batches()), covariance_file=tmp_path / "new")
