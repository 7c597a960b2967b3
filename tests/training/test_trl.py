"""TRL's SFTTrainer on our models: the same losses as with PEFT's, checkpoints of the adapter, resumed runs."""

from __future__ import annotations

import contextlib
import io
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from smartinit.adapters import AdapterCheckpoints
from smartinit.methods import available_methods

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

if TYPE_CHECKING:
    from pathlib import Path

# A few hundred make a real run of it (minutes).
STEPS = int(os.environ.get("SMARTINIT_TRAINING_STEPS", "4"))
HALF = STEPS // 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]


class AdapterSFTTrainer(AdapterCheckpoints, trl.SFTTrainer):
    """TRL's trainer as a user makes it."""


def fine_tune(
    lab: Any, model: torch.nn.Module, folder: Path, *, trainer: type = AdapterSFTTrainer, resume: Path | None = None,
    **changes: object,
) -> Any:  # fmt: skip
    """Train on prompts and completions, which TRL tokenises and masks itself."""
    options = {"max_steps": STEPS, "max_length": 32, "packing": False} | changes
    with contextlib.redirect_stdout(io.StringIO()):
        running = trainer(
            model=model,
            args=lab.arguments(trl.SFTConfig, folder, **options),
            train_dataset=lab.rows.select(range(24)),
            processing_class=lab.tokenizer,
        )
        running.remove_callback(transformers.trainer_callback.PrinterCallback)
        running.train(resume_from_checkpoint=None if resume is None else str(resume))
    return lab.losses(running)


@pytest.mark.parametrize("method", available_methods())
def test_every_method_trains_as_in_peft_and_resumes(lab, starts, method, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": HALF}
    model, reference = lab.ours(starts[method]), lab.theirs(starts[method])
    losses = fine_tune(lab, model, tmp_path / "run", **saving)
    assert losses == pytest.approx(fine_tune(lab, reference, tmp_path / "peft", trainer=trl.SFTTrainer), rel=1e-5)
    assert len(losses) == STEPS

    checkpoint = tmp_path / "run" / f"checkpoint-{HALF}"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    again = lab.ours(starts[method])
    assert fine_tune(lab, again, tmp_path / "again", resume=checkpoint) == losses
    wanted = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = dict(again.named_parameters())
    assert [name for name, value in wanted.items() if not torch.equal(value, found[name])] == []


@pytest.mark.parametrize(
    "options", [{"packing": True, "max_length": 24}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}],
    ids="-".join,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Padding-free training is enabled:UserWarning")
def test_options_do_what_they_do_with_peft(lab, starts, options, tmp_path):
    runs = [
        fine_tune(lab, model, tmp_path / name, trainer=trl.SFTTrainer, max_steps=2, **options)
        for name, model in (("ours", lab.ours(starts["pissa"])), ("theirs", lab.theirs(starts["pissa"])))
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
