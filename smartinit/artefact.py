"""What a computation gives: the plan, the factors, and what there is to know about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch

from smartinit.adapters.attach import write_factors
from smartinit.artefact_record import LayerSummary, from_record, stored_form
from smartinit.errors import ArtefactError, ConfigError, SmartinitError, VerificationError
from smartinit.formats.base_weights import read_base_weights, write_base_weights
from smartinit.formats.card import model_card
from smartinit.formats.files import new_folder, write_file
from smartinit.formats.peft import (
    CONFIG_FILE,
    TENSOR_FILE,
    read_config,
    read_factors,
    write_adapter,
)
from smartinit.formats.record import RECORD_FILE, START_FOLDER, read_record, record_text
from smartinit.formats.tensors import stored_tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import nn

    from smartinit.artefact_record import BaseOnDisk
    from smartinit.config import LoraConfig
    from smartinit.factors import Factors
    from smartinit.planning.plan import Plan
    from smartinit.recipe import Recipe
    from smartinit.spectrum import Certificate

__all__ = ["CARD_FILE", "Artefact", "LayerSummary"]

CARD_FILE = "README.md"


@dataclass(frozen=True, eq=False)
class Artefact:
    """The starting point of every adapter layer of one model, as a value.

    Attributes:
        recipe: what was asked for.
        plan: rank and alpha by target name, in model order.
        config: the configuration that it was computed for.
        factors: target name -> ``a (rank, in)``, ``b (out, rank)``.
        layers: target name -> `LayerSummary`.
        sites: names of the targets that read one input tensor, together.
        provenance: model, data, versions: any JSON values.
        timings: step -> seconds.
    """

    recipe: Recipe
    plan: Plan
    config: LoraConfig
    factors: Mapping[str, Factors]
    layers: Mapping[str, LayerSummary]
    sites: tuple[tuple[str, ...], ...]
    provenance: Mapping[str, Any]
    timings: Mapping[str, float]

    def __post_init__(self) -> None:
        """Freeze the mappings: an artefact is a value."""
        for name in ("factors", "layers", "provenance", "timings"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def certificate(self) -> Mapping[str, Certificate]:
        """Target name -> how far its directions can be trusted."""
        return MappingProxyType({name: layer.certificate for name, layer in self.layers.items()})

    @property
    def keeps_base(self) -> bool:
        """Whether the base model is used as it is, because every ``B A`` is zero."""
        return all(pair.effect == "keeps" for pair in self.factors.values())

    @property
    def base_model(self) -> str | None:
        """Folder or hub name of the base model; None for a model that was not loaded from one."""
        name = self.config.base_model_name_or_path or self.provenance.get("model")
        return name if name and name != self.provenance.get("model_class") else None

    def save(
        self,
        folder: str | os.PathLike[str],
        force: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
        base: BaseOnDisk = "residual",
    ) -> Path:
        """Write an adapter folder that PEFT loads, with ``smartinit.json`` and a model card.

        The folder appears whole or not at all, and an existing one is replaced whole or not at all. A split for the
        residual base (see `smartinit.convert.save_residual_model`) is written twice: the copy in ``start/`` stays when
        a trainer saves over the adapter, and `smartinit.convert.convert_adapter` finds it there.

        Args:
            folder: where to; missing parents are made.
            force: replace an existing adapter folder.
            dtype: of the stored matrices, which are rounded to it once.
            base: which base model the folder of a splitting method is for: ``"residual"``, from which ``s·B A`` is
                subtracted, or ``"doubled"``: the unmodified one, as plain LoRA ``[B, -B] [A; A]`` of twice the rank,
                which starts where the base does. No matter to other methods.

        Returns:
            The folder.

        Raises:
            OutputError: the folder exists (without ``force``), holds other things, or cannot be written.
            ConfigError: every target has rank 0; an unknown ``base``, or one that the factors cannot serve.
            VerificationError: `verify` finds something wrong; nothing is written.
        """
        self._require_sound()
        plan, factors = stored_form(self.plan, self.factors, base, use_dora=self.config.use_dora)
        effects = {pair.effect for pair in self.factors.values() if pair.rank}
        changed = bool(effects & {"splits", "quantises"}) and base == "residual"
        config = self.config.copy()
        if changed:  # a loader that looks the base up by name would take the wrong one
            config.base_model_name_or_path = None
        kinds = {layer.kind for layer in self.layers.values()}
        config.fan_in_fan_out |= "conv1d" in kinds and "linear" not in kinds  # PEFT warns, and sets it itself
        forms = {name: layer.form for name, layer in self.layers.items()}
        with new_folder(folder, force=force, marker=CONFIG_FILE) as unfinished:
            name = None if changed else self.base_model
            write_adapter(unfinished, config, plan, factors, base_model_name_or_path=name, dtype=dtype, forms=forms)
            if "splits" in effects and base == "residual":
                (unfinished / START_FOLDER).mkdir()
                for file in (CONFIG_FILE, TENSOR_FILE):
                    write_file(unfinished / START_FOLDER / file, (unfinished / file).read_bytes())
            bases = {name: pair.base for name, pair in self.factors.items() if pair.base is not None}
            write_base_weights(unfinished, bases)
            card = model_card(self.recipe, plan, base_model=self.base_model, effects=effects, base=base)
            write_file(unfinished / CARD_FILE, card.encode())
            record = self._as_record(base if "splits" in effects else None)
            write_file(unfinished / RECORD_FILE, record_text(record, unfinished))
        return Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Artefact:
        """Read what `save` wrote; every digest is checked, and nothing is unpickled.

        Raises:
            MissingFileError: there is no such folder.
            ArtefactError: a file is missing or broken.
            VerificationError: what is stored contradicts itself.
        """
        path = Path(folder)
        record, contents = read_record(path)
        read_config(path, contents[CONFIG_FILE])
        stored = read_factors(path, contents[TENSOR_FILE])
        bases = read_base_weights(path)
        try:
            artefact = cls(**from_record(record, stored.factors, bases))
        except VerificationError as error:
            raise VerificationError(f"'{path}': {error}") from error
        except (SmartinitError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtefactError(
                f"'{path / RECORD_FILE}' is incomplete or broken ({type(error).__name__}: {error})"
            ) from error
        for name, digest in (("recipe", artefact.recipe.digest), ("plan", artefact.plan.digest)):
            if record.get(f"{name}_digest") != digest:
                raise VerificationError(
                    f"'{path / RECORD_FILE}' was changed: its {name} has another digest than it says"
                )
        artefact._require_sound()
        return artefact

    def verify(self, folder: str | os.PathLike[str] | None = None) -> list[str]:
        """What is wrong, one sentence each; an empty list if nothing is.

        Checks that all values are finite, that names and shapes agree with the plan, and that ``B A`` is zero where
        the method says so. With a folder also its digests, and that it holds this very artefact.
        """
        problems = [problem for name in self.plan.ranks for problem in self._problems(name)]
        problems += [
            f"layer '{name}' has factors but is not in the plan" for name in self.factors.keys() - self.plan.ranks
        ]
        if folder is None:
            return problems
        try:
            stored = Artefact.load(folder)
        except SmartinitError as error:
            return [*problems, str(error)]
        for name in ("recipe", "plan"):
            if getattr(stored, name).digest != getattr(self, name).digest:
                problems.append(f"'{folder}' was made with another {name}")
        theirs = stored_tensors(stored.factors, dtype=_dtype(stored.factors))
        ours = stored_tensors(self.factors, dtype=_dtype(stored.factors))
        differing = [key for key in ours.keys() | theirs.keys() if not _equal(ours.get(key), theirs.get(key))]
        problems += [f"'{folder}' holds other values of '{key}'" for key in sorted(differing)]
        for name, pair in self.factors.items():
            kept = stored.factors.get(name)
            if kept is not None and pair.effect != kept.effect:
                problems.append(f"'{folder}' says that layer '{name}' {kept.effect} its base, which it {pair.effect}")
            if (
                kept is not None
                and (pair.base is not None or kept.base is not None)
                and not _equal(pair.base, kept.base)
            ):
                problems.append(f"'{folder}' holds another quantised base of layer '{name}'")
        return problems

    def apply(
        self,
        model: nn.Module,
        *,
        adapter_name: str = "default",
        base: Literal["residual", "offset"] = "residual",
    ) -> nn.Module:
        """Write the factors into a `smartinit.LoraModel` or a ``peft.PeftModel``, in place.

        Args:
            model: see `write_factors`.
            adapter_name: which adapter.
            base: what a method that splits the weight does to the base layers: they become the residual, as in PEFT;
                or they stay, and the layers subtract the frozen start. No matter to other methods.

        Returns:
            ``model``. After an error it is as it was, bit for bit.

        Raises:
            ModelError: the model carries no adapters, or a base weight that must change cannot be.
            ArtefactError, UnknownNameError: the factors are for another model.
            ConfigError: an unknown ``base``; or a change of the base that would change what others compute.
        """
        if base not in ("residual", "offset"):
            raise ConfigError(f"base={base!r} is not known; choose 'residual' or 'offset'")
        return write_factors(model, self.factors, self.plan, adapter_name, base)

    def _problems(self, name: str) -> list[str]:
        """What is wrong with one planned layer."""
        if name not in self.factors or name not in self.layers:
            return [f"layer '{name}' is in the plan but has no factors or no summary"]
        pair, rank, (out_features, in_features) = self.factors[name], self.plan.ranks[name], self.layers[name].shape
        problems = [
            f"{label} of layer '{name}' has shape {tuple(matrix.shape)}, but rank {rank} needs {fits}"
            for label, matrix, fits in (("A", pair.a, (rank, in_features)), ("B", pair.b, (out_features, rank)))
            if tuple(matrix.shape) != fits
        ]
        problems += [
            f"{label} of layer '{name}' holds NaN or Inf"
            for label, matrix in (("A", pair.a), ("B", pair.b))
            if not torch.isfinite(matrix).all()
        ]
        for label, tensor, shape in (
            ("the quantised base", pair.base, (out_features, in_features)),
            ("the magnitude", pair.magnitude, (out_features,)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                problems.append(f"{label} of layer '{name}' has shape {tuple(tensor.shape)}, but {shape} is needed")
            elif tensor is not None and not torch.isfinite(tensor).all():
                problems.append(f"{label} of layer '{name}' holds NaN or Inf")
        if pair.base is not None and pair.effect != "quantises":
            problems.append(f"layer '{name}' has a quantised base, but is said not to use it")
        if not problems and pair.effect == "keeps" and not _is_zero(pair):
            problems.append(f"layer '{name}' is said to keep the base model, but its B A is not zero")
        return problems

    def _as_record(self, base: BaseOnDisk | None) -> dict[str, object]:
        """Plain values for ``smartinit.json``; ``base`` is None where nothing is split."""
        return {
            "recipe": self.recipe.as_dict(),
            "recipe_digest": self.recipe.digest,
            "plan": self.plan.as_dict(),
            "plan_digest": self.plan.digest,
            "targets": list(self.plan.ranks),  # the order, which sorted keys lose
            "config": self.config.to_dict(),
            "effects": {name: pair.effect for name, pair in self.factors.items()},
            "trains": {name: pair.trains for name, pair in self.factors.items() if pair.trains != "both"},
            "base": base,
            "base_model": self.base_model,
            "layers": {name: layer.as_dict() for name, layer in self.layers.items()},
            "sites": self.sites,
            "provenance": self.provenance,
            "timings": self.timings,
        }

    def _require_sound(self) -> None:
        problems = self.verify()
        if problems:
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            raise VerificationError(f"{problems[0]}{more}; compute the artefact again")


def _is_zero(pair: Factors) -> bool:
    """Whether ``B A`` is zero, up to the rounding of matrices whose rows and columns cancel each other."""
    a, b = pair.a.double(), pair.b.double()
    product = ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()
    return bool(product <= 64 * torch.finfo(pair.a.dtype).eps * a.norm() * b.norm())


def _dtype(factors: Mapping[str, Factors]) -> torch.dtype:
    return next((pair.a.dtype for pair in factors.values() if pair.rank > 0), torch.float32)


def _equal(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    return ours is not None and theirs is not None and torch.equal(ours, theirs)
