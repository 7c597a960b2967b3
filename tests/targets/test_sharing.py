"""Who uses a weight."""

from __future__ import annotations

import torch
from torch import nn

from smartinit.config import LoraConfig
from smartinit.targets import select_targets
from smartinit.targets.sharing import shared_weights, users_of_weights

ALL = frozenset({"linear", "conv1d", "convolution", "embedding"})


def test_defect_27_tied_and_replicated_weights_are_found(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    config = LoraConfig(target_modules=["embed_tokens", "lm_head", "up_proj", "q_proj"])
    groups = shared_weights(select_targets(model, config, hosts=ALL))
    assert [[target.name for target in group] for group in groups.values()] == [
        ["model.embed_tokens", "lm_head"],
        ["model.layers.0.self_attn.q_proj"],
        ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"],
        ["model.layers.1.self_attn.q_proj"],
    ]
    users = users_of_weights(model)[model.lm_head.weight.data_ptr()]
    assert [path for path, _ in users] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_another_layout_of_the_same_memory_is_another_storage():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach().T)
    users = users_of_weights(model)[model[0].weight.data_ptr()]
    assert [path for path, _ in users] == ["0.weight", "1.weight"]
    assert users[0][1] != users[1][1]
    assert len(shared_weights(select_targets(model, LoraConfig(target_modules="all-linear")))) == 2


def test_a_module_in_two_places_counts_in_each():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Sequential(layer))
    assert [path for path, _ in users_of_weights(model)[layer.weight.data_ptr()]] == ["0.weight", "1.0.weight"]


def test_what_has_no_address_shares_nothing():
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta"))
    model[1].bias = nn.Parameter(torch.zeros(2))
    assert list(users_of_weights(model)) == [model[1].bias.data_ptr()]
    assert shared_weights(select_targets(model, LoraConfig(target_modules="all-linear"))) == {}


def test_equal_values_are_not_shared(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    targets = select_targets(model, LoraConfig(target_modules=["embed_tokens", "lm_head"]), hosts=ALL)
    assert len(shared_weights(targets)) == 2
