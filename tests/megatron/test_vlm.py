"""VLMLoRA trains exactly what it is asked to train, in models of transformers and of Megatron's shape."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from smartinit.adapters.parallel.layer import AdaptedLayer
from smartinit.errors import ConfigError, ModelError, TargetError
from smartinit.megatron import VLMLoRA
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear
from smartinit.megatron.vlm import part_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ranks import Ranks

FLAGS = ("freeze_vision_model", "freeze_vision_projection", "freeze_language_model")
FUSED = ["linear_fc1", "linear_fc2"]
IMAGE = 60
TEXT: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
)


def llava() -> tuple[nn.Module, dict[str, Any], list[str]]:
    """Model, a batch, targets."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT, num_key_value_heads=2), image_token_index=IMAGE
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    tokens = torch.tensor([[1, *[IMAGE] * 4, 5, 6, 7]])
    batch = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 8, 8), "labels": tokens.clamp(max=50)}
    return model, batch, ["q_proj", "v_proj", "linear_1", "linear_2", "fc1"]


def qwen() -> tuple[nn.Module, dict[str, Any], list[str]]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config=TEXT
        | dict(
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        ),
        vision_config=dict(
            depth=1, embed_dim=16, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=2, spatial_merge_size=2
        ),
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    tokens = torch.tensor([[1, IMAGE + 2, IMAGE, IMAGE, IMAGE + 3, 5, 6]])
    batch = {
        "input_ids": tokens,
        "pixel_values": torch.randn(8, 3 * 2 * 2 * 2),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
        "mm_token_type_ids": (tokens == IMAGE).int(),
        "labels": tokens.clamp(max=50),
    }
    return model, batch, ["q_proj", "v_proj", "qkv", "fc1", "*.merger.mlp.0"]


PREFIXES = {
    llava: {
        "vision_model": ("model.vision_tower.",),
        "vision_projection": ("model.multi_modal_projector.",),
        "language_model": ("model.language_model.", "lm_head."),
    },
    qwen: {
        "vision_model": tuple(f"model.visual.{part}." for part in ("patch_embed", "blocks")),
        "vision_projection": ("model.visual.merger.",),
        "language_model": ("model.language_model.", "lm_head."),
    },
}
# No gradient comes here: LLaVA takes the hidden states of the last layer but one, without the norm after them.
UNUSED = ("vision_tower.encoder.layers.1.", "vision_tower.post_layernorm.", "vision_model.encoder.layers.1.")


@pytest.mark.parametrize("flags", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("make", [llava, qwen])
def test_exactly_the_asked_parts_train(make: Callable[[], Any], flags: tuple[bool, bool, bool]) -> None:
    model, batch, targets = make()
    prefixes = PREFIXES[make]
    names = [name for name, _ in model.named_parameters()]
    everywhere = tuple(itertools.chain(*prefixes.values()))
    assert all(name.startswith(everywhere) for name in names), "every parameter is in one part"
    lora = VLMLoRA(targets, dim=4, lora_B_init_method="normal", **dict(zip(FLAGS, flags, strict=True)))
    model = lora(model)
    frozen = tuple(itertools.chain(*(p for p, flag in zip(prefixes.values(), flags, strict=True) if flag)))
    full = tuple(itertools.chain(*(p for p, flag in zip(prefixes.values(), flags, strict=True) if not flag)))
    adapted = [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    for part, flag in zip(prefixes.values(), flags, strict=True):
        assert any(f"{name}.".startswith(part) for name in adapted) == flag
    asked = {name for name, _ in model.named_parameters() if ".adapter." in name or name.startswith(full)}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == asked
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        loss = model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed <= asked
    idle = {name for name in asked - changed if not any(part in name for part in UNUSED)}
    # What has no gradient, such as the bias of keys, does not change either.
    assert all(not name.startswith(frozen) or ".adapter." not in name for name in idle), idle
    assert idle <= {name for name in asked if name.endswith("k_proj.bias")}, idle


class Megatron(nn.Module):
    """LLaVA as Megatron-Core names it; any part may be missing, or be None."""

    def __init__(self, *parts: str) -> None:
        super().__init__()
        for part in ("vision_model", "vision_projection", "language_model"):
            layers = nn.ModuleDict({"linear_fc1": ColumnParallelLinear(4, 6), "linear_fc2": RowParallelLinear(6, 4)})
            setattr(self, part, layers if part in parts else None)
        self.other = nn.ModuleDict({"linear_fc1": ColumnParallelLinear(4, 4)})


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Outer(nn.Module):
    """As Megatron-Core wraps models: an inner one under a name of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.llava_model = model


def trained(model: nn.Module) -> set[str]:
    return {
        name.replace("module.", "").replace("llava_model.", "")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, Outer, lambda m: Wrapper(Outer(m)), lambda m: [m]])
@pytest.mark.parametrize(
    "parts",
    [
        ("vision_model", "vision_projection", "language_model"),
        ("vision_model", "language_model"),
        ("language_model",),
        ("vision_model",),
    ],
)
def test_parts_of_megatron_in_any_wrapper_or_missing(parts: tuple[str, ...], wrap: Callable[[Any], Any]) -> None:
    inner = Megatron(*parts)
    model = VLMLoRA(FUSED, dim=2, freeze_vision_model=False)(wrap(inner))
    found = trained(model[0] if isinstance(model, list) else model)
    assert found, "something trains"
    for part in parts:
        own = {name.removeprefix(f"{part}.") for name in found if name.startswith(f"{part}.")}
        if part == "vision_model":
            assert own == {f"linear_fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
        else:
            assert own == {f"linear_fc{i}.adapter.linear_{kind}.weight" for i in (1, 2) for kind in ("in", "out")}
    assert {name for name in found if name.startswith("other.")} == {
        f"other.linear_fc1.adapter.linear_{kind}.weight" for kind in ("in", "out")
    }


def test_all_chunks_are_seen() -> None:
    chunks = [Wrapper(Megatron("vision_model")), Megatron("language_model"), Megatron("language_model")]
    VLMLoRA(["linear_fc1"], dim=2, freeze_vision_model=False, freeze_language_model=False)(chunks)
    assert all(part.startswith(("vision_model.linear", "other.linear_fc1.adapter")) for part in trained(chunks[0]))
    for chunk in chunks[1:]:
        in_full = {f"language_model.linear_fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
        assert trained(chunk) == in_full | {f"other.linear_fc1.adapter.linear_{kind}.weight" for kind in ("in", "out")}


def test_freezing_alone_and_without_training() -> None:
    model = Megatron("vision_model", "language_model")
    lora = VLMLoRA(FUSED, dim=2, freeze_language_model=False)
    model.eval()
    lora.freeze_model(model)
    assert trained(model) == {f"language_model.linear_fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert model.training
    lora(model, training=False)
    assert not trained(model)
    assert not model.training
    assert isinstance(model.vision_model["linear_fc1"], AdaptedLayer)
    assert not isinstance(model.language_model["linear_fc1"], AdaptedLayer)


def test_a_target_in_a_part_that_trains_in_full_is_no_misspelling() -> None:
    model = VLMLoRA(["language_model.linear_fc1", "vision_model.linear_fc1"], dim=2, freeze_language_model=False)(
        Megatron("vision_model", "language_model")
    )
    assert not isinstance(model.language_model["linear_fc1"], AdaptedLayer)
    assert isinstance(model.vision_model["linear_fc1"], AdaptedLayer)
    with pytest.raises(TargetError, match="closest: 'linear_fc1'"):
        VLMLoRA(["linear_cf1"])(Megatron("vision_model"))


def test_transform_alone_knows_the_parts() -> None:
    lora = VLMLoRA(dim=2, freeze_language_model=False)
    layer = ColumnParallelLinear(4, 6)
    assert lora.transform(layer, "linear_fc1", "language_model.layers.0.mlp") is layer
    assert isinstance(lora.transform(layer, "linear_fc1", "vision_model.layers.0.mlp"), AdaptedLayer)


def test_models_without_such_parts_and_flags_that_are_none_are_refused() -> None:
    model = nn.ModuleDict({"linear_fc1": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)})
    for call in (VLMLoRA(dim=2), VLMLoRA(dim=2).freeze_model):
        with pytest.raises(ModelError, match="none of the parts of a vision-language model"):
            call(model)
    assert all(p.requires_grad for p in model.parameters())
    assert isinstance(model["linear_fc1"], nn.Linear)
    with pytest.raises(ConfigError, match="freeze_language_model='no'"):
        VLMLoRA(freeze_language_model="no")(Megatron("language_model"))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1", "vision_model"),
        ("visual.blocks.0.attn.qkv", "vision_model"),
        ("model.visual.deepstack_merger_list.0.linear_fc1", "vision_projection"),
        ("model.multi_modal_projector.mm_input_projection_weight", "vision_projection"),
        ("model.connector.modality_projection.proj", "vision_projection"),
        ("model.text_model.layers.0.mlp.up_proj", "language_model"),
        ("language_model.output_layer", "language_model"),
        ("lm_head.weight", "language_model"),
        ("language_model.layers.0.connector", "language_model"),
        ("model.image_newline", None),
        ("merger.mlp", None),
    ],
)
def test_names_of_parts(name: str, part: str | None) -> None:
    assert part_of(name) == part


def on_ranks() -> set[str]:
    """The first rank has the vision model, the other one something that is none of the parts."""
    import torch.distributed as dist

    first = dist.get_rank() == 0
    model = Megatron("vision_model") if first else nn.ModuleDict({"linear_fc1": ColumnParallelLinear(4, 4)})
    VLMLoRA(["linear_fc1"], dim=2, freeze_vision_model=False)(model)
    return trained(model)


def test_ranks_with_different_parts(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(on_ranks)
    assert "vision_model.linear_fc1.weight" in first
    assert second == {f"linear_fc1.adapter.linear_{kind}.weight" for kind in ("in", "out")}
