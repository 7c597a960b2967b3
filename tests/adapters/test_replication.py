"""Blocks used several times, each with adapters of its own, against PEFT's."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from smartinit import LoraConfig, LoraModel
from smartinit.adapters.replication import replicate_layers
from smartinit.errors import ArtefactError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import TinyLlama

SPANS = [(0, 2), (1, 3)]
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _seeded(LlamaForCausalLM, LlamaConfig(**SIZES, intermediate_size=24, pad_token_id=0, eos_token_id=2))


def qwen3() -> nn.Module:
    """Its configuration has a kind of attention for every layer, which its forward pass reads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    own = {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0, "eos_token_id": 2}
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return _seeded(Qwen3ForCausalLM, Qwen3Config(**SIZES, **own, **sliding))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return _seeded(BertForSequenceClassification, BertConfig(**SIZES, intermediate_size=24, pad_token_id=0))


def falcon() -> nn.Module:
    from transformers import FalconConfig, FalconModel

    return _seeded(FalconModel, FalconConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32}
    return _seeded(GPT2LMHeadModel, GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def _seeded(kind: Callable[[Any], nn.Module], config: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


# Linear layers to adapt, and where the blocks are.
MODELS = {
    "llama": (llama, ["q_proj", "down_proj"], "model.layers"),
    "qwen3": (qwen3, ["v_proj"], "model.layers"),
    "bert": (bert, ["query"], "bert.encoder.layer"),
    "falcon": (falcon, ["query_key_value"], "h"),
    "gpt2": (gpt2, ["c_attn"], "transformer.h"),
}
# PEFT 0.21.2 does not look into `transformer`, and leaves `layer_types` as they are.
IN_PEFT = ["llama", "bert", "falcon"]


def options_of(name: str) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 6, "target_modules": MODELS[name][1], "layer_replication": SPANS}


def by_hand(name: str) -> nn.Module:
    """The same model built deep, with the weights of the blocks copied."""
    make, _, path = MODELS[name]
    shallow = make()
    config = copy.deepcopy(shallow.config)
    config.num_hidden_layers = 4
    if hasattr(config, "layer_types"):
        config.layer_types = [config.layer_types[index] for index in (0, 1, 1, 2)]
    deep = type(shallow)(config).eval()
    state = {key: value for key, value in shallow.state_dict().items() if not key.startswith(path)}
    for place, index in enumerate((0, 1, 1, 2)):
        block = shallow.get_submodule(f"{path}.{index}")
        state |= {f"{path}.{place}.{key}": value for key, value in block.state_dict().items()}
    deep.load_state_dict(state)
    return deep


def first_output(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens)[0]


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_deep_model_without_its_memory(name: str, tokens: torch.Tensor) -> None:
    make, _, path = MODELS[name]
    model = make()
    blocks, output = model.get_submodule(path), first_output(model, tokens)
    said = model.config.to_dict()
    parameters, state = list(model.parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    undo = replicate_layers(model, SPANS)
    assert len(model.get_submodule(path)) == 4
    assert model.config.num_hidden_layers == 4
    assert {id(parameter) for parameter in model.parameters()} == {id(parameter) for parameter in parameters}
    one, two = (model.get_submodule(f"{path}.{place}").state_dict() for place in (1, 2))
    assert all(one[key].data_ptr() == two[key].data_ptr() for key in one)
    modules = list(model.get_submodule(path).modules())
    assert len({id(module) for module in modules}) == len(modules)
    deep = by_hand(name)
    assert torch.equal(first_output(model, tokens), first_output(deep, tokens))
    assert not torch.equal(first_output(model, tokens), output)
    numbers = [
        [module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")]
        for block in model.get_submodule(path)
    ]
    assert all(set(found) <= {place} for place, found in enumerate(numbers))

    undo()
    assert model.get_submodule(path) is blocks
    assert model.config.to_dict() == said
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(first_output(model, tokens), output)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_generation_uses_a_cache_of_all_places(name: str, tokens: torch.Tensor) -> None:
    model = MODELS[name][0]()
    replicate_layers(model, SPANS)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    cached = model.generate(tokens, use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
    assert torch.equal(cached, by_hand(name).generate(tokens, **options))


def test_blocks_share_the_models_configuration() -> None:
    model = llama()
    replicate_layers(model, SPANS)
    assert all(block.self_attn.config is model.config for block in model.model.layers)


@pytest.mark.parametrize("name", IN_PEFT)
def test_outputs_gradients_and_keys_are_pefts(
    name: str, tokens: torch.Tensor, randomise: Callable[[nn.Module], None]
) -> None:
    peft = pytest.importorskip("peft")
    make = MODELS[name][0]
    ours = LoraModel(make(), LoraConfig(**options_of(name)))
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**options_of(name)))
    found: list[dict[str, torch.Tensor]] = []
    for model in (ours, theirs):
        randomise(model)
        output = first_output(model, tokens)
        output.backward(torch.linspace(-1, 1, output.numel()).reshape(output.shape))
        named = model.named_parameters()
        found.append({key.removeprefix("base_model."): p.grad for key, p in named if p.grad is not None})
    assert ours.state_dict().keys() == {key.removeprefix("base_model.") for key in theirs.state_dict()}
    torch.testing.assert_close(first_output(ours, tokens), first_output(theirs, tokens), rtol=1e-6, atol=1e-6)
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[1].items():
        torch.testing.assert_close(found[0][key], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    assert len(found[0]) == 2 * 4 * len(MODELS[name][1])  # A and B at four places


@pytest.mark.parametrize("name", IN_PEFT)
def test_folders_load_in_each_other(
    name: str, tokens: torch.Tensor, tmp_path: Path, randomise: Callable[[nn.Module], None]
) -> None:
    peft = pytest.importorskip("peft")
    make = MODELS[name][0]
    ours = LoraModel(make(), LoraConfig(**options_of(name)))
    randomise(ours)
    ours.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(first_output(loaded, tokens), first_output(ours, tokens), rtol=1e-6, atol=1e-6)

    theirs = peft.get_peft_model(make(), peft.LoraConfig(**options_of(name)))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    back = LoraModel.from_pretrained(make(), tmp_path / "theirs")
    torch.testing.assert_close(first_output(back, tokens), first_output(theirs, tokens), rtol=1e-6, atol=1e-6)
    one, two = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert one.keys() == two.keys()


def test_unload_gives_the_original_model_back(tokens: torch.Tensor, randomise: Callable[[nn.Module], None]) -> None:
    base = llama()
    blocks, output, said = base.model.layers, first_output(base, tokens), base.config.to_dict()
    model = LoraModel(base, LoraConfig(**options_of("llama")))
    randomise(model)
    assert not torch.equal(first_output(model, tokens), output)
    twin = copy.deepcopy(model)
    assert model.train().unload() is base
    assert base.model.layers is blocks
    assert all(module.training for module in base.modules())
    assert base.config.to_dict() == said
    assert torch.equal(first_output(base.eval(), tokens), output)
    assert all(parameter.requires_grad for parameter in base.parameters())

    assert len(twin.model.model.layers) == 4
    alone = twin.unload()
    assert len(alone.model.layers) == 3
    assert alone.model.layers is not blocks
    assert torch.equal(first_output(alone, tokens), output)


def test_further_adapters_join_and_are_saved_with_it(
    tokens: torch.Tensor, tmp_path: Path, randomise: Callable[[nn.Module], None]
) -> None:
    model = LoraModel(llama(), LoraConfig(**options_of("llama")))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["v_proj"]))
    model.add_adapter("same", LoraConfig(**options_of("llama") | {"layer_replication": [[0, 2], [1, 3]]}))
    with pytest.raises(ConfigError, match=r"layer_replication=\[\(0, 1\)\].*this model has \[\(0, 2\), \(1, 3\)\]"):
        model.add_adapter("other", LoraConfig(**options_of("llama") | {"layer_replication": [(0, 1)]}))
    randomise(model)
    model.set_adapter("plain")
    model.save_pretrained(tmp_path)
    alone = LoraModel.from_pretrained(llama(), tmp_path / "plain")
    assert torch.equal(first_output(alone, tokens), first_output(model, tokens))
    again = LoraModel(llama(), LoraConfig(**options_of("llama")))
    again.load_adapter(tmp_path / "plain", "plain")
    again.set_adapter("plain")
    assert torch.equal(first_output(again, tokens), first_output(model, tokens))


def test_a_folder_for_a_deeper_model_leaves_the_model_as_it_was(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    LoraModel(llama(), LoraConfig(**options_of("llama"))).save_pretrained(tmp_path)
    base = tiny_llama(num_hidden_layers=3)
    blocks = base.model.layers
    with pytest.raises(ArtefactError):
        LoraModel.from_pretrained(base, tmp_path)
    assert base.model.layers is blocks
    assert base.config.num_hidden_layers == 3
    shallow = tiny_llama()
    with pytest.raises(ConfigError, match="2 blocks"):
        LoraModel.from_pretrained(shallow, tmp_path)
    assert len(shallow.model.layers) == 2


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([(0, 4)], r"\(0, 4\) is no span.*3 blocks, which are numbered 0 to 2"),
        ([(1, 1)], r"\(1, 1\) is no span"),
        ([(0, 2), (-1, 2)], r"\(-1, 2\) is no span"),
        ([(0, 1, 2)], r"\(0, 1, 2\) is no span"),
        ([2], "2 is no span"),
    ],
)
def test_spans_that_cannot_be(spans: Any, said: str) -> None:
    model = llama()
    blocks, config = model.model.layers, model.config.to_dict()
    with pytest.raises(ConfigError, match=said):
        LoraModel(model, LoraConfig(target_modules=["q_proj"], layer_replication=spans))
    assert model.model.layers is blocks
    assert model.config.to_dict() == config


def test_an_error_after_the_replication_undoes_it() -> None:
    model = llama()
    blocks, config = model.model.layers, model.config.to_dict()
    with pytest.raises(ConfigError, match="nothing_like_it"):
        LoraModel(model, LoraConfig(target_modules=["nothing_like_it"], layer_replication=SPANS))
    assert model.model.layers is blocks
    assert model.config.to_dict() == config


def test_models_without_a_list_of_blocks_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"no list of blocks was found in a Linear; looked for 'layers', 'encoder\.layer"
    ):
        replicate_layers(nn.Linear(2, 2), SPANS)


def test_merging_gives_every_place_its_own_weight(tokens: torch.Tensor, randomise: Callable[[nn.Module], None]) -> None:
    model = LoraModel(llama(), LoraConfig(**options_of("llama")))
    randomise(model)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, first_output(model, tokens)
    with pytest.warns(UserWarning, match="share a weight"):
        model.merge_adapter()
    torch.testing.assert_close(first_output(model, tokens), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    one, two = (model.model.model.layers[place].self_attn.q_proj.weight for place in (1, 2))
    assert one is two
    with pytest.warns(UserWarning, match="share a weight"):
        merged = model.merge_and_unload()
    assert len(merged.model.layers) == 4
    torch.testing.assert_close(first_output(merged, tokens), expected, rtol=1e-4, atol=1e-5)
