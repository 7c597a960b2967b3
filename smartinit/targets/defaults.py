"""Which layers get an adapter when a config names none, by ``model.config.model_type``, as in PEFT 0.21.2."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# Architectures by the layers that are their query and value projections (or the fused form of these).
_BY_LAYERS: Mapping[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): (
        "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm"
    ),
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta",
    ("query_key_value",): "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel",
    ("q", "v"): "mt5 t5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("c_attn", "c_proj"): "btlm",
    ("in_proj",): "deberta",
    ("query_proj", "value_proj"): "deberta-v2",
    ("qkv_proj",): "codegen",
    ("Wqkv",): "mpt",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}

DEFAULT_TARGETS: Mapping[str, frozenset[str] | str] = MappingProxyType(
    {
        **{kind: frozenset(layers) for layers, kinds in _BY_LAYERS.items() for kind in kinds.split()},
        # A regular expression, because the vision and audio towers have layers of the same names.
        "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    }
)
"""Model type -> list entries, or a regular expression for the whole name."""
