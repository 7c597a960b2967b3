"""One pass over the data serves every method that reads activations, at every rank."""

from __future__ import annotations

import os

import pytest
import torch
import transformers

import smartinit as si
from smartinit.errors import ConfigError

SEED = int(os.environ.get("SMARTINIT_TEST_SEED", "0"))
METHODS = ("eva", "corda", "output_pca", "lora_null")
RANKS = (4, 8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
        initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, 64, (6, 4, 32), generator=generator)
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids]


def config(method: str, rank: int) -> si.LoraConfig:
    return si.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=method
    )


class Passes:
    """How often the data was read and the model run."""

    def __init__(self, model: torch.nn.Module, batches: list) -> None:
        self.batches, self.read, self.forward = batches, 0, 0
        self.handle = model.model.layers[0].register_forward_pre_hook(self.seen)

    def seen(self, *_: object) -> None:
        self.forward += 1

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.read += 1
            yield batch


def test_a_sweep_runs_the_data_once(model, batches):
    data = Passes(model, batches)
    configs = [config(method, rank) for method in METHODS for rank in RANKS]
    try:
        artefacts = si.compute_many(model, configs, data, show_progress_bar=False)
    finally:
        data.handle.remove()
    assert (data.read, data.forward) == (len(batches), len(batches))
    assert [a.recipe.method for a in artefacts] == [m for m in METHODS for _ in RANKS]
    for artefact, wanted in zip(artefacts, configs, strict=True):
        assert sum(artefact.plan.ranks.values()) == 3 * wanted.r
        assert not artefact.verify()


@pytest.mark.parametrize("method", ["corda", "output_pca", "lora_null", "pissa", "pissa_niter_1", "gaussian"])
def test_an_artefact_of_a_sweep_is_that_of_a_run_of_its_own(model, batches, method):
    swept = si.compute_many(model, [config(method, rank) for rank in (4, 16)], batches, show_progress_bar=False)
    for artefact, rank in zip(swept, (4, 16), strict=True):
        alone = si.compute(model, config(method, rank), batches, show_progress_bar=False)
        assert artefact.recipe.digest == alone.recipe.digest
        for name, pair in alone.factors.items():
            ours, theirs = (p.b.double() @ p.a.double() for p in (artefact.factors[name], pair))
            if pair.b.count_nonzero():
                assert (ours - theirs).norm() < 1e-4 * theirs.norm(), name
            else:
                assert torch.equal(artefact.factors[name].a, pair.a), name


def test_eva_beside_second_moments_spans_the_exact_principal_directions(model, batches):
    eva, _ = si.compute_many(model, [config("eva", 8), config("corda", 8)], batches, show_progress_bar=False)
    inputs: list[torch.Tensor] = []
    layer = model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().reshape(-1, 128)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    rows = torch.cat(inputs).double()
    _, _, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    a = eva.factors["model.layers.0.self_attn.q_proj"].a.double()
    best = directions[: a.shape[0]]
    assert torch.linalg.matrix_norm(a.T @ a - best.T @ best) < 1e-3


def test_several_requests_need_data_that_can_be_read_twice_for_gradients(model, batches):
    with pytest.raises(ConfigError, match="can be iterated only once"):
        si.compute_many(model, [config("eva", 4), config("lora_ga", 4)], iter(batches), show_progress_bar=False)


def test_no_request_is_refused(model, batches):
    with pytest.raises(ConfigError, match="no requests"):
        si.compute_many(model, [], batches)


def test_one_pass_has_one_label_mask(model, batches):
    unmasked = config("eva", 4)
    unmasked.eva_config = si.EvaConfig(use_label_mask=False)
    with pytest.raises(ConfigError, match="mask labels differently"):
        si.compute_many(model, [config("corda", 4), unmasked], batches, show_progress_bar=False)
