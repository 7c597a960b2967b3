from __future__ import annotations

import json

import pytest
import torch
import transformers

from smartinit.cli.load_model import (
    choose_device,
    find_model,
    load_model,
    load_tokenizer,
    load_weights,
    longest_input,
    meta_model,
)
from smartinit.errors import ConfigError, MissingFileError, ModelError


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_the_class_is_the_one_that_was_saved(saved_model, assets, capfd):
    model, tokenizer = load_model(str(saved_model))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert tokenizer("Paris")["input_ids"]
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", ""), "libraries must keep quiet"
    encoder = find_model(str(assets / "all-minilm-l6-v2"))
    assert (encoder.model_class.__name__, encoder.causal) == ("BertModel", False)
    assert find_model(str(saved_model)).causal


def test_progress_bars_and_log_level_are_put_back(saved_model):
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    load_model(str(saved_model))
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_dtypes(saved_model, assets):
    source = find_model(str(saved_model))
    assert load_weights(source).dtype == torch.float32
    assert load_weights(source, dtype="bfloat16").dtype == torch.bfloat16
    half = find_model(str(assets / "all-minilm-l6-v2"))
    assert load_weights(half, device="cpu").dtype == torch.float32, "float16 is no precision for a CPU"
    assert load_weights(half, dtype="float16", device="cpu").dtype == torch.float16


def test_devices():
    assert choose_device("auto").type in {"cpu", "cuda", "mps", "xpu"}
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "gpu", ""):
        with pytest.raises(ConfigError, match="is not here"):
            choose_device(name)


def test_the_meta_model_has_the_same_modules_and_no_memory(saved_model):
    source = find_model(str(saved_model), weights=False)
    model = meta_model(source)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert dict(model.named_modules()).keys() == dict(load_weights(source).named_modules()).keys()


def test_longest_input(saved_model, assets):
    source = find_model(str(saved_model))
    tokenizer = load_tokenizer(source)
    assert longest_input(source, tokenizer) == 64
    tokenizer.model_max_length = 20
    assert longest_input(source, tokenizer) == 20
    encoder = find_model(str(assets / "all-minilm-l6-v2"))
    assert longest_input(encoder, load_tokenizer(encoder)) <= 512


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(model_folder, edit_weights, value, dtype):
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)
        tensors[name][3, 5] = value

    edit_weights(model_folder, spoil)
    with pytest.raises(ModelError, match=rf"'{name}' holds NaN or Inf"):
        load_model(str(model_folder), device="cpu")


def test_missing_tensors_are_no_random_ones(model_folder, edit_weights):
    edit_weights(model_folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lack 1 tensors of LlamaForCausalLM.*layers\.1\.mlp\.up_proj"):
        load_model(str(model_folder))


def test_tensors_of_another_shape(model_folder):
    edit_config(model_folder, intermediate_size=64)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(model_folder))


def test_a_model_type_that_nobody_knows(model_folder):
    edit_config(model_folder, model_type="unheard_of")
    with pytest.raises(ModelError, match="cannot be loaded"):
        find_model(str(model_folder))


def test_remote_code_is_not_run(model_folder, tmp_path):
    trace = tmp_path / "ran"
    (model_folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass C: pass\n")
    edit_config(
        model_folder,
        model_type="unheard_of",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"},
    )
    with pytest.raises(ModelError):
        find_model(str(model_folder))
    assert not trace.exists()


def test_without_tokenizer(model_folder):
    for path in model_folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no readable tokenizer"):
        load_tokenizer(find_model(str(model_folder)))


def test_encoder_decoders_are_refused(model_folder):
    edit_config(model_folder, model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        find_model(str(model_folder))


def test_an_id_that_cannot_be_reached():
    with pytest.raises(MissingFileError, match="neither a folder here nor a model of the hub"):
        find_model("smartinit-no-such-user/no-such-model")


def test_architectures_that_are_no_models_fall_back(model_folder):
    edit_config(model_folder, architectures=["os"])
    assert find_model(str(model_folder)).model_class is transformers.AutoModel
