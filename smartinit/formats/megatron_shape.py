"""What Megatron's fused layers need to know of a model: its heads, its experts, whether it has gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smartinit.errors import ConfigError, ModelError
from smartinit.formats.megatron_fusion import HeadShape

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXT = ("text_config", "llm_config", "language_config")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_UNGATED = ("arcee", "nemotron")  # their feed-forward layers are up_proj and down_proj alone
_INTERLEAVED = ("gpt_oss",)


@dataclass(frozen=True)
class DecoderShape:
    """Of a decoder.

    Attributes:
        heads: of its attention; None: not known.
        experts: how many each layer of experts has; None: not known, or none.
        layers: how many; None: not known.
        gated: whether linear_fc1 is a gate and an up projection.
    """

    heads: HeadShape | None = None
    experts: int | None = None
    layers: int | None = None
    gated: bool = True

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON, by the names of Hugging Face's configurations."""
        heads = self.heads
        return {
            "num_attention_heads": heads and heads.heads,
            "num_key_value_heads": heads and heads.groups,
            "head_dim": heads and heads.size,
            "num_experts": self.experts,
            "num_hidden_layers": self.layers,
            "gated": self.gated,
        }


def shape_of(config: Mapping[str, object]) -> DecoderShape:
    """The shape of the decoder that a ``config.json`` describes: of a model that also sees, its text model.

    Args:
        config: the content of ``config.json``, or what `DecoderShape.as_dict` gave.

    Raises:
        ModelError: a number is none, or is missing; or a model whose gates and ups take turns.
        ConfigError: numbers that no attention can have.
    """
    text = _of_text(config)
    kind = str(text.get("model_type", ""))
    if kind in _INTERLEAVED:
        raise ModelError(
            f"models of type '{kind}' have the rows of gate and up by turns, and biases beside them, which is not "
            "supported; other decoders of experts are"
        )
    heads = _number(text, "num_attention_heads")
    found = [count for key in _EXPERTS if (count := _number(text, key)) is not None]
    gated = text.get("gated", kind not in _UNGATED)
    return DecoderShape(
        None if heads is None else _heads(text, heads),
        found[0] if found else None,
        _number(text, "num_hidden_layers"),
        bool(gated),
    )


def lacks_numbers(config: Mapping[str, object]) -> bool:
    """Whether a ``config.json`` leaves numbers to the defaults of its model's class."""
    text = _of_text(config)
    wanted = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return any(text.get(key) is None for key in wanted)


def _of_text(config: Mapping[str, object]) -> Mapping[str, object]:
    """The part that is about the decoder."""
    found = (value for key in _TEXT if isinstance(value := config.get(key), dict))
    return next(found, config)


def _heads(text: Mapping[str, object], heads: int) -> HeadShape:
    groups = _number(text, "num_key_value_heads") or heads
    size = _number(text, "head_dim")
    if size is None:
        hidden = _number(text, "hidden_size")
        if hidden is None or hidden % heads:
            raise ModelError(
                f"config.json has neither head_dim nor a hidden_size that {heads} heads divide; give head_size "
                "(--head-size)"
            )
        size = hidden // heads
    try:
        return HeadShape(heads, groups, size)
    except ConfigError as error:
        raise ModelError(f"config.json cannot be right: {error}") from error


def _number(values: Mapping[str, object], key: str) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json says {key}={value!r}; expected a whole number above 0")
    return value
