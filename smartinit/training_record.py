"""Which start a training run began from, written down by the run itself.

    trainer = Trainer(..., callbacks=[smartinit.InitRecorder("adapter/")])

The run's folder, every checkpoint and the log history then name the start by its digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import TrainerCallback

from smartinit import __version__
from smartinit.artefact import Artefact
from smartinit.errors import ArgumentError, NotStoredError, OutputError, SmartinitError
from smartinit.formats.files import write_file
from smartinit.formats.tensors import stored_tensors
from smartinit.store import Store
from smartinit.store.adapters import readable_folder
from smartinit.store.entry import read_blob
from smartinit.store.local import LocalStore
from smartinit.store.naming import SHORTEST, find_key
from smartinit.targets.tensor_digest import tensor_digest
from smartinit.targets.tree import adapter_layer, nodes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from smartinit.factors import Factors

RECORD_FILE = "smartinit_init.json"
"""Written into the run's folder and into each checkpoint."""
_LAYERS = 8
_WHOLE = 64  # letters of a key
_KEY = re.compile(rf"[0-9a-f]{{{SHORTEST},64}}")


class InitRecorder(TrainerCallback):
    """A callback of transformers' and TRL's trainers that records the start of the adapter in the run.

    When the training begins, ``smartinit_init.json`` is written into the output folder, the same values stand in
    ``trainer.state.log_history`` (and so in ``trainer_state.json``), and in the configuration of an active run of wandb
    and the tags of one of mlflow. Every checkpoint gets the file as well. A few layers are compared with the start: if
    the model begins elsewhere, which happens when a trainer makes an adapter of its own, that is a warning and stands
    in the record.

    Args:
        start: an adapter folder, an `Artefact`, or the key of one in a store (its first letters are enough).
        adapter_name: of the model's adapter that began there.
        store: where to look a key up; None: the default store.

    Raises:
        ArgumentError: nothing of these.
        MissingFileError, ArtefactError, VerificationError: see `Artefact.load`.
        NotStoredError: the store has no such artefact.
    """

    def __init__(
        self,
        start: Artefact | str | os.PathLike[str],
        *,
        adapter_name: str = "default",
        store: Store | str | os.PathLike[str] | None = None,
    ) -> None:
        self.artefact, self._key = _artefact(start, store)
        self.adapter_name = adapter_name
        self._begins_there: bool | None = None

    @cached_property
    def digests(self) -> dict[str, str | None]:
        """What names the start: key in the store (if it has one), recipe, plan, and all values of A and B."""
        artefact = self.artefact
        return {
            "key": self._key or (artefact.provenance.get("store") or {}).get("key"),
            "recipe": artefact.recipe.digest,
            "plan": artefact.plan.digest,
            "tensors": tensors_digest(artefact.factors),
        }

    @property
    def record(self) -> dict[str, Any]:
        """The content of ``smartinit_init.json``; ``begins_there`` is None until the model has been seen."""
        return {
            **self.digests,
            "method": self.artefact.recipe.method,
            "ranks": self.artefact.plan.total,
            "adapter": self.adapter_name,
            "begins_there": self._begins_there,
            "smartinit": __version__,
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,  # noqa: ANN401 - what else a trainer gives
    ) -> None:
        """Compare, and write down."""
        del control
        if state.global_step > 0:  # a resumed run: its adapter is trained
            self._begins_there = self._recorded(Path(str(args.output_dir)))
        elif model is not None:
            self._begins_there = self._compare(model)
        if state.is_world_process_zero:
            _write(Path(str(args.output_dir)), self.record)
            entry: dict[str, Any] = {"smartinit_init": self.record, "step": state.global_step}
            state.log_history.append(entry)
            _tell_trackers(self.record)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,  # noqa: ANN401 - same
    ) -> None:
        """Put the record into the checkpoint that was just written."""
        del control
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():  # a search over hyperparameters has other names
            _write(folder, self.record)

    def _compare(self, model: nn.Module) -> bool | None:
        """Whether the adapter of the model holds the start; None if that cannot be told."""
        found = compare_start(model, self.artefact.factors, self.adapter_name)
        if found.differing is not None:
            warnings.warn(
                f"the training does not begin at the start that is recorded: {found.differing}; load the adapter "
                "folder with PeftModel.from_pretrained(..., is_trainable=True), or apply the artefact, and give the "
                "trainer no peft_config",
                stacklevel=2,
            )
            return False
        return True if found.compared else None

    def _recorded(self, folder: Path) -> bool | None:
        """What the resumed run said when it began, if it began from the same start."""
        try:
            before = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
            same, begun = before["tensors"] == self.digests["tensors"], before["begins_there"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not same:
            warnings.warn(
                f"the run in '{folder}' began from another start than the one that is recorded now; name the start "
                "that it began from",
                stacklevel=3,
            )
            return False
        return begun if isinstance(begun, bool) else None


class Comparison(NamedTuple):
    """How a model's adapter stands to a start: layers that were compared, and the first that differs, in words."""

    compared: int
    differing: str | None


def compare_start(model: nn.Module, factors: Mapping[str, Factors], adapter_name: str = "default") -> Comparison:
    """Compare a few layers' A and B with those of a start; the model may be of PEFT or ours, in any wrappers.

    Layers whose matrices are in pieces (sharded training) cannot be compared. Cost: some small matrices.
    """
    layers = {name: node.module for node in nodes(model) for name in node.names if adapter_layer(node.module)}
    adapted = [name for name, pair in factors.items() if pair.rank > 0]
    compared = 0
    for name in adapted[:: max(1, len(adapted) // _LAYERS)][:_LAYERS]:
        for letter in ("A", "B"):
            theirs = _matrix(layers.get(name), letter, adapter_name)
            if theirs is None:
                return Comparison(compared, f"layer '{name}' has no adapter '{adapter_name}'")
            wanted = factors[name].a if letter == "A" else factors[name].b
            if theirs.numel() == 0 or theirs.dim() < 2:  # noqa: PLR2004 - a piece of a sharded matrix
                continue
            distance = _distance(theirs, wanted, letter)
            compared += 1
            if distance is None:
                return Comparison(
                    compared, f"{letter} of layer '{name}' is {tuple(theirs.shape)}, not {tuple(wanted.shape)}"
                )
            if distance > 0:
                return Comparison(compared, f"{letter} of layer '{name}' differs by up to {distance:.2g}")
    return Comparison(compared, None)


def tensors_digest(factors: Mapping[str, Factors]) -> str:
    """Sha256 over names and values (as float32) of all A and B, whatever file they lie in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(stored_tensors(factors).items()):
        digest.update(f"{name}\0{tensor_digest(tensor)}\n".encode())
    return digest.hexdigest()


def _artefact(start: object, store: Store | str | os.PathLike[str] | None) -> tuple[Artefact, str | None]:
    """The artefact, and its key where that is how it was named or found."""
    if isinstance(start, Artefact):
        return start, None
    if not isinstance(start, (str, os.PathLike)):
        raise ArgumentError(f"a start is an adapter folder, an Artefact or a key, not a {type(start).__name__}")
    if isinstance(start, str) and _KEY.fullmatch(start) and not Path(start).is_dir():
        opened = store if isinstance(store, Store) else Store(store)
        key = find_key(opened, start)
        entry = opened.get(key)  # from another layer it comes into the first
        if entry is None:
            raise NotStoredError(f"the store has no sound artefact '{start}'; compute it again")
        with entry:
            return Artefact.load(readable_folder(opened.local, key)), key
    folder = Path(start).expanduser()
    return Artefact.load(folder), _key_of(folder, store)


def _key_of(folder: Path, store: Store | str | os.PathLike[str] | None) -> str | None:
    """Of a folder that a store made: it has the key's name, and the store says that the tensors are that artefact's."""
    folder = folder.absolute()
    if len(folder.name) != _WHOLE or not _KEY.fullmatch(folder.name):
        return None
    try:
        around = LocalStore(folder.parent.parent, read_only=True).peek(folder.name)
        manifest = around or (store if isinstance(store, Store) else Store(store, read_only=True)).peek(folder.name)
        if manifest is None:
            return None
        for name, blob in manifest.blobs.items():
            if name.endswith(".safetensors"):
                read_blob(folder / name, blob, as_tensors=False)
    except (SmartinitError, OSError):
        return None
    return folder.name


def _matrix(layer: nn.Module | None, letter: str, adapter_name: str) -> Tensor | None:
    """A layer's A or B as it is now; an embedding keeps it under another name, and not in a module."""
    for kind in ("lora_", "lora_embedding_"):
        held = getattr(layer, f"{kind}{letter}", None)
        if held is not None and adapter_name in held:
            found = held[adapter_name]
            tensor: Tensor = getattr(found, "weight", found)
            return tensor.detach()
    return None


def _distance(theirs: Tensor, wanted: Tensor, letter: str) -> float | None:
    """Largest difference beyond rounding to their dtype; None where the shapes do not fit.

    A start that a split was doubled for has it in its first half.
    """
    found = theirs.flatten(1)
    if letter == "A" and found.shape[0] == 2 * wanted.shape[0]:
        found = found[: wanted.shape[0]]
    if letter == "B" and found.shape[1] == 2 * wanted.shape[1]:
        found = found[:, : wanted.shape[1]]
    if found.shape != wanted.shape:
        return None
    rounded = wanted.to(device=found.device, dtype=found.dtype).double()
    allowed = torch.finfo(found.dtype).eps * float(wanted.abs().max()) if wanted.numel() else 0.0
    largest = float((found.double() - rounded).abs().max()) if wanted.numel() else 0.0
    return largest if not largest <= allowed else 0.0  # NaN is a difference


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    """A run does not end because its record cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / RECORD_FILE, json.dumps(record, indent=1).encode() + b"\n")
    except (OutputError, OSError) as error:
        warnings.warn(f"the start is not recorded in '{folder}': {error}", stacklevel=3)


def _tell_trackers(record: Mapping[str, Any]) -> None:
    """Runs that are active now: whoever reports to them has imported them and begun one."""
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.run.config.update({"smartinit_init": dict(record)}, allow_val_change=True)
    mlflow: Any = sys.modules.get("mlflow")
    if mlflow is not None and mlflow.active_run() is not None:
        mlflow.set_tags({f"smartinit_init.{name}": str(value) for name, value in record.items()})
