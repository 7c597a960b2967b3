"""Putting adapters into a model of 7 billion parameters that lies on the meta device: seconds of bookkeeping."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from adapter_benchmarks.rows import Row

import smartinit as si

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(options: argparse.Namespace) -> list[Row]:
    """One row for plain LoRA, one with a rank of its own for every block."""
    layers = 4 if options.quick else 32
    rows = []
    for what, patterns in (("one rank", {}), ("a rank per block", {f"layers.{i}.*": 8 + i for i in range(layers)})):
        config = {"r": 16, "target_modules": TARGETS, "rank_pattern": patterns}
        rows.append(
            Row(
                "injection",
                f"Llama-7B on meta, {layers} blocks, {what}",
                _best(
                    options.repeats, layers, lambda model, config=config: si.LoraModel(model, si.LoraConfig(**config))
                ),  # type: ignore[misc]
                _best(options.repeats, layers, lambda model, config=config: _peft(model, config)),  # type: ignore[misc]
            )
        )
    return rows


def _peft(model: torch.nn.Module, config: dict[str, object]) -> object:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(**config))  # type: ignore[arg-type]


def _best(repeats: int, layers: int, inject: Callable[[torch.nn.Module], object]) -> float:
    """Milliseconds of the fastest run, each on a model of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    seconds = []
    for _ in range(repeats):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))
        start = time.perf_counter()
        inject(model)
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)
