"""Which rows of a layer's input count: attention and label masks, and PEFT's two preparation callables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from smartinit.errors import ArgumentError

ForwardFn = Callable[[nn.Module, Any], Any]
PrepareModelInputs = Callable[[Any, Any], Any]
PrepareLayerInputs = Callable[[Any, Any, str], Tensor]


def forward_fn_dict(model: nn.Module, model_input: Mapping[str, Any]) -> Any:  # noqa: ANN401 - the model's own output
    """``model(**model_input)``, the default forward function."""
    return model(**model_input)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: Any) -> Tensor:  # noqa: ANN401
    """Indices of the tokens that count, ``(n, 2)``: attended, and not masked out by the labels.

    Args:
        model_input: a batch with ``input_ids`` or ``attention_mask`` of shape ``(batch, tokens)``.
        peft_config: its ``eva_config`` says whether and by which value labels mask.

    Raises:
        ArgumentError: the batch is no mapping.
    """
    masks = token_masks(model_input, **label_mask_options(peft_config))
    if not masks:
        msg = "the batch has neither 'attention_mask' nor 'input_ids', so its tokens cannot be selected"
        raise ArgumentError(msg)
    return masks[0].nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:  # noqa: ANN401
    """Rows of a layer's input at the indices from `prepare_model_inputs_fn_language_modeling`.

    Args:
        layer_input: the tensor, or the tuple of positional inputs, that reached the layer.
        model_input: ``(n, 2)`` indices; inputs without a token dimension (a pooler's) are taken whole.
        layer_name: for messages.

    Returns:
        ``(rows, features)``.
    """
    tensor = layer_tensor(layer_input, layer_name)
    if tensor.ndim > 2 and not model_input.numel():  # noqa: PLR2004 - (batch, tokens, features)
        return flatten_rows(tensor)[:0]
    if tensor.ndim <= 2 or tensor.shape[0] <= int(model_input[:, 0].max()):  # noqa: PLR2004
        return flatten_rows(tensor)
    return tensor[model_input.T.unbind()]


def label_mask_options(config: Any) -> dict[str, Any]:  # noqa: ANN401 - ours, PEFT's, or None
    """Keyword arguments of `token_masks` from a LoRA configuration's ``eva_config``."""
    eva = getattr(config, "eva_config", None)
    return {
        "use_label_mask": getattr(eva, "use_label_mask", True),
        "label_mask_value": getattr(eva, "label_mask_value", -100),
    }


def token_masks(
    model_input: Any,  # noqa: ANN401 - whatever the data loader yields
    *,
    use_label_mask: bool = True,
    label_mask_value: int = -100,
    encoder_decoder: bool = False,
) -> list[Tensor]:
    """Boolean ``(batch, tokens)`` masks of a batch: attended ∧ (labels ≠ value), unshifted.

    Of a sequence-to-sequence batch the encoder's mask comes first and the decoder's, from the labels, second.

    Raises:
        ArgumentError: the batch is no mapping.
    """
    if not isinstance(model_input, Mapping):
        msg = (
            f"a batch must be a mapping of names to tensors, got {type(model_input).__name__}; "
            "pass prepare_model_inputs_fn and forward_fn for other batches"
        )
        raise ArgumentError(msg)
    masks: list[Tensor] = []
    for ids, attention in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        mask = model_input.get(attention)
        if mask is None and isinstance(model_input.get(ids), Tensor):
            mask = torch.ones_like(model_input[ids])
        if isinstance(mask, Tensor) and mask.ndim == 2:  # noqa: PLR2004 - (batch, tokens)
            masks.append(mask.bool())
    labels = model_input.get("labels")
    if use_label_mask and isinstance(labels, Tensor) and labels.ndim == 2:  # noqa: PLR2004
        counted = labels != label_mask_value
        first = 1 if encoder_decoder else 0
        same = [i for i, mask in enumerate(masks) if i >= first and mask.shape == counted.shape]
        for i in same:
            masks[i] = masks[i] & counted.to(masks[i].device)
        if not same:
            masks.append(counted)
    return masks


def layer_tensor(layer_input: Any, layer_name: str) -> Tensor:  # noqa: ANN401 - a hook's arguments
    """The first tensor of a hook's input.

    Raises:
        ArgumentError: there is none.
    """
    first = layer_input[0] if isinstance(layer_input, (tuple, list)) and layer_input else layer_input
    if isinstance(first, Tensor):
        return first
    msg = (
        f"the input of layer '{layer_name}' is a {type(first).__name__}, not a tensor; "
        "pass prepare_layer_inputs_fn to turn it into rows"
    )
    raise ArgumentError(msg)


def flatten_rows(tensor: Tensor) -> Tensor:
    """All leading dimensions become rows: ``(..., d)`` to ``(rows, d)``."""
    return tensor.reshape(-1, tensor.shape[-1])


@dataclass(frozen=True)
class _FlatMask:
    """One mask of a batch and what is needed to apply it quickly."""

    shape: tuple[int, int]
    everything: bool
    index: Tensor
    by_sample: Tensor


class RowFilter:
    """The default selection of rows for one batch, by the shape of what reaches the layer.

    A layer sees ``(batch, tokens, d)``, flattened ``(batch·tokens, d)``, one row per sample ``(batch, d)`` (a pooler,
    a classifier head), or something that has no such dimensions (image patches, the tokens routed to an expert): the
    mask is applied wherever its shape says which row is which token, and all rows count where it does not.

    Args:
        masks: boolean ``(batch, tokens)`` masks, see `token_masks`; none: all rows count.
    """

    def __init__(self, masks: list[Tensor]) -> None:
        self._masks = [
            _FlatMask(
                shape=(mask.shape[0], mask.shape[1]),
                everything=bool(mask.all()),
                index=mask.reshape(-1).nonzero().squeeze(1),
                by_sample=mask.any(1),
            )
            for mask in masks
        ]

    @property
    def tokens(self) -> int:
        """Tokens of the batch that count (of its first mask)."""
        return int(self._masks[0].index.numel()) if self._masks else 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Rows ``(rows, d)`` of ``tensor``; a view when every row counts."""
        if tensor.ndim == 1:
            return tensor.unsqueeze(0)
        leading = tuple(tensor.shape[:-1])
        for mask in self._masks:
            if prod(leading) != prod(mask.shape):
                continue
            if mask.everything:
                return flatten_rows(tensor)
            index = mask.index.to(tensor.device)
            if leading[:2] == mask.shape[::-1] and mask.shape[0] != mask.shape[1] and mask.shape[0] != 1:
                tensor = tensor.transpose(0, 1)  # (tokens, batch, d)
            return flatten_rows(tensor).index_select(0, index)
        for mask in self._masks:
            if leading == (mask.shape[0],):
                return tensor[mask.by_sample.to(tensor.device)]
        return flatten_rows(tensor)
