"""transformers' Trainer on our models: the same losses as with PEFT's, checkpoints, resumed runs, conversion."""

from __future__ import annotations

import copy
import inspect
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

import smartinit as si
from smartinit.adapters.checkpoints import restore_adapters
from smartinit.errors import ArtefactError, ConfigError, MissingFileError
from smartinit.methods import available_methods

peft = pytest.importorskip("peft")

if TYPE_CHECKING:
    from collections.abc import Callable

METHODS = list(available_methods())
# A few hundred make a real run of it (minutes).
STEPS = int(os.environ.get("SMARTINIT_TRAINING_STEPS", "8"))
HALF = STEPS // 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights"),
    # the name that all versions of transformers 5 know
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    found, wanted = trained(ours), trained(theirs)
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(value, found[name])] == []


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, share: float = 2e-5) -> None:
    """Equal relative to the largest value."""
    assert float((ours - theirs).abs().max()) <= share * float(theirs.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_as_in_peft_resumes_and_converts(lab, starts, method, tmp_path):
    artefact = starts[method]
    steps: dict[str, Any] = {"max_steps": STEPS}
    run = lab.train(lab.ours(artefact), tmp_path / "run", save_strategy="steps", save_steps=HALF, **steps)
    reference = lab.train(lab.theirs(artefact), tmp_path / "peft", trainer=transformers.Trainer, **steps)
    assert len(run.losses) == STEPS
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
    assert min(run.losses[HALF:]) < run.losses[0]

    checkpoint = tmp_path / "run" / f"checkpoint-{HALF}"
    resumed = lab.train(lab.ours(artefact), tmp_path / "again", resume=checkpoint, **steps)
    assert resumed.losses == run.losses
    assert_same_weights(resumed.model, run.model)

    artefact.save(tmp_path / "start")
    effect = available_methods()[method].effect
    if effect == "quantises":
        with pytest.raises(ConfigError, match="quantise"):
            run.model.save_pretrained(
                tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
            )
        return
    converts = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")} if effect == "splits" else {}
    run.model.save_pretrained(tmp_path / "plain", **converts)
    plain = peft.PeftModel.from_pretrained(lab.base(), tmp_path / "plain")
    assert_close(lab.logits(plain), lab.logits(run.model))


def test_an_offset_trains_as_a_residual_does_and_resumes(lab, starts, tmp_path):
    run = lab.train(lab.ours(starts["pissa"], "offset"), tmp_path / "run", save_strategy="steps", save_steps=4)
    residual = lab.train(lab.ours(starts["pissa"]), tmp_path / "residual")
    assert run.losses == pytest.approx(residual.losses, rel=1e-4)

    checkpoint = tmp_path / "run" / "checkpoint-4"
    resumed = lab.train(lab.ours(starts["pissa"], "offset"), tmp_path / "again", resume=checkpoint)
    assert resumed.losses == run.losses
    assert_same_weights(resumed.model, run.model)
    # a checkpoint is of use by itself: plain LoRA for the base as it is
    loaded = peft.PeftModel.from_pretrained(lab.base(), checkpoint)
    restored = lab.ours(starts["pissa"], "offset")
    restore_adapters(restored, checkpoint)
    assert_close(lab.logits(loaded), lab.logits(restored))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"max_grad_norm": 0.01, "optim": "sgd"},
    ],
    ids="-".join,
)
@pytest.mark.filterwarnings("ignore:.*neftune.*")
def test_options_of_the_trainer_do_what_they_do_with_peft(lab, starts, options, tmp_path):
    runs = [
        lab.train(model, tmp_path / name, trainer=transformers.Trainer, max_steps=4, **options)
        for name, model in (("ours", lab.ours(starts["eva"])), ("theirs", lab.theirs(starts["eva"])))
    ]
    plain = lab.train(lab.ours(starts["eva"]), tmp_path / "plain", max_steps=4)
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
    if "gradient_checkpointing" in options:
        assert runs[0].losses == pytest.approx(plain.losses, rel=1e-5)
    else:
        assert runs[0].losses != pytest.approx(plain.losses, rel=1e-5)


def test_evaluation_and_the_best_checkpoint(lab, starts, tmp_path):
    """The largest loss is asked for: at the end the first checkpoint has to come back."""
    run = lab.train(
        lab.ours(starts["eva"]), tmp_path, max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
        eval_dataset=lab.dataset.select(range(64, 80)),
    )  # fmt: skip
    seen = [entry["eval_loss"] for entry in run.trainer.state.log_history if "eval_loss" in entry]
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 1.01 * seen[-1]
    assert run.trainer.evaluate()["eval_loss"] == pytest.approx(seen[0], rel=1e-6)


def test_a_checkpoint_holds_the_adapter_only_and_peft_loads_it(lab, starts, tmp_path):
    run = lab.train(lab.ours(starts["eva"]), tmp_path, save_strategy="steps", save_steps=8)
    checkpoint = tmp_path / "checkpoint-8"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json"} <= names
    assert "model.safetensors" not in names
    size = (checkpoint / "adapter_model.safetensors").stat().st_size
    assert size < 4.3 * sum(value.numel() for value in trained(run.model).values())
    assert_close(lab.logits(peft.PeftModel.from_pretrained(lab.base(), checkpoint)), lab.logits(run.model))


def test_the_trainer_as_it_is_saves_and_resumes_the_whole_model(lab, starts, tmp_path):
    """The demo model's embedding is its head: two names for one memory, which safetensors refuses."""
    plain: dict[str, Any] = {"trainer": transformers.Trainer}
    run = lab.train(lab.ours(starts["pissa"]), tmp_path / "run", save_strategy="steps", save_steps=4, **plain)
    assert (tmp_path / "run" / "checkpoint-4" / "model.safetensors").is_file()
    for kind in (plain, {}):  # with the mixin too: a run may be given it later
        resumed = lab.train(lab.ours(), tmp_path / "again", resume=tmp_path / "run" / "checkpoint-4", **kind)
        assert resumed.losses == run.losses
        assert_same_weights(resumed.model, run.model)


def test_peft_models_and_plain_models_pass_through_the_mixin(lab, starts, tmp_path):
    run = lab.train(lab.theirs(starts["eva"]), tmp_path / "peft", save_strategy="steps", save_steps=4)
    resumed = lab.train(lab.theirs(starts["eva"]), tmp_path / "x", resume=tmp_path / "peft" / "checkpoint-4")
    assert resumed.losses == run.losses
    lab.train(lab.base(), tmp_path / "full", save_strategy="steps", save_steps=1, max_steps=1)
    assert (tmp_path / "full" / "checkpoint-1" / "model.safetensors").is_file()


def test_two_adapters_are_both_in_a_checkpoint(lab, tmp_path):
    def two() -> si.LoraModel:
        model = lab.ours()
        torch.manual_seed(1)
        model.add_adapter("second", lab.config(r=2, target_modules=["o_proj"]))
        model.set_adapter(["default", "second"])
        return model

    run = lab.train(two(), tmp_path / "run", save_strategy="steps", save_steps=4)
    assert (tmp_path / "run" / "checkpoint-4" / "second" / "adapter_config.json").is_file()
    resumed = lab.train(two(), tmp_path / "again", resume=tmp_path / "run" / "checkpoint-4")
    assert resumed.losses == run.losses
    assert_same_weights(resumed.model, run.model)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["model.norm"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 6, 7]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
@pytest.mark.filterwarnings("ignore:.*(tied|lora_bias=True).*")
def test_whatever_an_adapter_trains_is_in_a_checkpoint(lab, options, tmp_path):
    run = lab.train(lab.ours(**options), tmp_path / "run", save_strategy="steps", save_steps=4)
    reference = lab.train(lab.theirs(**options), tmp_path / "peft", trainer=transformers.Trainer)
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
    resumed = lab.train(lab.ours(**options), tmp_path / "again", resume=tmp_path / "run" / "checkpoint-4")
    assert resumed.losses == run.losses
    assert_same_weights(resumed.model, run.model)


@pytest.mark.parametrize(
    ("kept", "resumed", "said"),
    [
        (("pissa", "residual"), (None, "residual"), "apply the same artefact"),
        ((None, "residual"), ("pissa", "residual"), "apply the same artefact"),
        (("pissa", "residual"), ("milora", "residual"), "apply the same artefact"),
        (("pissa", "offset"), ("milora", "offset"), "not trained from the start"),
        (("pissa", "residual"), ("pissa", "offset"), "apply the same artefact"),
    ],
)
def test_a_checkpoint_of_another_start_is_refused(lab, starts, kept, resumed, said, tmp_path):
    """PEFT goes on without a word, on a base that the adapter is not for."""
    method, base = kept
    lab.ours(starts.get(method), base).save_pretrained(tmp_path)
    method, base = resumed
    model = lab.ours(starts.get(method), base)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArtefactError, match=said):
        restore_adapters(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_another_scaling_is_refused(lab, tmp_path):
    lab.ours(lora_alpha=16).save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match=r"scaling 4 .* has 2;"):
        restore_adapters(lab.ours(), tmp_path)


@pytest.mark.parametrize(
    ("saved", "model"),
    [
        ({"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [7, 9]}),
        ({"bias": "all"}, {}),
        ({}, {"bias": "lora_only"}),
        ({"modules_to_save": ["lm_head"]}, {}),
        ({}, {"use_dora": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:bias=", "ignore:.*tied")
def test_a_checkpoint_that_trains_something_else_is_refused(lab, saved, model, tmp_path):
    lab.ours(**saved).save_pretrained(tmp_path)
    resumed = lab.ours(**model)
    before = {name: tensor.clone() for name, tensor in resumed.state_dict().items()}
    (option,) = {**saved, **model}
    with pytest.raises(ArtefactError, match=rf"{option}=.*configuration that the training began with"):
        restore_adapters(resumed, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in resumed.state_dict().items())


def test_nothing_is_restored_if_one_adapter_is_missing(lab, tmp_path):
    lab.ours(init_lora_weights=False).save_pretrained(tmp_path)
    resumed = lab.ours()
    resumed.add_adapter("second", si.LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: tensor.clone() for name, tensor in resumed.state_dict().items()}
    with pytest.raises(MissingFileError, match="second"):
        restore_adapters(resumed, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in resumed.state_dict().items())


def test_nothing_is_restored_if_the_second_adapter_does_not_fit(lab, tmp_path):
    saved, resumed = lab.ours(init_lora_weights=False), lab.ours()
    for model, target in ((saved, "v_proj"), (resumed, "q_proj")):
        model.add_adapter("second", si.LoraConfig(r=2, target_modules=[target]))
    saved.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in resumed.state_dict().items()}
    with pytest.raises(ArtefactError, match="second"):
        restore_adapters(resumed, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in resumed.state_dict().items())


def test_what_the_trainer_reads_off_the_model(lab):
    """Columns, loss normalisation and names of labels, by transformers' own questions."""
    base, model = lab.base(), lab.ours()
    shown = list(inspect.signature(model.forward).parameters)
    assert shown[:-2] == list(inspect.signature(base.forward).parameters)[:-1]
    assert shown[-2:] == ["adapter_names", "kwargs"]
    assert transformers.utils.generic.find_labels(type(model)) == ["labels"]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not lab.logits(twin).any()
    assert lab.logits(model).any(), "the copy's forward pass ran the original"


def test_the_state_dict_shares_no_memory_and_keeps_all_names(lab):
    model = lab.ours()
    state = model.state_dict()
    pointers = [value.untyped_storage().data_ptr() for value in state.values()]
    assert len(set(pointers)) == len(pointers)
    assert state.keys() == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert model.state_dict(keep_vars=True)["model.lm_head.weight"] is model.model.lm_head.weight


@pytest.mark.parametrize("when", ["before", "after", "before, by an older transformers"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_reach_adapters_through_checkpointed_blocks(
    lab, when: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
):
    base = lab.base().train()
    if "older" in when:  # it left this to PEFT
        monkeypatch.setattr(type(base), "enable_input_require_grads", lambda _: None)
    switch: Callable[..., None] = base.gradient_checkpointing_enable
    if when != "after":
        switch(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    monkeypatch.undo()
    torch.manual_seed(0)
    model = si.LoraModel(base, lab.config(init_lora_weights=False))
    if when == "after":
        monkeypatch.setattr(type(base), "main_input_name", "pixel_values")  # transformers then leaves it, too
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_activation_checkpointing
    batch = lab.batches(1)[0]
    model(**batch).loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model(**batch).loss.backward()
    wanted = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(value, found[name], rtol=1e-5, atol=1e-7) for name, value in wanted.items())


def test_a_quantised_base_may_be_trained_through_adapters(lab, monkeypatch):
    from transformers.trainer_utils import validate_quantization_for_training

    base = lab.base()
    monkeypatch.setattr(type(base), "is_quantized", True, raising=False)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(base)
    validate_quantization_for_training(si.LoraModel(base, lab.config()))


def test_the_model_is_shown_by_its_own_name(lab):
    assert repr(lab.ours()).startswith("LoraModel(\n  (model): LlamaForCausalLM(")
