"""Models to wrap, and PEFT's wrapping of the same models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., Any]:
    """Factory of GPT-2s with random weights, whose linear layers are transformers' Conv1D."""

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=4, n_positions=32, bos_token_id=1)
            config.eos_token_id = config.pad_token_id = 2
            return GPT2LMHeadModel(config).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """A batch of token ids, (2, 9)."""
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def randomise(seed: int) -> Callable[[torch.nn.Module], None]:
    """Fills every adapter matrix with values that depend on its layer's name only, so that B is not zero."""

    def fill(model: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(seed)
        matrices = {name: p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
        with torch.no_grad():
            for name in sorted(matrices):
                values = torch.randn(matrices[name].shape, generator=generator, dtype=torch.float64)
                matrices[name].copy_(values / 4)

    return fill
