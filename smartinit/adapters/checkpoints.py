"""Checkpoints of a training run that hold the adapters only, as PEFT folders, and going on from them.

    from transformers import Trainer
    from smartinit.adapters import AdapterCheckpoints

    class AdapterTrainer(AdapterCheckpoints, Trainer):
        pass

``Trainer`` does this for models of PEFT's own class; of a `LoraModel` it saves the whole state dict.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smartinit.adapters.adapted import AdaptedModel
from smartinit.adapters.conversion import scaling_for
from smartinit.adapters.experts import ParameterLora
from smartinit.adapters.loading import require_fitting
from smartinit.adapters.start import start_of
from smartinit.adapters.state import stored_layers
from smartinit.adapters.storage import fill_adapter, read_plain_adapter
from smartinit.adapters.trained_alike import difference
from smartinit.errors import ArtefactError
from smartinit.factors import Factors
from smartinit.formats.kept_start import kept_start

if TYPE_CHECKING:
    import os

    from torch import nn
    from transformers import Trainer

    from smartinit.adapters.layer import LoraLayer
    from smartinit.adapters.start import Start
    from smartinit.formats.peft import StoredAdapter
else:  # whoever mixes this in has imported it
    Trainer = object

_WHOLE_MODEL = "model.safetensors"


class AdapterCheckpoints(Trainer):
    """Mix it in before ``transformers.Trainer`` or a subclass, such as TRL's ``SFTTrainer``.

    Checkpoints of a `LoraModel` then are PEFT folders (other adapters than ``default`` in sub-folders), besides what
    the trainer itself keeps there: optimiser, schedule, random state. ``resume_from_checkpoint`` and
    ``load_best_model_at_end`` read them back into the parameters that the model has. Other models are none of its
    business. Sharded training (FSDP, DeepSpeed) saves as the trainer does without it.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        model = self._adapted_model()
        if model is None:
            super()._save(output_dir, state_dict=state_dict)
            return
        super()._save(output_dir, state_dict={})  # tokenizer and arguments; no weights
        if self.args.should_save:
            folder = Path(str(output_dir if output_dir is not None else self.args.output_dir))
            (folder / _WHOLE_MODEL).unlink(missing_ok=True)
            model.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._restore(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._restore(str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _restore(self, folder: str) -> bool:
        """Whether there were adapters to be restored."""
        model = self._adapted_model()
        if model is None or not any(_folder_of(folder, name).is_dir() for name in model.peft_config):
            return False
        if (Path(folder) / _WHOLE_MODEL).is_file():  # saved before the trainer was given this class
            return False
        restore_adapters(model, folder)
        return True

    def _adapted_model(self) -> AdaptedModel | None:
        """The model without what trainers put around it, if adapters of ours are in it and it is not sharded."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return None
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model if isinstance(model, AdaptedModel) else None


def restore_adapters(model: AdaptedModel, folder: str | os.PathLike[str]) -> None:
    """Put all adapters of a model back to what `LoraModel.save_pretrained` wrote while they were trained, in place.

    The parameters stay the objects that they are, so that an optimiser goes on with them. The model must be as it was
    before the training: same configuration, same artefact applied in the same way.

    Args:
        model: with the adapters that the folder has.
        folder: written by ``save_pretrained`` of a model with the same adapters.

    Raises:
        ArtefactError: another adapter, configuration, scaling or start than the model has; a tensor that does not fit.
        MissingFileError: an adapter of the model is not in the folder.

        After an error no adapter was changed.
    """
    restored = {}
    for name, config in model.peft_config.items():
        stored = read_plain_adapter(_folder_of(folder, name))
        if found := difference(config, stored.config):
            raise ArtefactError(
                f"adapter '{name}' has {found[0]}, but the checkpoint in '{stored.folder}' has {found[1]}; make the "
                "model with the configuration that the training began with"
            )
        layers = stored_layers(model.model, name)
        _require_scalings(layers, name, stored)
        _require_starts(layers, name, stored)
        trained = {
            path: _trained_part(pair, start_of(layers[path], name), f"layer '{path}' in '{stored.folder}'")
            if path in layers
            else pair
            for path, pair in stored.factors.items()
        }
        restored[name] = replace(stored, factors=trained)
        require_fitting(model.model, name, restored[name], config)
    for name, stored in restored.items():
        fill_adapter(model, name, stored)


def _folder_of(folder: str | os.PathLike[str], adapter_name: str) -> Path:
    return Path(folder) if adapter_name == "default" else Path(folder) / adapter_name


def _trained_part(stored: Factors, start: Start | None, where: str) -> Factors:
    """What is trained of the plain LoRA ``[B, -B₀] [A; A₀]`` that a layer with ``base="offset"`` is saved as."""
    if start is None or start.base != "offset":
        return stored
    rank = stored.rank - int(start.a.shape[0])
    if rank < 1 or not torch.equal(stored.a[rank:], start.a.to(stored.a)):
        raise ArtefactError(
            f"{where} was not trained from the start that the model has; apply the artefact that the training began "
            "with before going on from its checkpoint"
        )
    return replace(stored, a=stored.a[:rank], b=stored.b[:, :rank])


def _require_scalings(layers: dict[str, LoraLayer], adapter_name: str, stored: StoredAdapter) -> None:
    for name, pair in stored.factors.items():
        layer = layers.get(name)
        known, rank = name, pair.rank
        if isinstance(layer, ParameterLora):  # the matrices have the ranks of all experts
            known, rank = layer.full_name(name), rank // layer.experts
        said = scaling_for(stored.config, known, rank)
        if layer is not None and abs(said - layer.scaling[adapter_name]) > 1e-6 * abs(said):
            raise ArtefactError(
                f"the checkpoint in '{stored.folder}' has the scaling {said:g} for layer '{name}', where the model "
                f"has {layer.scaling[adapter_name]:g}; make the model with the configuration and the artefact "
                "that the training began with"
            )


def _require_starts(layers: dict[str, LoraLayer], adapter_name: str, stored: StoredAdapter) -> None:
    """A base that gave its start up must have done so before the training and now, and given up the same."""
    given_up = kept_start(stored)
    kept = {} if given_up is None else given_up.factors
    for name, layer in layers.items():
        start = start_of(layer, adapter_name)
        held = None if start is None or start.base != "residual" else start
        given = kept.get(name)
        if held is None and given is None:
            continue
        if held is None or given is None or not _same_product(Factors(held.a, held.b), given):
            raise ArtefactError(
                f"the base of layer '{name}' is not the one that the checkpoint in '{stored.folder}' was trained on: "
                "apply the same artefact with the same `base` before going on from it"
            )


def _same_product(one: Factors, other: Factors) -> bool:
    """Whether ``B A`` is the same up to round-off: signs of singular vectors may differ. Cost: O((in + out)·r²)."""
    a1, b1, a2, b2 = (tensor.detach().double().cpu() for tensor in (one.a, one.b, other.a, other.b))
    if (a1.shape[1], b1.shape[0]) != (a2.shape[1], b2.shape[0]):
        return False
    a, b = torch.cat([a1, a2]), torch.cat([b1, -b2], dim=1)
    distance = ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()
    return bool(distance <= 1e-5 * ((b2.T @ b2) * (a2 @ a2.T)).sum().clamp_min(0).sqrt())
