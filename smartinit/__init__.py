"""Starting points for LoRA fine-tuning, computed from data and weights.

    import smartinit as si

    artefact = si.compute(model, si.LoraConfig(init_lora_weights="eva", r=16), dataloader)
    artefact.save("adapter/")        # a plain PEFT adapter folder

Importing this package imports neither torch nor transformers: each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from smartinit import errors

if TYPE_CHECKING:
    from smartinit.adapters import LoraModel
    from smartinit.artefact import Artefact
    from smartinit.config import CordaConfig, EvaConfig, LoftQConfig, LoraConfig, LoraGAConfig
    from smartinit.convert import convert_adapter, save_residual_model
    from smartinit.eva import get_eva_state_dict, initialize_lora_eva_weights
    from smartinit.export import export_adapter
    from smartinit.factors import Factors
    from smartinit.pipeline import compute, compute_many
    from smartinit.planning.plan import Plan
    from smartinit.quantised import replace_lora_weights_loftq
    from smartinit.recipe import Recipe
    from smartinit.spectrum import Certificate, Spectrum
    from smartinit.store import Store
    from smartinit.training_record import InitRecorder

__version__ = "0.1.0"

__all__ = [
    "Artefact",
    "Certificate",
    "CordaConfig",
    "EvaConfig",
    "Factors",
    "InitRecorder",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "Plan",
    "Recipe",
    "Spectrum",
    "Store",
    "__version__",
    "compute",
    "compute_many",
    "convert_adapter",
    "errors",
    "export_adapter",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "replace_lora_weights_loftq",
    "save_residual_model",
]

# Type checkers read the block above, the interpreter reads this table; a test holds them equal.
_MODULE_OF = {
    "Artefact": "smartinit.artefact",
    "Certificate": "smartinit.spectrum",
    "CordaConfig": "smartinit.config",
    "EvaConfig": "smartinit.config",
    "Factors": "smartinit.factors",
    "InitRecorder": "smartinit.training_record",
    "LoftQConfig": "smartinit.config",
    "LoraConfig": "smartinit.config",
    "LoraGAConfig": "smartinit.config",
    "LoraModel": "smartinit.adapters",
    "Plan": "smartinit.planning.plan",
    "Recipe": "smartinit.recipe",
    "Spectrum": "smartinit.spectrum",
    "Store": "smartinit.store",
    "compute": "smartinit.pipeline",
    "compute_many": "smartinit.pipeline",
    "convert_adapter": "smartinit.convert",
    "export_adapter": "smartinit.export",
    "get_eva_state_dict": "smartinit.eva",
    "initialize_lora_eva_weights": "smartinit.eva",
    "replace_lora_weights_loftq": "smartinit.quantised",
    "save_residual_model": "smartinit.convert",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        msg = f"module 'smartinit' has no attribute '{name}'"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    """Public names, imported or not, and the submodules imported so far."""
    return sorted(set(globals()) | set(__all__))
