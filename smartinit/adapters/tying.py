"""Weights that a model ties stay tied when an adapter trains them: ``ensure_weight_tying``."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional

from smartinit.adapters.bare import bare_modules
from smartinit.adapters.part import AdapterPart
from smartinit.targets.patterns import match_module

if TYPE_CHECKING:
    import torch

    from smartinit.config import LoraConfig


@dataclass(frozen=True)
class Ties:
    """The modules of a model that share the input embedding's weight.

    Attributes:
        embedding: name of the input embedding.
        tied: names of the others, in model order, usually the output layer's.
    """

    embedding: str
    tied: tuple[str, ...]


def embedding_ties(root: nn.Module) -> Ties | None:
    """Which modules share the weight of the input embedding; None if none do or the model does not name it.

    Found by identity of the parameter: what transformers' lists of tied weights promise is not always so.

    Args:
        root: the model, with or without adapter parts in it.
    """
    get = getattr(root, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # transformers' way to say that a model has none
        return None
    if not isinstance(embedding, nn.Module):
        return None
    embedding = _innermost(embedding)
    weight = getattr(embedding, "weight", None)
    own, tied = None, []
    for name, module in bare_modules(root):
        bare = _innermost(module)
        if bare is embedding:
            own = own or name
        elif weight is not None and bare._parameters.get("weight") is weight:  # noqa: SLF001
            tied.append(name)
    return Ties(own, tuple(tied)) if own and tied else None


def with_ties(root: nn.Module, config: LoraConfig) -> LoraConfig:
    """The configuration in which a tied layer that an adapter is to train stands for the embedding, as in PEFT.

    With ``ensure_weight_tying`` the embedding's name is added to ``modules_to_save`` or ``target_modules``, whichever
    names it or a module that shares its weight; those modules follow the embedding.

    Args:
        root: the model, with or without adapter parts in it.
        config: it is not written to.

    Warns:
        UserWarning: tied layers are trained and ``ensure_weight_tying`` is not set, or it is set in vain.
    """
    ties = embedding_ties(root)
    shared = () if ties is None else (ties.embedding, *ties.tied)
    saved = any(name.endswith(entry) for name in shared for entry in config.modules_to_save or ())
    targeted = any(match_module(config, name) for name in shared)
    if not config.ensure_weight_tying:
        if saved or targeted:
            warnings.warn(
                f"an adapter trains a layer whose weight is tied ({', '.join(shared)}): they are no longer one weight "
                "once it is merged; set ensure_weight_tying=True to keep them one",
                stacklevel=4,
            )
        return config
    if ties is None:
        warnings.warn("ensure_weight_tying is set, but the model ties nothing to its input embedding", stacklevel=4)
        return config
    if not (saved or targeted):
        if not config.trainable_token_indices:  # trained rows are tied in any case
            warnings.warn(
                f"ensure_weight_tying is set, but neither modules_to_save nor target_modules names one of the tied "
                f"layers ({', '.join(shared)})",
                stacklevel=4,
            )
        return config
    config = config.copy()
    if saved:
        if not any(ties.embedding.endswith(entry) for entry in config.modules_to_save or ()):
            config.modules_to_save = [*(config.modules_to_save or ()), ties.embedding]
    elif not match_module(config, ties.embedding):
        targets = config.target_modules
        if isinstance(targets, str):
            config.target_modules = rf"(?:{targets}|{re.escape(ties.embedding)})"
        else:
            config.target_modules = {*(targets or ()), ties.embedding}
    return config


class TransposedFactor(nn.Module):
    """A factor of a linear layer's adapter that is a factor of the embedding's, transposed: one parameter for both.

    An embedding's update of its weight ``(num_embeddings, embedding_dim)`` is ``(B A)ᵀ = Aᵀ Bᵀ``, with
    ``A (r, num_embeddings)`` and ``B (embedding_dim, r)``; for a linear layer with that weight, ``Bᵀ`` is therefore its
    A and ``Aᵀ`` its B.

    Args:
        factors: the embedding layer's factors by adapter name; they stay the embedding's.
        adapter_name: which adapter.
    """

    bias = None

    def __init__(self, factors: nn.ParameterDict, adapter_name: str) -> None:
        super().__init__()
        self._factors = (factors,)  # in a tuple, so that torch does not count it as a part of this module
        self._adapter_name = adapter_name

    @property
    def factors(self) -> nn.ParameterDict:
        """The embedding layer's factors by adapter name, one of which this is."""
        return self._factors[0]

    @property
    def weight(self) -> torch.Tensor:
        """The embedding's factor, transposed: a view."""
        factor: torch.Tensor = self._factors[0][self._adapter_name]
        return factor.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` times the factor."""
        return functional.linear(x, self.weight)


def tie_factors(layer: Any, embedding: Any, adapter_name: str) -> None:  # noqa: ANN401  (LoRA layers, which import this)
    """Let one adapter's factors of a linear layer be those of the embedding that it shares its weight with.

    PEFT makes parameters of its own that share memory with the embedding's: an optimiser then takes two steps in it,
    one for each gradient, and casting them to another dtype parts them. Here both layers' gradients come to one
    parameter.

    Args:
        layer: the linear LoRA layer; its factors are replaced.
        embedding: the embedding's LoRA layer.
        adapter_name: which adapter; both have it, with the same rank.
    """
    layer.lora_A[adapter_name] = TransposedFactor(embedding.lora_embedding_B, adapter_name)
    layer.lora_B[adapter_name] = TransposedFactor(embedding.lora_embedding_A, adapter_name)


def _innermost(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, AdapterPart) else module
