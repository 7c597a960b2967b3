"""Small real models for every kind of layer, and every method computed once per setting."""

from __future__ import annotations

import copy
import functools
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

import smartinit as si
from smartinit.methods import available_methods

SEED = int(os.environ.get("SMARTINIT_TEST_SEED", "0"))
RANK = 4
# What is scaled how: alpha = r, alpha != r, rank-stabilised.
SCALINGS = {
    "alpha=r": {"lora_alpha": RANK},
    "alpha!=r": {"lora_alpha": 3},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest relative difference of outputs that rounding explains.
TOLERANCE = {"fp32": 2e-5, "bf16": 3e-2}
TARGETS = {
    "linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "conv1d": ["c_attn", "c_fc", "c_proj"],
    "convolution": ["projection"],
    "embedding": ["embed_tokens"],
}
INIT = {"kaiming": True, "random": False}


@functools.cache
def _original(host: str) -> torch.nn.Module:
    torch.manual_seed(SEED)
    if host == "conv1d":
        config: Any = transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64, initializer_range=0.2
        )
        return transformers.GPT2LMHeadModel(config).eval()
    if host == "convolution":
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
            initializer_range=0.2,
        )
        return transformers.ViTForImageClassification(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def make_model(host: str, dtype: str = "fp32") -> torch.nn.Module:
    """A fresh copy of a small transformer."""
    return copy.deepcopy(_original(host)).to(DTYPES[dtype])


def make_batches(host: str, count: int = 6) -> list[dict[str, torch.Tensor]]:
    """Random but fixed data; a third of the last row is padding."""
    generator = torch.Generator().manual_seed(SEED + 1)
    if host == "convolution":
        return [
            {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator), "labels": torch.arange(4) % 2}
            for _ in range(count)
        ]
    out = []
    for _ in range(count):
        ids = torch.randint(0, 64, (4, 24), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, 16:] = 0
        out.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return out


def outputs(model: torch.nn.Module, host: str) -> torch.Tensor:
    """Logits ``(rows, classes)`` in float64 of one fixed batch."""
    batch = {key: value for key, value in make_batches(host, 1)[0].items() if key != "labels"}
    if host == "convolution":
        batch["pixel_values"] = batch["pixel_values"].to(next(model.parameters()).dtype)
    with torch.no_grad():
        logits = model(**batch).logits.double()
    if "attention_mask" in batch:
        return logits[batch["attention_mask"].bool()]
    return logits.reshape(-1, logits.shape[-1])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative difference in the Frobenius norm."""
    return float((a - b).norm() / b.norm())


def lora_config(method: str, host: str, scaling: str = "alpha=r", *, dora: bool = False, **more: Any) -> si.LoraConfig:
    """The configuration of one case."""
    values = {"r": RANK, "target_modules": TARGETS[host], "use_dora": dora, **SCALINGS[scaling], **more}
    return si.LoraConfig(init_lora_weights=INIT.get(method, method), fan_in_fan_out=host == "conv1d", **values)


def compute(model: torch.nn.Module, config: si.LoraConfig, host: str) -> si.Artefact:
    """The artefact, with data for the methods that look at some."""
    return si.compute(model, config, make_batches(host), show_progress_bar=False, seed=SEED)


@dataclass(frozen=True)
class Case:
    """One setting and what was computed for it."""

    method: str
    host: str
    dtype: str
    scaling: str
    dora: bool

    @functools.cached_property
    def config(self) -> si.LoraConfig:
        return lora_config(self.method, self.host, self.scaling, dora=self.dora)

    @functools.cached_property
    def artefact(self) -> si.Artefact:
        return compute(make_model(self.host, self.dtype), self.config, self.host)

    @property
    def effect(self) -> str:
        return available_methods()[self.method].effect

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def wrapped(self, model: torch.nn.Module) -> Any:
        """The model with PEFT's adapter in its default start."""
        peft = pytest.importorskip("peft")
        theirs = self.config.copy()
        theirs.init_lora_weights = True
        return peft.get_peft_model(model, theirs.to_peft()).eval()


def hosts_of(method: str) -> list[str]:
    """Kinds of layers on which a method is defined, in a fixed order."""
    return [host for host in TARGETS if host in available_methods()[method].hosts]


METHODS = sorted(available_methods())
CASES = [
    (method, host, dtype, scaling, dora)
    for method in METHODS
    for host in hosts_of(method)
    for dtype in DTYPES
    for scaling in SCALINGS
    for dora in (False, True)
]


@functools.cache
def case(method: str, host: str, dtype: str = "fp32", scaling: str = "alpha!=r", dora: bool = False) -> Case:
    """Cases are computed once."""
    return Case(method, host, dtype, scaling, dora)
