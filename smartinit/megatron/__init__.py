"""Megatron Bridge's vocabulary on smartinit's layers: ``LoRA(dim=16)(model)``.

In plain torch and ``torch.distributed``: neither Megatron nor Transformer Engine is imported. Layers of Megatron-Core,
of Transformer Engine and of PyTorch's own tensor parallelism are known by what they have; where none of them is
installed, `smartinit.megatron.stand_ins` has layers that look and compute the same.
"""

from __future__ import annotations

from smartinit.megatron.canonical import CanonicalLoRA
from smartinit.megatron.checkpoint import load_adapter, save_adapter
from smartinit.megatron.dora import DoRA, reset_magnitudes
from smartinit.megatron.lora import LoRA
from smartinit.megatron.merge import LoRAMerge
from smartinit.megatron.vlm import VLMLoRA

__all__ = ["CanonicalLoRA", "DoRA", "LoRA", "LoRAMerge", "VLMLoRA", "load_adapter", "reset_magnitudes", "save_adapter"]
