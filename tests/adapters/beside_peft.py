"""The same model wrapped twice, by this package and by PEFT, and what to compare of the two."""

from __future__ import annotations

import warnings
import zlib
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters import LoraModel
from smartinit.adapters.state import stored_layers, stored_others
from smartinit.config import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

PREFIX = "base_model.model."


def llama(**config: Any) -> nn.Module:
    """A causal language model with one block of width 16, random weights and a padding token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kind = config.pop("kind", LlamaForCausalLM)
    dtype = config.pop("dtype", torch.float32)
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(LlamaConfig(**shape, num_attention_heads=2, **config)).to(dtype).eval()


def bert(kind: str = "BertForSequenceClassification", **config: Any) -> nn.Module:
    """A model of BERT's kind with one block of width 16, random weights, and biases that are not zero."""
    import transformers

    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bare = transformers.BertConfig(**shape, num_attention_heads=2, max_position_embeddings=16, **config)
        model = getattr(transformers, kind)(bare).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.3)
    return model


def gpt2(**config: Any) -> nn.Module:
    """A GPT-2 with one block of width 16 and random weights; its head is tied to its embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=2, pad_token_id=0, **config)).eval()


def tokens() -> torch.Tensor:
    """A batch of token ids, ``(3, 6)``, with padding in it."""
    batch = torch.randint(1, 40, (3, 6), generator=torch.Generator().manual_seed(1))
    batch[0, :2] = 0
    return batch


def both(make: Callable[[], nn.Module], *, train: bool = True, **options: Any) -> tuple[LoraModel, Any]:
    """Ours and PEFT's wrapping of the same model, both with the same random values in all that is trained."""
    import peft

    options = {"r": 2, "lora_alpha": 4} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = LoraModel(make(), LoraConfig(**options)), peft.get_peft_model(make(), peft.LoraConfig(**options))
    if train:
        for model in models:
            scatter(model)
    return models


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Give LoRA's matrices values that depend on their names only, and move all else that is trained by such values."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(zlib.crc32(bare(name).encode()))
            values = torch.randn(parameter.shape, generator=generator).to(parameter) / 4
            parameter.copy_(values if ".lora_" in name else parameter + values)


def bare(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    return name.removeprefix("base_model.").removeprefix("model.")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {bare(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of all that is trained, by name."""
    return {name: parameter.dtype for name, parameter in trained(model).items()}


def output(model: nn.Module, **batch: Any) -> torch.Tensor:
    """The model's logits."""
    found: torch.Tensor = model(**({"input_ids": tokens()} | batch)).logits
    return found


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of a loss that depends on every logit, by the names of what is trained."""
    model.zero_grad()
    logits = output(model)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    (logits.tanh() * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in trained(model).items() if parameter.grad is not None}


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-6) -> bool:
    """Whether the same keys have values that differ by at most ``tolerance`` of the largest."""
    return one.keys() == other.keys() and all(
        one[key].shape == other[key].shape
        and float((one[key] - other[key]).detach().abs().max())
        <= tolerance * max(float(other[key].detach().abs().max()), 1e-3)
        for key in one
    )


def same_step(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether outputs and gradients agree."""
    logits = ({"logits": output(model).detach()} for model in (ours, theirs))
    return close(*logits) and close(gradients(ours), gradients(theirs))


def others_in_file(model: LoraModel, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """What ours holds besides LoRA's matrices, by key."""
    return stored_others(model.model, adapter_name, model.config_of(adapter_name))


def pefts_others(model: Any, ours: LoraModel) -> dict[str, torch.Tensor]:
    """What PEFT would save besides LoRA's matrices."""
    from peft import get_peft_model_state_dict

    layers = tuple(f"{PREFIX}{name}.lora_" for name in stored_layers(ours.model, "default"))
    saved = get_peft_model_state_dict(model)
    return {key: t for key, t in saved.items() if key.endswith(".lora_B.bias") or not key.startswith(layers)}


def picture(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that adapters might change: modules by identity, their mode, parameters and what they train."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    return modules + [
        (name, id(p), p.requires_grad, p.double().sum().item())
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
