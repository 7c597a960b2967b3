from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from smartinit.activations.rows import (
    RowFilter,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
    token_masks,
)
from smartinit.errors import ArgumentError

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()


def batch(**extra):
    return {"input_ids": torch.arange(12).view(3, 4), "attention_mask": MASK.long(), **extra}


def test_labels_and_attention_mask_together_unshifted():
    labels = torch.tensor([[-100, 5, 6, 7], [-100, -100, 4, 4], [1, 1, 1, 1]])
    (mask,) = token_masks(batch(labels=labels))
    assert mask.tolist() == [[False, True, True, False], [False] * 4, [False] * 4]
    (mask,) = token_masks(batch(labels=labels), use_label_mask=False)
    assert torch.equal(mask, MASK)
    (mask,) = token_masks(batch(labels=labels), label_mask_value=5)
    assert mask.tolist()[0] == [True, False, True, False]


def test_sequence_to_sequence_masks_keep_their_shapes():
    masks = token_masks(batch(labels=torch.tensor([[1, -100], [2, 2], [3, 3]])))
    assert [tuple(m.shape) for m in masks] == [(3, 4), (3, 2)]
    rows = RowFilter(masks)(torch.arange(6.0).view(3, 2, 1))
    assert rows.flatten().tolist() == [0, 2, 3, 4, 5]


def test_class_labels_mask_nothing():
    assert torch.equal(token_masks(batch(labels=torch.tensor([0, 1, -100])))[0], MASK)


def test_masked_rows_by_shape():
    rows = RowFilter([MASK])
    x = torch.arange(12.0).view(3, 4, 1)
    kept = [0, 1, 2, 4, 5]
    assert rows(x).flatten().tolist() == kept
    assert rows(x.reshape(12, 1)).flatten().tolist() == kept, "flattened tokens, as routers see them"
    assert rows(x.transpose(0, 1).contiguous()).flatten().tolist() == kept, "tokens first"
    assert rows(x.reshape(3, 4, 1, 1)).flatten().tolist() == kept
    assert rows(torch.tensor([[1.0], [2.0], [3.0]])).flatten().tolist() == [1, 2], "one row per sample: a pooler"
    assert rows(torch.ones(7, 2)).shape == (7, 2), "tokens routed to an expert: all of them"
    assert rows(torch.ones(5)).shape == (1, 5)
    assert rows.tokens == 5


def test_nothing_is_copied_when_every_token_counts():
    x = torch.randn(3, 4, 2)
    assert RowFilter([torch.ones(3, 4).bool()])(x).data_ptr() == x.data_ptr()


def test_pefts_contract_of_the_two_functions():
    config = SimpleNamespace(eva_config=SimpleNamespace(use_label_mask=True, label_mask_value=-100))
    labels = torch.tensor([[-100, 5, 6, 7], [1, -100, 4, 4], [1, 1, 1, 1]])
    indices = prepare_model_inputs_fn_language_modeling(batch(labels=labels), config)
    assert indices.tolist() == [[0, 1], [0, 2], [1, 0]]
    x = torch.randn(3, 4, 2)
    assert torch.equal(prepare_layer_inputs_fn_language_modeling((x,), indices, "l"), x[[0, 0, 1], [1, 2, 0]])


def test_the_two_functions_equal_pefts(seed):
    eva = pytest.importorskip("peft.tuners.lora.eva")
    peft = pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(seed)
    inputs = batch(labels=torch.where(torch.rand(3, 4, generator=generator) < 0.5, -100, 3))
    config = peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig())
    ours, theirs = (
        f(inputs, config)
        for f in (prepare_model_inputs_fn_language_modeling, eva.prepare_model_inputs_fn_language_modeling)
    )
    assert torch.equal(ours, theirs)
    x = torch.randn(3, 4, 2, generator=generator)
    ours = prepare_layer_inputs_fn_language_modeling((x,), theirs, "l")
    assert torch.equal(ours, eva.prepare_layer_inputs_fn_language_modeling((x,), theirs, "l"))


def test_a_batch_that_is_no_mapping_is_refused():
    with pytest.raises(ArgumentError, match="mapping of names to tensors, got list"):
        token_masks([torch.ones(2, 2)])
    with pytest.raises(ArgumentError, match="neither 'attention_mask' nor 'input_ids'"):
        prepare_model_inputs_fn_language_modeling({"pixel_values": torch.ones(1)}, None)
    with pytest.raises(ArgumentError, match=r"layer 'a\.b' is a str"):
        prepare_layer_inputs_fn_language_modeling(("text",), torch.zeros(1, 2).long(), "a.b")
