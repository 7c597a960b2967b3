"""The demo model, its rows, a start of every method from one pass, and short training runs of ours and of PEFT's."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from datasets import Dataset, disable_progress_bars, enable_progress_bars

import smartinit as si
from smartinit.adapters import AdapterCheckpoints
from smartinit.demo import data_file
from smartinit.methods import available_methods

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

SEED = int(os.environ.get("SMARTINIT_TEST_SEED", "0"))
TARGETS = ["q_proj", "v_proj", "down_proj"]
LENGTH = 24
RATE = 3e-3


class AdapterTrainer(AdapterCheckpoints, transformers.Trainer):
    """A trainer as a user makes it."""


@dataclass
class Run:
    """What came of a training run."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    trainer: Any = None


class Lab:
    """Makes models and trains them."""

    def __init__(self, model_folder: Path) -> None:
        self.folder = model_folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
        self.rows = Dataset.from_json(str(data_file("train"))).select(range(128))
        self.dataset = self.rows.map(self._tokenised)

    def _tokenised(self, row: dict[str, str]) -> dict[str, list[int]]:
        text = f"{row['prompt']} {row['completion']}"
        found = self.tokenizer(text, truncation=True, max_length=LENGTH, padding="max_length")
        pairs = zip(found["input_ids"], found["attention_mask"], strict=True)
        return {**found, "labels": [token if kept else -100 for token, kept in pairs]}

    def base(self, **changes: object) -> nn.Module:
        """The demo model as it is stored, in eval mode."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, **changes)

    def batches(self, count: int = 6, size: int = 8) -> list[dict[str, torch.Tensor]]:
        """Batches without padding in them beyond what the rows have."""
        columns = self.dataset.select_columns(["input_ids", "attention_mask", "labels"]).with_format("torch")
        return [columns[i * size : (i + 1) * size] for i in range(count)]

    def config(self, **options: object) -> si.LoraConfig:
        return si.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options))

    def ours(self, artefact: si.Artefact | None = None, base: str = "residual", **options: object) -> si.LoraModel:
        """The demo model with adapters, started by the artefact if there is one."""
        torch.manual_seed(SEED)
        model = si.LoraModel(self.base(), self.config(**options))
        return model if artefact is None else artefact.apply(model, base=base)

    def theirs(self, artefact: si.Artefact | None = None, **options: object) -> nn.Module:
        """The same in PEFT."""
        import peft

        torch.manual_seed(SEED)
        config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options))
        model = peft.get_peft_model(self.base(), config)
        return model if artefact is None else artefact.apply(model)

    def arguments(self, kind: type, folder: Path, **changes: object) -> transformers.TrainingArguments:
        """Small steps, every loss logged, nothing sent anywhere."""
        options = {
            "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": RATE,
            "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True,
            "seed": SEED, "bf16": False, "dataloader_pin_memory": False,
        }  # fmt: skip
        return kind(**(options | changes))

    def train(
        self, model: nn.Module, folder: Path, *, resume: Path | None = None, trainer: type | None = None, **changes: Any
    ) -> Run:
        """Train with transformers' Trainer; columns that the model does not take stay in the data."""
        more = {name: changes.pop(name) for name in ("eval_dataset",) if name in changes}
        running = (trainer or AdapterTrainer)(
            model=model,
            args=self.arguments(transformers.TrainingArguments, folder, **changes),
            train_dataset=self.dataset,
            **more,
        )
        running.remove_callback(transformers.trainer_callback.PrinterCallback)
        running.train(resume_from_checkpoint=None if resume is None else str(resume))
        return Run(model, self.losses(running), running)

    @staticmethod
    def losses(trainer: Any) -> list[float]:
        """The logged losses of all steps, those before a resumed checkpoint included."""
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    @torch.no_grad()
    def logits(self, model: nn.Module) -> torch.Tensor:
        """Of rows that were trained on."""
        model.eval()
        batch = self.batches(1)[0]
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.fixture(scope="session")
def lab(demo_model_folder: Path) -> Iterator[Lab]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    yield Lab(demo_model_folder)
    enable_progress_bars()
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="session")
def starts(lab: Lab) -> dict[str, si.Artefact]:
    """Method -> its start of the demo model, all from one pass over a few batches."""
    names = [name for name, method in available_methods().items() if not inspect.isabstract(method)]
    found = si.compute_many(
        lab.base(), [(lab.config(), name) for name in names], lab.batches(), show_progress_bar=False
    )
    return dict(zip(names, found, strict=True))


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    """Trainers seed the global generators."""
    with torch.random.fork_rng(devices=[]):
        yield
