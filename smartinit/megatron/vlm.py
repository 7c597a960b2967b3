"""LoRA for vision-language models in Megatron Bridge's words: each part has adapters, or trains in full."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from smartinit.config import checks
from smartinit.errors import ModelError
from smartinit.megatron.agreement import every_number
from smartinit.megatron.lora import LoRA
from smartinit.megatron.walk import chunks_of

if TYPE_CHECKING:
    from torch import nn

    from smartinit.megatron.walk import Model, Place

Part = Literal["vision_model", "vision_projection", "language_model"]

PARTS: dict[str, Part] = {
    # Megatron-Core's LLaVA
    "vision_model": "vision_model",
    "vision_projection": "vision_projection",
    "language_model": "language_model",
    # transformers: LLaVA, Gemma 3, PaliGemma, InternVL, Mllama
    "vision_tower": "vision_model",
    "multi_modal_projector": "vision_projection",
    # Qwen-VL
    "visual": "vision_model",
    # Idefics, SmolVLM
    "connector": "vision_projection",
    "text_model": "language_model",
    # BLIP-2
    "qformer": "vision_projection",
    "language_projection": "vision_projection",
}
"""A module's own name -> the part of the model that it is."""

_MERGERS = frozenset({"merger", "deepstack_merger_list"})
"""Within the vision model, what makes the language model's inputs (Qwen-VL)."""

_HEADS = frozenset({"lm_head", "output_layer"})
"""Of the language model, wherever it is; no sign of a vision-language model."""


def part_of(name: str) -> Part | None:
    """The part that a module or parameter belongs to, by its full name; None: to none of them."""
    part: Part | None = None
    for own in name.split("."):
        found = PARTS.get(own)
        if part is None:
            part = found or ("language_model" if own in _HEADS else None)
        elif part == "vision_model" and (own in _MERGERS or found == "vision_projection"):
            part = "vision_projection"
    return part


@dataclass
class VLMLoRA(LoRA):
    """`LoRA` in which each part of a vision-language model is frozen and has adapters, or trains in full.

    The parts are known by the names of Megatron-Core's LLaVA and of the vision-language models in transformers, see
    `PARTS`; a model, or a chunk of one, may lack any of them. The output head belongs to the language model. What is
    in none of the parts is frozen, with adapters beside targets.

    Args:
        freeze_vision_model: whether the vision encoder is frozen, and has adapters beside its targets; else all of it
            trains, without adapters.
        freeze_vision_projection: likewise the layers between vision encoder and language model.
        freeze_language_model: likewise the language model.
    """

    freeze_vision_model: bool = True
    freeze_vision_projection: bool = True
    freeze_language_model: bool = True

    def check(self) -> None:
        """See `LoRA.check`.

        Raises:
            ConfigError: a flag that is neither True nor False.
        """
        super().check()
        for field in fields(self):
            if field.name.startswith("freeze_"):
                checks.boolean(field.name, getattr(self, field.name))

    def trains(self, name: str) -> bool:
        """Whether a module or parameter is in a part that trains in full."""
        part = part_of(name)
        return part is not None and not getattr(self, f"freeze_{part}")

    def spares(self, name: str) -> bool:
        """See `PEFT.spares`: the parts that train in full."""
        return self.trains(name)

    def freeze_model(self, model: Model, training: bool = True) -> None:
        """Freeze all parameters but those of parts that train in full. Every rank must call this.

        Args:
            model: see `PEFT.__call__`.
            training: let those parts train, and set the model to training mode; False: freeze them as well.

        Raises:
            ModelError: no part of a vision-language model is found on any rank.
        """
        check_parts(model)
        super().freeze_model(model, training)
        for chunk in chunks_of(model) if training else ():
            for name, parameter in chunk.named_parameters():
                if self.trains(name) and (parameter.is_floating_point() or parameter.is_complex()):
                    parameter.requires_grad_(True)

    def _targets(self, model: Model) -> list[tuple[nn.Module, Place, str]]:
        check_parts(model)
        return super()._targets(model)


def check_parts(model: Model) -> None:
    """Whether some rank has a part of a vision-language model; collective.

    Raises:
        ModelError: none has.
    """
    names = {name.rpartition(".")[2] for chunk in chunks_of(model) for name, _ in chunk.named_modules()}
    found = not names.isdisjoint(PARTS)
    if not any(any(row) for row in every_number([int(found)])):
        raise ModelError(
            "the model has none of the parts of a vision-language model (modules named "
            f"{', '.join(repr(name) for name in PARTS)}); use LoRA for other models"
        )
