"""Folders that real PEFT has written for real models, as Megatron's and back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from smartinit.errors import ArtefactError, ConfigError, MissingFileError, ModelError, OutputError, VerificationError
from smartinit.export import export_adapter
from smartinit.formats.megatron_folder import ShardedFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
    "max_position_embeddings": 32,
}


class Family(NamedTuple):
    """A small model of a family, and what of it gets adapters."""

    model: str
    config: str
    options: dict[str, Any]
    targets: list[str] | str = DENSE
    parameters: list[str] | None = None
    prefix: str = "model."


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", SMALL),
    "llama, one head a group": Family("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 4}),
    "llama, one group": Family("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 1}),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", SMALL),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**SMALL, "head_dim": 8}),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**SMALL, "head_dim": 6}),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", {**SMALL, "head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", {**SMALL, "head_dim": 8}),
    "gemma3, seeing": Family(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**SMALL, "head_dim": 8, "vocab_size": 300},
            "vision_config": {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 299,
            "boi_token_index": 298,
            "eoi_token_index": 297,
        },
        rf".*language_model\.layers\.\d+\.\w+\.({'|'.join(DENSE)})",
        prefix="model.language_model.",
    ),
    "mixtral": Family(
        "MixtralForCausalLM", "MixtralConfig", {**SMALL, "num_local_experts": 4}, ATTENTION, [*EXPERTS, "gate.weight"]
    ),
    "qwen2 moe": Family(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**SMALL, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 9, "num_experts": 4},
        [*ATTENTION, "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"],
        EXPERTS,
    ),
}
MOE = ("mixtral", "qwen2 moe")


class Case:
    """A family's model, the folder of its configuration, and an adapter of random values saved by PEFT."""

    def __init__(self, family: Family, folder: Path, seed: int, *, shared: bool, **lora: Any) -> None:
        self.family, self.seed, self.adapter = family, seed, folder / "adapter"
        self.base = self.make()
        self.model_folder = folder / "model"
        self.base.config.save_pretrained(self.model_folder)
        options: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": family.targets, **lora}
        if family.parameters:
            options["target_parameters"] = family.parameters
        adapted = peft.get_peft_model(self.make(), peft.LoraConfig(**options)).double()
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(draw.abs() + 0.5 if "magnitude" in name else draw * 0.3)
            if shared:
                share_inputs(adapted)
        adapted.save_pretrained(self.adapter)
        self.logits = outputs(adapted)
        self.merged = adapted.merge_and_unload()

    def make(self) -> nn.Module:
        """The same model at every call, in float64."""
        torch.manual_seed(self.seed)
        config = getattr(transformers, self.family.config)(**self.family.options)
        model = getattr(transformers, self.family.model)(config).double().eval()
        if self.family.parameters:
            model.set_experts_implementation("eager")  # the others compute in float32 at most
        return model

    def loaded(self, folder: Path) -> nn.Module:
        """The base model with the adapter in a folder, in plain PEFT."""
        return peft.PeftModel.from_pretrained(self.make(), folder, autocast_adapter_dtype=False)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Heads, groups and the size of a head."""
        text = self.base.config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return text.num_attention_heads, text.num_key_value_heads, size


def share_inputs(adapted: nn.Module) -> None:
    """Give q, k and v one A, and gate and up."""
    parameters = dict(adapted.named_parameters())
    for name, parameter in parameters.items():
        for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            for other in others:
                if f".{first}.lora_A" in name:
                    parameters[name.replace(first, other)].copy_(parameter)


def outputs(model: nn.Module) -> torch.Tensor:
    """Logits of a few tokens."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(12).reshape(2, 6)).logits


@pytest.fixture
def case(tmp_path: Path, seed: int) -> Callable[..., Case]:
    """Make one."""
    return lambda family="llama", *, shared=True, **lora: Case(FAMILIES[family], tmp_path, seed, shared=shared, **lora)


def fused_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, groups: int, size: int) -> torch.Tensor:
    """Row by row, group by group."""
    rows = []
    for group in range(groups):
        for head in range(group * heads // groups, (group + 1) * heads // groups):
            rows += list(q[head * size : (head + 1) * size])
        rows += list(k[group * size : (group + 1) * size])
        rows += list(v[group * size : (group + 1) * size])
    return torch.stack(rows)


def fused_weights(model: nn.Module, heads: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Megatron's weights of a model, by the layers' names; of experts stacked."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        head = name.replace("model.language_model.", "language_model.decoder.").replace("model.", "decoder.", 1)
        if "language_model" in name:
            head = name.replace("model.language_model.", "language_model.decoder.")
        if "vision" in name:
            continue
        if name.endswith(".self_attn"):
            at = head.replace("self_attn", "self_attention")
            parts = (getattr(module, f"{part}_proj").weight for part in "qkv")
            found[f"{at}.linear_qkv"] = fused_rows(*parts, *heads)
            found[f"{at}.linear_proj"] = module.o_proj.weight
        elif hasattr(module, "gate_proj"):
            at = head.replace("shared_expert", "shared_experts")
            found[f"{at}.linear_fc1"] = torch.cat([module.gate_proj.weight, module.up_proj.weight])
            found[f"{at}.linear_fc2"] = module.down_proj.weight
        elif name.endswith(".experts"):
            found[f"{head}.linear_fc1"], found[f"{head}.linear_fc2"] = module.gate_up_proj, module.down_proj
        elif name.endswith("mlp.gate"):
            found[head.replace("mlp.gate", "mlp.router")] = module.weight
    return {name: weight.detach() for name, weight in found.items()}


def adapted_weight(folder: Path, layer: str, base: torch.Tensor) -> torch.Tensor:
    """``W + s·B A`` of one of Megatron's layers, by the folder's own words."""
    stored = ShardedFolder.open(folder)
    own = stored.config["layers"].get(layer, {})
    a, b = (stored.read(f"{layer}.adapter.linear_{side}.weight") for side in ("in", "out"))
    return base + own.get("alpha", stored.config["alpha"]) / a.shape[-2] * (b @ a)


@pytest.mark.parametrize("shared", [True, False], ids=["one A", "own A"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_weights_are_those_of_peft(
    case: Callable[..., Case], family: str, shared: bool, tmp_path: Path
) -> None:
    one = case(family, shared=shared)
    done = export_adapter(one.adapter, tmp_path / "megatron", model=one.model_folder, fuse="exact")
    base, merged = fused_weights(one.base, one.heads), fused_weights(one.merged, one.heads)
    stored = ShardedFolder.open(tmp_path / "megatron")
    adapted = {key.partition(".adapter.")[0] for key in stored.layouts}
    expected = {name for name in merged if not torch.equal(base[name], merged[name])}
    assert adapted == expected
    assert set(done.ranks) == expected
    for layer in expected:
        ours = adapted_weight(tmp_path / "megatron", layer, base[layer])
        assert torch.allclose(ours, merged[layer], rtol=0, atol=1e-12), layer
    assert {done.fused[layer] for layer in done.fused if "qkv" in layer} == {"equal" if shared else "exact"}


@pytest.mark.parametrize("fuse", ["exact", "canonical", "svd"])
@pytest.mark.parametrize("family", ["llama", "gemma3, seeing", *MOE])
def test_back_in_peft_it_computes_the_same(case: Callable[..., Case], family: str, fuse: str, tmp_path: Path) -> None:
    one = case(family, shared=False)
    rank = {"rank": 16} if fuse == "svd" else {}  # the model's width: nothing is cut off
    export_adapter(one.adapter, tmp_path / "megatron", model=one.model_folder, fuse=fuse, **rank)
    export_adapter(tmp_path / "megatron", tmp_path / "back", to="peft")
    assert torch.allclose(outputs(one.loaded(tmp_path / "back")), one.logits, rtol=0, atol=1e-10)
    assert not torch.allclose(outputs(one.make()), one.logits, atol=1e-3), "the adapter does something"


@pytest.mark.parametrize("family", FAMILIES)
def test_with_one_a_the_way_back_is_bitwise(case: Callable[..., Case], family: str, tmp_path: Path) -> None:
    one = case(family)
    export_adapter(one.adapter, tmp_path / "megatron", model=one.model_folder)
    export_adapter(tmp_path / "megatron", tmp_path / "back", to="peft")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (one.adapter, tmp_path / "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(outputs(one.loaded(tmp_path / "back")), outputs(one.loaded(one.adapter)))


@pytest.mark.parametrize("layout", ["grouped", "sequential"])
@pytest.mark.parametrize("family", MOE)
def test_experts_one_by_one_and_stacked(case: Callable[..., Case], family: str, layout: str, tmp_path: Path) -> None:
    one = case(family)
    export_adapter(one.adapter, tmp_path / "megatron", model=one.model_folder, experts=layout)
    keys = list(ShardedFolder.open(tmp_path / "megatron").layouts)
    assert any(".local_experts.3." in key for key in keys) == (layout == "sequential")
    export_adapter(tmp_path / "megatron", tmp_path / "back", to="peft")
    assert torch.allclose(outputs(one.loaded(tmp_path / "back")), one.logits, rtol=0, atol=1e-12)
    export_adapter(tmp_path / "megatron", tmp_path / "modules", to="peft", experts="modules")
    names = load_file(tmp_path / "modules" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight" in names
    export_adapter(tmp_path / "modules", tmp_path / "again", model=one.model_folder, experts=layout)
    first, second = (ShardedFolder.open(tmp_path / name) for name in ("megatron", "again"))
    for key in first.layouts:
        assert torch.equal(first.read(key), second.read(key)), key


def test_dora_there_and_back(case: Callable[..., Case], tmp_path: Path) -> None:
    one = case(use_dora=True, shared=False)
    export_adapter(one.adapter, tmp_path / "megatron", model=one.model_folder)
    stored = ShardedFolder.open(tmp_path / "megatron")
    assert stored.config["peft_type"] == "dora"
    layer = "decoder.layers.1.self_attention.linear_qkv"
    tensors = load_file(one.adapter / "adapter_model.safetensors")
    parts = (tensors[f"base_model.model.model.layers.1.self_attn.{part}_proj.lora_magnitude_vector"] for part in "qkv")
    assert torch.equal(stored.read(f"{layer}.adapter.weight_magnitude"), fused_rows(*parts, *one.heads))
    base, merged = fused_weights(one.base, one.heads), fused_weights(one.merged, one.heads)
    direction = adapted_weight(tmp_path / "megatron", layer, base[layer])
    magnitude = stored.read(f"{layer}.adapter.weight_magnitude")
    ours = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    assert torch.allclose(ours, merged[layer], rtol=0, atol=1e-12)
    export_adapter(tmp_path / "megatron", tmp_path / "back", to="peft")
    assert torch.allclose(outputs(one.loaded(tmp_path / "back")), one.logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rslora", [False, True])
def test_other_ranks_and_alphas_by_layer(case: Callable[..., Case], rslora: bool, tmp_path: Path) -> None:
    one = case(
        shared=False,
        use_rslora=rslora,
        rank_pattern={"layers.0.self_attn.q_proj": 1, "down_proj": 5},
        alpha_pattern={"layers.1.self_attn.v_proj": 9, "o_proj": 2},
    )
    export_adapter(one.adapter, tmp_path / "megatron", model=one.model_folder, fuse="exact", one_rank=True)
    assert ShardedFolder.open(tmp_path / "megatron").config["layers"] == {}
    export_adapter(tmp_path / "megatron", tmp_path / "back", to="peft")
    assert torch.allclose(outputs(one.loaded(tmp_path / "back")), one.logits, rtol=0, atol=1e-10)
    export_adapter(one.adapter, tmp_path / "canonical", model=one.model_folder)
    export_adapter(tmp_path / "canonical", tmp_path / "back", to="peft", force=True)
    assert torch.allclose(outputs(one.loaded(tmp_path / "back")), one.logits, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # they do
def test_patterns_know_parameters_by_their_names(case: Callable[..., Case], tmp_path: Path) -> None:
    one = case(
        "mixtral",
        rank_pattern={"mlp.experts.gate_up_proj": 2},
        alpha_pattern={"mlp.gate.weight": 10, "mlp.experts.down_proj": 3},
    )
    export_adapter(one.adapter, tmp_path / "megatron", model=one.model_folder)
    base, merged = fused_weights(one.base, one.heads), fused_weights(one.merged, one.heads)
    for layer in ("mlp.router", "mlp.experts.linear_fc1", "mlp.experts.linear_fc2"):
        name = f"decoder.layers.1.{layer}"
        assert torch.allclose(adapted_weight(tmp_path / "megatron", name, base[name]), merged[name], atol=1e-12), name
    export_adapter(tmp_path / "megatron", tmp_path / "back", to="peft")
    assert torch.allclose(outputs(one.loaded(tmp_path / "back")), one.logits, rtol=0, atol=1e-12)


def test_only_q_and_v(case: Callable[..., Case], tmp_path: Path) -> None:
    one = case(target_modules=["q_proj", "v_proj"], shared=False)
    done = export_adapter(one.adapter, tmp_path / "megatron", model=one.model_folder, fuse="exact")
    assert any("had no adapter" in note for note in done.notes)
    export_adapter(tmp_path / "megatron", tmp_path / "back", to="peft")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (one.adapter, tmp_path / "back"))
    assert set(before) == set(after)
    assert torch.allclose(outputs(one.loaded(tmp_path / "back")), one.logits, rtol=0, atol=1e-12)


def test_embeddings_and_head(case: Callable[..., Case], tmp_path: Path) -> None:
    one = case(target_modules=["embed_tokens", "lm_head"], shared=False)
    export_adapter(one.adapter, tmp_path / "megatron")
    keys = set(ShardedFolder.open(tmp_path / "megatron").layouts)
    assert {"embedding.word_embeddings.adapter.linear_in.weight", "output_layer.adapter.linear_out.weight"} <= keys
    export_adapter(tmp_path / "megatron", tmp_path / "back", to="peft")
    assert torch.allclose(outputs(one.loaded(tmp_path / "back")), one.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_what_megatrons_ranks_hold(case: Callable[..., Case], size: int, tmp_path: Path) -> None:
    one = case("llama, one head a group", r=4, target_modules=ATTENTION)
    export_adapter(one.adapter, tmp_path / "megatron", model=one.model_folder, tensor_parallel=size)
    whole = ShardedFolder.open(tmp_path / "megatron").read(
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight"
    )
    for rank in range(size):
        shard = load_file(tmp_path / "megatron" / f"shard-{rank:05d}-of-{size:05d}.safetensors")
        rows = shard["decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight"]
        assert torch.equal(rows, whole.chunk(size)[rank])
        assert len(shard["decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight"]) == 4 // size


def test_where_the_shape_comes_from(case: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one = case(target_modules=ATTENTION)

    def written(name: str, **options: Any) -> dict[str, torch.Tensor]:
        export_adapter(one.adapter, tmp_path / name, **options)
        stored = ShardedFolder.open(tmp_path / name)
        return {key: stored.read(key) for key in stored.layouts}

    from_model = written("from_model", model=one.model_folder)
    said = written("said", heads=4, groups=2, head_size=4)
    config = json.loads((one.adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(one.model_folder)
    (one.adapter / "adapter_config.json").write_text(json.dumps(config))
    named = written("named")
    for other in (said, named):
        assert all(torch.equal(from_model[key], other[key]) for key in from_model)
    config["base_model_name_or_path"] = "nobody/nothing"
    (one.adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="name the model's folder as model"):
        written("nowhere")
    with pytest.raises(MissingFileError, match="'nobody/nothing' is neither a model folder nor"):
        written("nowhere", model="nobody/nothing")
    with pytest.raises(ArtefactError, match="the adapter is for another model"):
        written("nowhere", heads=2, head_size=3)
    with pytest.raises(ConfigError, match="describe the attention together"):
        written("nowhere", groups=2)
    (one.model_folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        written("nowhere", model=one.model_folder)
    (one.model_folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        written("nowhere", model=one.model_folder)
    assert not (tmp_path / "nowhere").exists()


def test_numbers_that_a_family_leaves_to_its_class(case: Callable[..., Case], tmp_path: Path) -> None:
    """Published folders leave out what the class has as a default: Mistral has 8 groups, not as many as heads."""
    from smartinit.model_shape import decoder_shape

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "num_attention_heads": 32}))
    heads = decoder_shape(tmp_path).heads
    assert heads is not None
    assert (heads.heads, heads.groups, heads.size) == (32, 8, 128)


def test_bad_input_is_one_sentence(case: Callable[..., Case], tmp_path: Path) -> None:
    one = case(target_modules=ATTENTION)
    out, model = tmp_path / "out", one.model_folder
    export_adapter(one.adapter, tmp_path / "megatron", model=model)
    for words, error, adapter, options in [
        ("to='nemo' is not known", ConfigError, one.adapter, {"to": "nemo"}),
        ("is in this format already", ConfigError, one.adapter, {"to": "peft"}),
        ("is in this format already", ConfigError, tmp_path / "megatron", {}),
        ("there is no folder", MissingFileError, tmp_path / "nowhere", {}),
        ("there is no folder", MissingFileError, tmp_path / "nowhere", {"to": "peft"}),
        ("fuse='best'", ConfigError, one.adapter, {"fuse": "best", "model": model}),
        ("experts='modules' is not known", ConfigError, one.adapter, {"experts": "modules", "model": model}),
        ("experts='grouped' is not known", ConfigError, tmp_path / "megatron", {"experts": "grouped", "to": "peft"}),
        ("are about Megatron's layers", ConfigError, tmp_path / "megatron", {"rank": 2, "to": "peft"}),
        ("tensor_parallel=0", ConfigError, one.adapter, {"tensor_parallel": 0, "model": model}),
        ("2 query groups cannot be shared evenly", ConfigError, one.adapter, {"tensor_parallel": 4, "model": model}),
        ("rank 3 of most layers cannot be shared", ConfigError, one.adapter, {"tensor_parallel": 2, "model": model}),
        ("expert_count=0", ConfigError, one.adapter, {"expert_count": 0, "model": model}),
        ("4 heads in 3 query groups", ConfigError, one.adapter, {"heads": 4, "groups": 3, "head_size": 3}),
    ]:
        with pytest.raises(error, match=words):
            export_adapter(adapter, out, **options)
        assert not out.exists()
    with pytest.raises(OutputError, match="exists already"):
        export_adapter(one.adapter, tmp_path / "megatron", model=model)
    export_adapter(one.adapter, tmp_path / "megatron", model=model, force=True, tensor_parallel=2, one_rank=True)
    with pytest.raises(OutputError, match="holds other files"):
        export_adapter(one.adapter, model, model=model, force=True)


@pytest.mark.parametrize("to", ["megatron", "peft"])
def test_what_is_read_is_not_written_over(case: Callable[..., Case], tmp_path: Path, to: str) -> None:
    one = case(target_modules=ATTENTION)
    folder = one.adapter
    if to == "peft":
        folder = tmp_path / "outer" / "megatron"
        export_adapter(one.adapter, folder, model=one.model_folder)
    (tmp_path / "link").symlink_to(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for out in (folder, folder / "in", folder.parent, tmp_path / "link"):
        with pytest.raises(OutputError, match="are one folder, or one lies in the other; name another one"):
            export_adapter(folder, out, to=to, model=one.model_folder, force=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_nothing_is_dropped_silently(case: Callable[..., Case], tmp_path: Path) -> None:
    one = case(target_modules=["q_proj"], shared=False, modules_to_save=["lm_head"])
    with pytest.raises(ArtefactError, match=r"holds 'base_model\.model\.lm_head\.weight', which is no matrix of LoRA"):
        export_adapter(one.adapter, tmp_path / "out", model=one.model_folder)
    tensors = load_file(one.adapter / "adapter_model.safetensors")
    kept = {key.replace("q_proj", "qkv_proj"): tensor for key, tensor in tensors.items() if "lora" in key}
    save_file(kept, one.adapter / "adapter_model.safetensors")
    with pytest.raises(ArtefactError, match=r"'model.layers.0.self_attn.qkv_proj' has no known name in Megatron"):
        export_adapter(one.adapter, tmp_path / "out", model=one.model_folder)


def test_nan_is_not_written(case: Callable[..., Case], tmp_path: Path) -> None:
    one = case(target_modules=ATTENTION)
    tensors = load_file(one.adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, one.adapter / "adapter_model.safetensors")
    with pytest.raises(VerificationError, match="holds NaN or Inf"):
        export_adapter(one.adapter, tmp_path / "out", model=one.model_folder, fuse="canonical")
    assert not (tmp_path / "out").exists()
