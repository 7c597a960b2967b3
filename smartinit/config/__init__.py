"""What to adapt and how it starts: PEFT's field names and defaults, checked when they are set.

The classes hold options and nothing else; importing this package imports neither torch nor PEFT.
`LoraConfig.from_any` is the one door for whatever a caller has: our config, a ``peft.LoraConfig`` or a dict.
"""

from __future__ import annotations

from smartinit.config.lora import INIT_METHODS, OWN_FIELDS, LoraConfig
from smartinit.config.methods import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, LoraRuntimeConfig

__all__ = [
    "INIT_METHODS",
    "OWN_FIELDS",
    "CordaConfig",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
]
