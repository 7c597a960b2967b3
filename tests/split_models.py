"""Small real models of every kind of layer, and split starts for them made by a slow SVD in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import smartinit as si
from smartinit.artefact import LayerSummary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class SmallVision(nn.Module):
    """An embedding of coarse pixels, two convolutions, a linear layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Embedding(16, 6)
        self.wide = nn.Conv2d(6, 8, (3, 2), padding=1)
        self.narrow = nn.Conv2d(8, 7, 3, stride=2, bias=False)
        self.mix = nn.Linear(7, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``(batch, height, width)`` -> ``(batch, 4)``."""
        hidden = self.pixels(input_ids).movedim(-1, 1)
        hidden = torch.tanh(self.narrow(torch.tanh(self.wide(hidden))))
        return self.head(torch.tanh(self.mix(hidden.mean((-2, -1)))))


@dataclass(frozen=True)
class Case:
    """One model and the layers that are split.

    Attributes:
        make: the same model at every call.
        inputs: ids to run it on.
        targets: module names.
    """

    make: Callable[[], nn.Module]
    inputs: torch.Tensor
    targets: Sequence[str]

    def outputs(self, model: nn.Module) -> torch.Tensor:
        """Logits, without gradient, in eval mode."""
        model.eval()
        with torch.no_grad():
            return self.forward(model)

    def forward(self, model: nn.Module) -> torch.Tensor:
        """Logits."""
        found = model(input_ids=self.inputs)
        return getattr(found, "logits", found)


def llama() -> Case:
    """A Llama of two layers; attention and an MLP matrix."""

    def make() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            attention_bias=True,
        )
        return LlamaForCausalLM(config).eval()

    targets = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "self_attn.v_proj")]
    return Case(make, _ids(64, 2, 9), [*targets, "model.layers.1.mlp.down_proj"])


def llama_embedding() -> Case:
    """Its embedding, which is not tied, and two projections."""
    return Case(llama().make, _ids(64, 2, 9), ["model.embed_tokens", "model.layers.0.self_attn.q_proj"])


def gpt2() -> Case:
    """A GPT-2, whose linear layers are transformers' Conv1D."""

    def make() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()

    targets = [f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "mlp.c_proj")]
    return Case(make, _ids(64, 2, 9), targets)


def vision() -> Case:
    """Convolutions, a linear layer and an embedding in one net."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return SmallVision().eval()

    return Case(make, _ids(16, 5, 8, 8), ["pixels", "wide", "narrow", "mix"])


def weight_of(module: nn.Module) -> tuple[torch.Tensor, str, tuple[int, ...] | None]:
    """``W (out, in)`` in float64, the kind of layer, and the kernel of a convolution."""
    stored = module.weight.detach().double()
    if isinstance(module, nn.Conv2d):
        return stored.flatten(1), "convolution", tuple(module.kernel_size)
    if isinstance(module, nn.Embedding):
        return stored.T, "embedding", None
    if isinstance(module, nn.Linear):
        return stored, "linear", None
    return stored.T, "conv1d", None


def split_start(case: Case, config: si.LoraConfig, ranks: Sequence[int], **changes: Any) -> si.Artefact:
    """The best rank-r part of every target's weight, as factors of ``s·B A``; with DoRA also the rows' norms."""
    model = case.make()
    factors, layers = {}, {}
    chosen = {name: ranks[i % len(ranks)] for i, name in enumerate(case.targets)}
    alphas = {name: float(config.lora_alpha + 2 * (i % 2)) for i, name in enumerate(case.targets)}
    plan = si.Plan(chosen, alphas, config.use_rslora)
    for name, rank in chosen.items():
        weight, kind, kernel = weight_of(model.get_submodule(name))
        u, values, vt = torch.linalg.svd(weight, full_matrices=False)
        root = (values[:rank] / plan.scaling(name)).sqrt() if rank else values[:0]
        factors[name] = si.Factors(
            (root[:, None] * vt[:rank]).float(),
            (u[:, :rank] * root).float(),
            effect="splits",
            magnitude=weight.norm(dim=1).float() if config.use_dora else None,
        )
        shares = tuple((values**2 / (values**2).sum()).tolist())
        layers[name] = LayerSummary(tuple(weight.shape), shares, si.Certificate(rows=0), kind, kernel)
    fields = {
        "recipe": si.Recipe("pissa", {}, {"name": "uniform"}, tuple(chosen), {}, {}, 0, "0.1.0"),
        "plan": plan,
        "config": config,
        "factors": factors,
        "layers": layers,
        "sites": (),
        "provenance": {"model": "some/base", "model_class": type(model).__name__},
        "timings": {"factors": math.pi},
    }
    return si.Artefact(**(fields | changes))


def train(case: Case, model: nn.Module, steps: int = 20) -> None:
    """A fair number of real steps towards random labels."""
    torch.manual_seed(1)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert parameters
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    logits = case.outputs(model)
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(case.forward(model).flatten(0, -2), labels.flatten()).backward()
        optimiser.step()
    model.eval()


def _ids(vocabulary: int, *shape: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(0))
