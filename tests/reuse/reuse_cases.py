"""A small model, data, and a look at what runs."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
import transformers

import smartinit as si

SEED = int(os.environ.get("SMARTINIT_TEST_SEED", "0"))
TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]


FORWARD: list[int] = []
"""One item for each forward pass of a `new_model`."""


def _count(*_: object) -> None:
    sys.modules["reuse_cases"].FORWARD.append(1)  # not by its name: globals of a hook count as part of the model


def new_model(seed: int = SEED) -> Any:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.2)).eval()
    model.model.layers[0].register_forward_pre_hook(_count)
    return model


def new_batches(count: int = 6, size: int = 4, length: int = 16, seed: int = SEED) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, 64, (count, size, length), generator=generator)
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch} for batch in ids]


def lora(method: str = "eva", rank: int = 4, **options: Any) -> si.LoraConfig:
    eva = options.pop("eva", {})
    if method == "eva":
        options["eva_config"] = si.EvaConfig(**eva)
    start: Any = {"kaiming": True, "random": False}.get(method, method)
    return si.LoraConfig(
        **{"r": rank, "lora_alpha": rank, "target_modules": TARGETS, "init_lora_weights": start} | options
    )


@pytest.fixture(scope="session")
def model() -> Any:
    return new_model()


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    return new_batches()


@pytest.fixture
def forward() -> list[int]:
    """`FORWARD`, empty."""
    FORWARD.clear()
    return FORWARD


def hit(artefact: si.Artefact) -> Any:
    return artefact.provenance["store"]["hit"]


def assert_equal(one: si.Artefact, two: si.Artefact) -> None:
    """Bit for bit."""
    assert dict(one.plan.ranks) == dict(two.plan.ranks)
    assert dict(one.plan.alphas) == dict(two.plan.alphas)
    assert one.factors.keys() == two.factors.keys()
    for name, pair in one.factors.items():
        other = two.factors[name]
        assert pair.effect == other.effect
        assert pair.trains == other.trains
        for part in ("a", "b", "base", "magnitude"):
            ours, theirs = getattr(pair, part), getattr(other, part)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)
