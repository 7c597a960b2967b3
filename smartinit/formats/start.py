"""The start that an adapter was trained from, as far as a conversion needs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from smartinit.errors import ArtefactError, ConfigError, MissingFileError
from smartinit.factors import Effect
from smartinit.formats.kept_start import kept_start, owner_of
from smartinit.formats.peft import TENSOR_FILE, read_adapter
from smartinit.formats.record import RECORD_FILE, START_FOLDER, check_digests, read_record_only

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from smartinit.config import LoraConfig
    from smartinit.factors import Factors
    from smartinit.formats.peft import StoredAdapter
    from smartinit.formats.tensors import Form

# Of PEFT's starts, those that leave the base alone: with them B A is zero, but for rounding.
_KEEPING = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, eq=False)
class Start:
    """What a base model gave up, or did not.

    Attributes:
        folder: where it was read.
        config: its configuration; None where nothing was split, so that nobody needs it.
        factors: module name -> ``a``, ``b`` at the start; empty where nothing was split.
        forms: module name -> how the file shows them.
        effects: module name -> what the start does to the base.
        base_model: the unmodified base model's name, where the folder knows it.
    """

    folder: Path
    config: LoraConfig | None
    factors: Mapping[str, Factors]
    forms: Mapping[str, Form]
    effects: Mapping[str, Effect]
    base_model: str | None

    @property
    def splits(self) -> list[str]:
        """Names of the layers whose base has given something up."""
        return [name for name, effect in self.effects.items() if effect == "splits"]


def read_start(folder: str | os.PathLike[str]) -> Start:
    """Read a start: a folder of this package (whose adapter may have been trained over since), or one of PEFT.

    A folder of this package keeps the start of a split in a sub-folder of its own, which no trainer touches. A folder
    of PEFT says by ``init_lora_weights`` what was done; where that is true, the base is taken to have given up
    ``s·B A`` if that is not zero, as PEFT's own conversion takes it.

    Raises:
        MissingFileError: there is no such folder.
        ArtefactError: a file is missing or broken.
        VerificationError: the start is not the one that was written.
        ConfigError: it was saved for the unmodified base, or quantises the base: there is nothing to convert.
    """
    path = Path(folder)
    if not path.is_dir():
        raise MissingFileError(f"there is no folder '{path}'; name the adapter folder that the training started from")
    if not (path / RECORD_FILE).is_file() or owner_of(path / START_FOLDER) is not None:
        return _of_adapter(read_adapter(path, allow_others=True))
    record = read_record_only(path)
    effects = _effects(path, record.get("effects"))
    if record.get("base") == "doubled":
        effects = dict.fromkeys(effects, "keeps")
    if "splits" not in effects.values():
        return Start(path, None, {}, {}, effects, _base_model(record))
    start = path / START_FOLDER
    if not start.is_dir():
        raise ArtefactError(f"'{path}' has lost its '{START_FOLDER}' folder, which held the start; compute it again")
    check_digests(path, record, below=START_FOLDER)
    stored = read_adapter(start)
    odd = [name for name in stored.factors if name not in effects]
    if odd:
        raise ArtefactError(f"'{start / TENSOR_FILE}' holds layer '{odd[0]}', which '{RECORD_FILE}' does not know")
    return Start(path, stored.config, stored.factors, stored.forms, effects, _base_model(record))


def as_start(stored: StoredAdapter) -> Start:
    """What PEFT's own conversion would make of an adapter that was saved before any training."""
    init = stored.config.init_lora_weights
    effect: Effect = "splits"
    if init is False:
        effect = "shifts"
    elif init in _KEEPING:
        effect = "keeps"
    elif init == "loftq":
        effect = "quantises"
    return Start(
        stored.folder,
        stored.config,
        stored.factors,
        stored.forms,
        dict.fromkeys(stored.factors, effect),
        stored.config.base_model_name_or_path,
    )


def require_own_base(stored: StoredAdapter) -> None:
    """Refuse an adapter for a base that PEFT would make anew from the model's, by its ``init_lora_weights``.

    Raises:
        ArtefactError: it is one; the way out is named.
    """
    init = stored.config.init_lora_weights
    if isinstance(init, bool) or init in _KEEPING:
        return
    if init == "loftq":
        way = "load it with PEFT, and merge it there (merge_and_unload) into the quantised base that it was trained on"
    else:
        way = (
            "load it with PEFT and save it with path_initial_model_for_weight_conversion=<the adapter as it was before "
            "training>, or run `smartinit convert` with that as start, and load the result"
        )
    raise ArtefactError(
        f"the adapter in '{stored.folder}' says init_lora_weights={init!r}: its weights are for a base that this start "
        f"has changed, not for the model as it is; {way}"
    )


def _of_adapter(stored: StoredAdapter) -> Start:
    kept = kept_start(stored)
    if kept is None:
        return as_start(stored)
    effects: dict[str, Effect] = dict.fromkeys(stored.factors, "keeps")
    effects |= dict.fromkeys(kept.factors, "splits")
    return Start(kept.folder, kept.config, kept.factors, kept.forms, effects, kept.config.base_model_name_or_path)


def _effects(path: Path, effects: object) -> dict[str, Effect]:
    if not isinstance(effects, dict) or not set(map(str, effects.values())) <= set(get_args(Effect)):
        raise ArtefactError(f"'{path / RECORD_FILE}' does not say what the start does to the base; it is broken")
    if not effects:
        raise ConfigError(f"'{path / RECORD_FILE}' names no layer")
    return dict(effects)


def _base_model(record: Mapping[str, object]) -> str | None:
    name = record.get("base_model")
    return name if isinstance(name, str) else None
