"""A model of this package saves what computes the same on the base that it is for, and converts as PEFT does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import smartinit as si
from smartinit.adapters.conversion import doubled_config, subtract_mutated_init
from smartinit.convert import convert_adapter, residual_weights

sys.path.insert(0, str(Path(__file__).parents[1]))
from split_models import gpt2, llama, llama_embedding, split_start, train, vision

if TYPE_CHECKING:
    from collections.abc import Callable

    from split_models import Case

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights"),
]
CASES = [llama, llama_embedding, gpt2, vision]
FILE = "adapter_model.safetensors"


def wrapped(case: Case, artefact: si.Artefact, base: str) -> si.LoraModel:
    """A native model with the start applied."""
    config = si.LoraConfig(r=4, lora_alpha=6, target_modules=list(case.targets), use_rslora=artefact.config.use_rslora)
    return artefact.apply(si.LoraModel(case.make(), config), base=base)


def in_peft(case: Case, folder: Path) -> torch.Tensor:
    """Logits of plain PEFT on the base that nobody changed."""
    return case.outputs(peft.PeftModel.from_pretrained(case.make(), folder))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal relative to the largest value."""
    assert float((ours - theirs).abs().max()) <= 2e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_an_offset_is_saved_as_plain_lora_for_the_base(case: Callable[[], Case], rslora: bool, tmp_path: Path) -> None:
    """Its trained half alone would be for a residual base that does not exist."""
    one = case()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora), [4, 2])
    model = wrapped(one, artefact, "offset")
    train(one, model)
    model.save_pretrained(tmp_path / "saved")
    assert_close(in_peft(one, tmp_path / "saved"), one.outputs(model))
    assert_close(one.outputs(si.LoraModel.from_pretrained(one.make(), tmp_path / "saved")), one.outputs(model))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_residual_keeps_its_start_through_a_resumed_run(case: Callable[[], Case], tmp_path: Path) -> None:
    one = case()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4, 2])
    model = wrapped(one, artefact, "residual")
    train(one, model, steps=10)
    model.save_pretrained(tmp_path / "half")
    base = one.make()
    base.load_state_dict(residual_weights(base, artefact), strict=False)
    resumed = si.LoraModel.from_pretrained(base, tmp_path / "half", is_trainable=True)
    assert_close(one.outputs(resumed), one.outputs(model))
    train(one, resumed, steps=10)
    resumed.save_pretrained(tmp_path / "done")
    convert_adapter(tmp_path / "done", None, tmp_path / "plain")
    assert_close(in_peft(one, tmp_path / "plain"), one.outputs(resumed))


@pytest.mark.parametrize("base", ["residual", "offset"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_saving_with_the_path_of_the_start_converts(case: Callable[[], Case], base: str, tmp_path: Path) -> None:
    one = case()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4, 2])
    artefact.save(tmp_path / "start")
    model = wrapped(one, artefact, base)
    train(one, model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert_close(in_peft(one, tmp_path / "plain"), one.outputs(model))
    assert not (tmp_path / "plain" / "start").exists()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}}],
    ids=lambda options: ",".join(options) or "plain",
)
def test_in_memory_it_is_what_peft_makes(options: dict[str, Any], tmp_path: Path) -> None:
    one = llama()
    targets = ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights="pissa", **options)
    model = peft.get_peft_model(one.make(), config)
    model.save_pretrained(tmp_path / "start")
    train(one, model, steps=3)
    model.save_pretrained(tmp_path / "trained")
    trained, start = (load_file(tmp_path / name / FILE) for name in ("trained", "start"))
    ours = subtract_mutated_init(trained, start, si.LoraConfig.from_peft(config))
    model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    theirs = load_file(tmp_path / "theirs" / FILE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    said = peft.LoraConfig.from_pretrained(tmp_path / "theirs")
    described = doubled_config(si.LoraConfig.from_peft(config))
    assert (described.r, described.rank_pattern) == (said.r, said.rank_pattern)
    assert (described.lora_alpha, described.alpha_pattern) == (said.lora_alpha, said.alpha_pattern)


def test_the_model_subtracts_an_adapter_of_its_own(tmp_path: Path) -> None:
    one = vision()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4])
    artefact.save(tmp_path / "start")
    model = wrapped(one, artefact, "residual")
    model.load_adapter(tmp_path / "start", "initial")
    train(one, model, steps=3)
    model.save_pretrained(tmp_path / "trained")
    trained = load_file(tmp_path / "trained" / FILE)
    converted = model.subtract_mutated_init(trained, "initial")
    plain = peft.get_peft_model(
        one.make(), doubled_config(si.LoraConfig.from_any(model.peft_config["default"])).to_peft()
    )
    peft.set_peft_model_state_dict(plain, converted)
    assert_close(one.outputs(plain), one.outputs(model))
    with pytest.raises(si.errors.UnknownNameError, match="no adapter 'other'"):
        model.subtract_mutated_init(trained, "other")


def test_defect_26_in_memory_nothing_else_is_dropped() -> None:
    """PEFT keeps ``lora_A`` and ``lora_B`` only."""
    matrix = torch.ones(2, 3)
    trained = {
        "base_model.model.q.lora_A.weight": matrix,
        "base_model.model.q.lora_B.weight": matrix.T.clone(),
        "base_model.model.q.lora_B.bias": torch.ones(3),
        "base_model.model.q.lora_magnitude_vector": torch.ones(3),
        "base_model.model.q.base_layer.bias": torch.ones(3),
        "base_model.model.emb.lora_embedding_A": matrix,
        "base_model.model.emb.lora_embedding_B": matrix.T.clone(),
        "base_model.model.emb.base_layer.weight": torch.ones(3, 3),
        "base_model.model.head.weight": matrix,
        "base_model.model.emb.token_adapter.trainable_tokens_delta": matrix,
    }
    start = {key.removeprefix("base_model.model."): tensor * 2 for key, tensor in trained.items() if "lora_" in key}
    found = subtract_mutated_init(trained, start, si.LoraConfig())
    frozen = "base_model.model.emb.base_layer.weight"
    assert found.keys() == trained.keys() - {frozen}
    for layer, ends in (("q", ("lora_A.weight", "lora_B.weight")), ("emb", ("lora_embedding_A", "lora_embedding_B"))):
        a, b = (found[f"base_model.model.{layer}.{end}"] for end in ends)
        assert torch.equal(a, torch.cat([matrix, 2 * matrix]))
        assert torch.equal(b, torch.cat([matrix.T, -2 * matrix.T], dim=1))
    kept = [key for key in found if "lora_A" not in key and "lora_B.weight" not in key and "lora_embedding" not in key]
    assert len(kept) == 5
    assert all(torch.equal(found[key], trained[key]) for key in kept)


def test_in_memory_another_start_is_refused() -> None:
    trained = {"q.lora_A.weight": torch.ones(2, 3), "q.lora_B.weight": torch.ones(3, 2)}
    with pytest.raises(si.errors.ArtefactError, match=r"another adapter: 'q\.lora_A\.weight' is not in it"):
        subtract_mutated_init(trained, {}, si.LoraConfig())
    with pytest.raises(si.errors.ArtefactError, match=r"has shape \(2, 4\) there, \(2, 3\) now"):
        subtract_mutated_init(trained, {"q.lora_A.weight": torch.ones(2, 4)}, si.LoraConfig())
    with pytest.raises(si.errors.ConfigError, match="target_parameters"):
        subtract_mutated_init(trained, trained, si.LoraConfig(target_parameters=["experts.w"]))
