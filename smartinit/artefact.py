"""What a computation gives: the plan, the factors, and what there is to know about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch

from smartinit.adapters.attach import write_factors
from smartinit.config import LoraConfig
from smartinit.errors import ArtefactError, ConfigError, SmartinitError, VerificationError
from smartinit.factors import Factors
from smartinit.formats.card import model_card
from smartinit.formats.files import new_folder, write_file
from smartinit.formats.peft import (
    CONFIG_FILE,
    TENSOR_FILE,
    read_config,
    read_factors,
    stored_tensors,
    write_adapter,
)
from smartinit.formats.record import RECORD_FILE, read_record, record_text
from smartinit.planning.plan import Plan
from smartinit.recipe import Recipe
from smartinit.spectrum import Certificate

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import nn

CARD_FILE = "README.md"


@dataclass(frozen=True)
class LayerSummary:
    """What is known of one layer besides its factors.

    Attributes:
        shape: ``(out_features, in_features)``.
        ratios: the share of the total variance that each candidate direction explains, best first.
        certificate: how far its directions can be trusted.
    """

    shape: tuple[int, int]
    ratios: tuple[float, ...]
    certificate: Certificate


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

    def save(self, folder: str | os.PathLike[str], force: bool = False, *, dtype: torch.dtype = torch.float32) -> Path:
        """Write an adapter folder that PEFT loads, with ``smartinit.json`` and a model card.

        The folder appears whole or not at all, and an existing one is replaced whole or not at all.

        Args:
            folder: where to; missing parents are made.
            force: replace an existing adapter folder.
            dtype: of the stored matrices, which are rounded to it once.

        Returns:
            The folder.

        Raises:
            OutputError: the folder exists (without ``force``), holds other things, or cannot be written.
            ConfigError: every target has rank 0.
            VerificationError: `verify` finds something wrong; nothing is written.
        """
        self._require_sound()
        with new_folder(folder, force=force, marker=CONFIG_FILE) as unfinished:
            write_adapter(
                unfinished, self.config, self.plan, self.factors, base_model_name_or_path=self.base_model, dtype=dtype
            )
            card = model_card(self.recipe, self.plan, base_model=self.base_model, keeps_base=self.keeps_base)
            write_file(unfinished / CARD_FILE, card.encode())
            write_file(unfinished / RECORD_FILE, record_text(self._as_record(), unfinished))
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
        try:
            artefact = _from_record(record, stored)
        except (SmartinitError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtefactError(
                f"'{path / RECORD_FILE}' is incomplete or broken ({type(error).__name__}: {error})"
            ) from error
        for name, digest in (("recipe", artefact.recipe.digest), ("plan", artefact.plan.digest)):
            if record.get(f"{name}_digest") != digest:
                raise VerificationError(
                    f"'{path / RECORD_FILE}' was changed: its {name} has another digest than it says"
                )
        artefact._require_sound()  # noqa: SLF001  (its own class)
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
            base: how a method that splits the weight treats the base layer; no matter to one that keeps it.

        Returns:
            ``model``. After an error it is as it was.

        Raises:
            ModelError: the model carries no adapters.
            ArtefactError, UnknownNameError: the factors are for another model.
            ConfigError: an unknown ``base``; or a method that splits the weight, which needs a later version.
        """
        if base not in ("residual", "offset"):
            raise ConfigError(f"base={base!r} is not known; choose 'residual' or 'offset'")
        if not self.keeps_base:
            raise ConfigError(
                f"the method '{self.recipe.method}' splits the base weight, which this version cannot apply"
            )
        return write_factors(model, self.factors, self.plan, adapter_name)

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
        if not problems and pair.effect == "keeps" and pair.b.count_nonzero() and pair.a.count_nonzero():
            problems.append(f"layer '{name}' is said to keep the base model, but its B A is not zero")
        return problems

    def _require_sound(self) -> None:
        problems = self.verify()
        if problems:
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            raise VerificationError(f"{problems[0]}{more}; compute the artefact again")

    def _as_record(self) -> dict[str, object]:
        return {
            "recipe": self.recipe.as_dict(),
            "recipe_digest": self.recipe.digest,
            "plan": self.plan.as_dict(),
            "plan_digest": self.plan.digest,
            "targets": list(self.plan.ranks),  # the order, which sorted keys lose
            "config": self.config.to_dict(),
            "effects": {name: pair.effect for name, pair in self.factors.items()},
            "layers": {
                name: {"shape": layer.shape, "ratios": layer.ratios, "certificate": layer.certificate.as_dict()}
                for name, layer in self.layers.items()
            },
            "sites": self.sites,
            "provenance": self.provenance,
            "timings": self.timings,
        }


def _from_record(record: Mapping[str, Any], stored: Mapping[str, Factors]) -> Artefact:
    """Put together what `_as_record` took apart; any exception means that the record is broken."""
    order: list[str] = record["targets"]
    plan = Plan.from_dict(record["plan"])
    if set(order) != plan.ranks.keys() or order != list(dict.fromkeys(order)):
        raise ValueError("targets and plan name different layers")
    layers = {}
    factors = {}
    for name in order:
        layer = record["layers"][name]
        out_features, in_features = (int(size) for size in layer["shape"])
        layers[name] = LayerSummary(
            (out_features, in_features),
            tuple(float(ratio) for ratio in layer["ratios"]),
            Certificate(**layer["certificate"]),
        )
        pair = stored.get(name) or Factors(torch.zeros(0, in_features), torch.zeros(out_features, 0))
        factors[name] = Factors(pair.a, pair.b, record["effects"][name])
    if stored.keys() - factors.keys():
        raise ValueError(f"{TENSOR_FILE} holds '{min(stored.keys() - factors.keys())}', which is not planned")
    return Artefact(
        recipe=Recipe.from_dict(record["recipe"]),
        plan=Plan(
            {name: plan.ranks[name] for name in order}, {name: plan.alphas[name] for name in order}, plan.use_rslora
        ),
        config=LoraConfig.from_dict(record["config"]),
        factors=factors,
        layers=layers,
        sites=tuple(tuple(site) for site in record["sites"]),
        provenance=record["provenance"],
        timings=record["timings"],
    )


def _dtype(factors: Mapping[str, Factors]) -> torch.dtype:
    return next((pair.a.dtype for pair in factors.values() if pair.rank > 0), torch.float32)


def _equal(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    return ours is not None and theirs is not None and torch.equal(ours, theirs)
