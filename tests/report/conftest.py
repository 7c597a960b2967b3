"""Artefacts of many shapes: one computed on the embedded model, the others made by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import pytest
import torch

import smartinit as si
from smartinit.artefact import LayerSummary
from smartinit.planning.gain import Gain

if TYPE_CHECKING:
    from collections.abc import Sequence

    class Make(Protocol):
        """Makes an artefact of these sites; ranks are random unless given, shares follow a power law."""

        def __call__(
            self, sites: Sequence[Sequence[str]], *, r: int = ..., ranks: dict[str, int] | None = ...
        ) -> si.Artefact: ...


def llama(layers: int) -> list[tuple[str, ...]]:
    """Sites of a Llama."""
    return [
        tuple(f"model.layers.{i}.{module}" for module in site.split())
        for i in range(layers)
        for site in (
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj mlp.up_proj",
            "mlp.down_proj",
        )
    ]


def bert(layers: int) -> list[tuple[str, ...]]:
    """Sites of a BERT."""
    sites = [
        tuple(f"bert.encoder.layer.{i}.{module}" for module in site.split())
        for i in range(layers)
        for site in (
            "attention.self.query attention.self.key attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    ]
    return [*sites, ("bert.pooler.dense",)]


def experts(layers: int, count: int) -> list[tuple[str, ...]]:
    """Sites of a mixture of experts with a shared one."""
    sites = []
    for i in range(layers):
        for expert in (*(f"experts.{e}" for e in range(count)), "shared_expert"):
            mlp = f"model.layers.{i}.mlp.{expert}"
            sites += [(f"{mlp}.gate_proj", f"{mlp}.up_proj"), (f"{mlp}.down_proj",)]
    return sites


SITES: dict[str, list[tuple[str, ...]]] = {
    "large": [*llama(80), ("lm_head",)],
    "BERT": bert(12),
    "tiny": [("model.layers.0.fc1",)],
    "square": [(f"h.{i}.part{j}",) for i in range(6) for j in range(6)],
    "experts": experts(4, 16),
    "sparse": [site for i, site in enumerate(llama(32)) if i // 4 in {0, 1, 15, 30, 31}],
    "unnumbered": [(f"block{i}.conv{j}",) for i in range(10) for j in range(3)],
    "one row": [(f"h.{i}.query_key_value",) for i in range(12)],
    "wide": [*((f"h.{i}.query_key_value",) for i in range(121)), ("score",)],
}


@pytest.fixture(scope="session")
def make(seed: int) -> Make:
    """See `Make`; equal arguments give equal artefacts."""

    def make(sites: Sequence[Sequence[str]], *, r: int = 16, ranks: dict[str, int] | None = None) -> si.Artefact:
        random = np.random.default_rng(seed)
        layers = {}
        chosen = {}
        for site in sites:
            shares = np.arange(1, 10 * r) ** -random.uniform(0.4, 1.6)
            ratios = tuple((shares / shares.sum())[: 2 * r].tolist())
            for name in site:
                chosen[name] = 0 if random.random() < 0.1 else int(random.integers(1, 2 * r + 1))
                step = float(np.exp(random.normal()))
                gain = Gain(step, 0.1, 0.0, step**2, 100 * step**2, measured=True) if chosen[name] else None
                certificate = si.Certificate(rows=99, captured=0.9, settled=True)
                layers[name] = LayerSummary((8, 8), ratios, certificate, gain=gain)
        chosen = ranks or chosen
        return si.Artefact(
            recipe=si.Recipe("eva", {}, {"name": "variance"}, tuple(chosen), {}, {}, 0, "0.1.0"),
            plan=si.Plan(chosen, dict.fromkeys(chosen, 8.0)),
            config=si.LoraConfig(r=r, target_modules="all-linear", init_lora_weights="eva"),
            factors={name: si.Factors(torch.zeros(rank, 8), torch.zeros(8, rank)) for name, rank in chosen.items()},
            layers=layers,
            sites=tuple(tuple(site) for site in sites),
            provenance={},
            timings={},
        )

    return make


@pytest.fixture(scope="session")
def demo_artefact() -> si.Artefact:
    """EVA on the embedded model and data: six layers of seven modules."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smartinit import demo
    from smartinit.data import Sampling, read_batches

    tokenizer = AutoTokenizer.from_pretrained(demo.model_folder())
    batches = read_batches(demo.data_file(), tokenizer, Sampling(max_samples=16, max_length=64))
    model = AutoModelForCausalLM.from_pretrained(demo.model_folder())
    config = si.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="eva", task_type="CAUSAL_LM")
    return si.compute(model, config, batches, show_progress_bar=False)


@pytest.fixture(params=["demo", *SITES])
def artefact(request: pytest.FixtureRequest, make: Make) -> si.Artefact:
    """One of every shape."""
    if request.param == "demo":
        return request.getfixturevalue("demo_artefact")
    return make(SITES[request.param])


@pytest.fixture(scope="session")
def shapes() -> dict[str, list[tuple[str, ...]]]:
    """Sites by the name of the shape."""
    return SITES
