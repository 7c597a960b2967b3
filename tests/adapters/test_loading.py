"""Loading makes nothing that the file replaces, and leaves the process as it was."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch

from smartinit.adapters import LoraModel
from smartinit.adapters.checkpoints import restore_adapters
from smartinit.config import LoraConfig
from tests.adapters.beside_peft import llama, scatter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

OPTIONS = {
    "r": 2,
    "target_modules": ["embed_tokens", "q_proj", "v_proj"],
    "modules_to_save": ["o_proj"],
    "lora_dropout": 0.1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of an adapter with a bit of everything."""
    model = LoraModel(llama(), LoraConfig(**OPTIONS))
    scatter(model)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def collecting() -> Iterator[None]:
    """Garbage is collected afterwards, and nothing is frozen."""
    yield
    gc.enable()
    gc.unfreeze()


def kinds(model: nn.Module) -> list[tuple[str, type, bool]]:
    """Every module's name, class and mode."""
    return [(name, type(module), module.training) for name, module in model.named_modules()]


@pytest.mark.parametrize("training", [False, True])
def test_random_numbers_are_left_to_others_and_layers_are_as_new_ones(training: bool, folder: Path) -> None:
    base, other = llama().train(training), llama().train(training)
    before = torch.random.get_rng_state()
    model = LoraModel.from_pretrained(base, folder, is_trainable=True)
    model.load_adapter(folder, "two")
    assert torch.equal(torch.random.get_rng_state(), before)
    new = LoraModel(other, LoraConfig(**OPTIONS))
    new.add_adapter("two", LoraConfig(**OPTIONS))
    assert kinds(model.model) == kinds(new.model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in new.named_parameters()]
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.usefixtures("collecting")
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_garbage_is_collected_as_before(enabled: bool, frozen: bool, folder: Path) -> None:
    if not enabled:
        gc.disable()
    if frozen:
        gc.freeze()
    held = gc.get_freeze_count()
    LoraModel.from_pretrained(llama(), folder)
    assert gc.isenabled() == enabled
    assert (gc.get_freeze_count() > 0) == frozen
    assert gc.get_freeze_count() <= held


def test_a_checkpoint_puts_back_whatever_is_trained(tmp_path: Path) -> None:
    options = {"modules_to_save": ["lm_head"], "bias": "all", "trainable_token_indices": [3], "use_dora": True}
    model = LoraModel(llama(attention_bias=True), LoraConfig(r=2, target_modules=["q_proj"], **options))
    scatter(model)
    model.save_pretrained(tmp_path)
    held = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in held.items()}
    with torch.no_grad():
        for parameter in held.values():
            parameter.add_(1)
    restore_adapters(model, tmp_path)
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in held.items()), "an optimiser goes on with them"
    assert all(torch.equal(now[name], value) for name, value in before.items())
