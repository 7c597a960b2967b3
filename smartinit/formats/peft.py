"""PEFT's adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

Keys are those that PEFT 0.21.2 writes. ``init_lora_weights`` is always true in the file, whatever made the factors:
another value makes a loader run that initialisation again, or a server refuse the folder.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smartinit.config import OWN_FIELDS, LoraConfig
from smartinit.errors import (
    ArgumentError,
    ArtefactError,
    ConfigError,
    MissingFileError,
    OutputError,
    SmartinitError,
)
from smartinit.formats.files import write_file
from smartinit.formats.patterns import compact_patterns, exact_target_modules
from smartinit.formats.stamp import CONFIG_STAMP, config_digest
from smartinit.formats.tensors import file_content, open_tensors, read_tensors, stored_tensors
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from smartinit.factors import Factors
    from smartinit.formats.tensors import Form, StoredTensors

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

# What PEFT 0.21.2 writes besides the fields of LoraConfig, as it writes them for plain LoRA.
_PLAIN_LORA = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "ensure_weight_tying": False,
    "kasa_config": None,
    "monteclora_config": None,
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Fields that had their say when the factors were made (PEFT warns about another method's options), or when the
# targets were chosen: the file names every target in full.
_SPENT: dict[str, object] = {
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_ga_config": None,
}
# Seconds before each attempt to read two files that were written together.
_WAITS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.4)
# Fields for which PEFT looks for tensors in the file, and breaks (KeyError) or complains without.
_NEED_TENSORS = ("modules_to_save", "target_parameters", "trainable_token_indices")


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """What an adapter folder holds.

    Attributes:
        folder: where it was read.
        config: its configuration.
        factors: module name -> ``a (r, in)``, ``b (out, r)``, in the file's order.
        forms: module name -> how the file shows them.
        others: every other tensor by its key, where those were asked for.
        metadata: what the tensor file's header says besides, see `smartinit.formats.stamp`.
    """

    folder: Path
    config: LoraConfig
    factors: Mapping[str, Factors]
    forms: Mapping[str, Form] = field(default_factory=dict)
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def adapter_config(
    config: LoraConfig,
    plan: Plan,
    *,
    base_model_name_or_path: str | None = None,
    other_modules: Iterable[str] | None = None,
    parameters: Mapping[str, str] | None = None,
    complete: bool = False,
) -> dict[str, object]:
    """The content of ``adapter_config.json``; targets of rank 0 appear nowhere in it.

    Args:
        config: what the adapter was made with.
        plan: ranks and alphas.
        base_model_name_or_path: overrides the configuration's.
        other_modules: names of all modules of the model, if known: see `exact_target_modules`.
        parameters: names in the plan that are bare parameters (``target_parameters``) -> the parameter's full name.
        complete: whether everything that the configuration trains is in the folder, and not only LoRA's matrices.

    Raises:
        ConfigError: every target has rank 0.

    Warns:
        UserWarning: the configuration trains whole modules, whose weights are not in the folder.
    """
    for option in () if complete else _NEED_TENSORS:
        if getattr(config, option):
            warnings.warn(
                f"{option}={getattr(config, option)!r} is left out of {CONFIG_FILE}, because a loader would look for "
                f"those weights in the folder; give {option} to the trainer",
                stacklevel=3,
            )
    full = {name: (parameters or {}).get(name, name) for name in plan.ranks}
    patterns = compact_patterns(
        Plan(
            {full[name]: rank for name, rank in plan.ranks.items()},
            {full[name]: alpha for name, alpha in plan.alphas.items()},
        )
    )
    targets = [name for name, rank in plan.ranks.items() if rank > 0 and name == full[name]]
    modules = [*(name for name in plan.ranks if name == full[name]), *(other_modules or ())]
    return (
        _PLAIN_LORA
        | {key: value for key, value in config.to_dict().items() if key not in (*config.extra, *OWN_FIELDS)}
        | _SPENT
        | ({} if complete else dict.fromkeys(_NEED_TENSORS))
        | {
            "alpha_pattern": patterns.alpha_pattern,
            "base_model_name_or_path": base_model_name_or_path or config.base_model_name_or_path,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": patterns.lora_alpha,
            "peft_type": "LORA",
            "r": patterns.r,
            "rank_pattern": patterns.rank_pattern,
            "target_modules": exact_target_modules(targets, modules, complete=other_modules is not None),
            "use_rslora": plan.use_rslora,
        }
    )


def write_adapter(
    folder: str | os.PathLike[str],
    config: LoraConfig,
    plan: Plan,
    factors: Mapping[str, Factors],
    *,
    base_model_name_or_path: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    other_modules: Iterable[str] | None = None,
    forms: Mapping[str, Form] | None = None,
    parameters: Mapping[str, str] | None = None,
    others: Mapping[str, torch.Tensor] | None = None,
    stamps: Mapping[str, str] | None = None,
) -> None:
    """Write the two files that PEFT loads, each in one step; the folder is made, other files in it stay.

    Args:
        folder: where to.
        config: what the adapter was made with.
        plan: ranks and alphas.
        factors: module name -> factors; those of rank 0 are left out.
        base_model_name_or_path: overrides the configuration's.
        dtype: of the matrices in the file; None: what each of them has.
        other_modules: names of all modules of the model, if known: see `exact_target_modules`.
        forms: module name -> form in the file, for convolutions and embeddings.
        parameters: as of `adapter_config`.
        others: everything else that the configuration trains (modules, tokens, biases) by its key in the file. None:
            it is not at hand, and the file does not speak of it.
        stamps: as of `write_files`.

    Raises:
        ConfigError: every target has rank 0; or the factors do not go with the plan.
        VerificationError: a value is not finite.
        OutputError: the files cannot be written.
    """
    planned = {name for name, rank in plan.ranks.items() if rank > 0}
    given = {name for name, pair in factors.items() if pair.rank > 0}
    if planned != given:
        raise ConfigError(
            f"the plan and the factors name different layers, for instance '{min(planned ^ given)}'; both must "
            "come from one computation"
        )
    content = adapter_config(
        config,
        plan,
        base_model_name_or_path=base_model_name_or_path,
        other_modules=other_modules,
        parameters=parameters,
        complete=others is not None,
    )
    tensors = stored_tensors(factors, dtype=dtype, forms=forms)
    for key, tensor in (others or {}).items():  # each with memory of its own: files cannot share it
        tensors[key] = tensor.detach().to(device="cpu", copy=True).contiguous()
    write_files(folder, content, tensors, stamps)


def write_files(
    folder: str | os.PathLike[str],
    config: Mapping[str, object],
    tensors: dict[str, torch.Tensor],
    stamps: Mapping[str, str] | None = None,
) -> None:
    """Write both files, the tensors first, each in one step; the folder is made, other files in it stay.

    The tensors say which configuration they go with, so that `read_adapter` tells when only one file is new.

    Args:
        folder: where to.
        config: the content of ``adapter_config.json``.
        tensors: by key.
        stamps: what the tensor file is to say of the start: see `smartinit.formats.stamp`.

    Raises:
        OutputError: they cannot be written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make folder '{path}': {error.strerror or error}") from error
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    metadata = {"format": "pt", CONFIG_STAMP: config_digest(json.loads(text)), **(stamps or {})}
    write_file(path / TENSOR_FILE, file_content(tensors, metadata))
    write_file(path / CONFIG_FILE, text.encode())


def read_adapter(folder: str | os.PathLike[str], *, allow_others: bool = False) -> StoredAdapter:
    """Read an adapter folder of PEFT, this package's or anyone's; nothing in it is trusted, nothing is unpickled.

    The tensors are windows into the file (see `open_tensors`): copy what is to be kept.

    Args:
        folder: the adapter folder.
        allow_others: also take what is no LoRA matrix: biases, modules_to_save, trained tokens.

    Raises:
        MissingFileError: there is no such folder.
        ArgumentError: ``folder`` is no path.
        ArtefactError: a file is missing, broken, or holds (unless allowed) something else than LoRA; or, for longer
            than a writer takes, the two files were not written together.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ArgumentError(f"the adapter folder is a {type(folder).__name__}; expected its path")
    path = Path(folder)
    for wait in _WAITS:
        time.sleep(wait)
        content, changed = _content_and_time(path / CONFIG_FILE)
        with _named_errors(path / TENSOR_FILE):
            stored = open_tensors(path / TENSOR_FILE)
            others_changed = (path / TENSOR_FILE).stat().st_mtime_ns
        stamp = stored.metadata.get(CONFIG_STAMP)
        # The configuration is written last: one that is newer than the tensors was edited, and means what it says.
        if (
            stamp is None
            or changed > others_changed
            or stamp == config_digest(read_object(path / CONFIG_FILE, content))
        ):
            break
    else:
        raise ArtefactError(
            f"'{path / CONFIG_FILE}' is not the one that '{path / TENSOR_FILE}' was written with: the folder is being "
            "written, or that was interrupted, or files of two adapters are mixed; read it again later, or save the "
            "adapter again"
        )
    config = read_config(path, content)
    if not allow_others:
        _require_no_others(path / TENSOR_FILE, stored)
    return StoredAdapter(path, config, stored.factors, stored.forms, stored.others, stored.metadata)


def _content_and_time(path: Path) -> tuple[bytes, int]:
    """A file whole, and when it was last written to."""
    with _named_errors(path), path.open("rb") as file:
        return file.read(), os.fstat(file.fileno()).st_mtime_ns


def read_file(path: Path) -> bytes:
    """A file of an adapter folder, whole: what is checked is then exactly what is used.

    Raises:
        MissingFileError: the folder is missing.
        ArtefactError: the file is missing or cannot be read.
    """
    with _named_errors(path):
        return path.read_bytes()


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Inside, a file of an adapter folder is read."""
    if not path.parent.is_dir():
        raise MissingFileError(f"there is no folder '{path.parent}'; name a folder with {CONFIG_FILE} in it")
    try:
        yield
    except FileNotFoundError as error:
        pickled = path.with_suffix(".bin")
        if path.name == TENSOR_FILE and pickled.is_file():
            raise ArtefactError(
                f"'{pickled}' is a pickle, which can run any code when it is read, so it is not; convert it where you "
                "trust it: load it with PEFT and call save_pretrained, which writes safetensors"
            ) from error
        raise ArtefactError(f"'{path}' is missing, so this is no adapter folder") from error
    except OSError as error:
        raise ArtefactError(f"cannot read '{path}': {error.strerror or error}") from error


def read_object(path: Path, content: bytes) -> dict[str, object]:
    """A JSON object; ``path`` is for the error.

    Raises:
        ArtefactError: it is no JSON object.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"'{path}' is not JSON ({error}); it is broken or truncated") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"'{path}' must hold a JSON object, not a {type(value).__name__}")
    return value


def read_config(folder: Path, content: bytes) -> LoraConfig:
    """The configuration in ``adapter_config.json``.

    Raises:
        ArtefactError: no JSON, or not the configuration of a LoRA adapter.
    """
    path = folder / CONFIG_FILE
    data = read_object(path, content)
    if data.get("peft_type") != "LORA":
        raise ArtefactError(f"'{path}' says peft_type={data.get('peft_type')!r}; expected 'LORA'")
    try:
        return LoraConfig.from_dict(data)
    except (SmartinitError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(f"'{path}' is no usable LoRA configuration: {error}") from error


def read_factors(folder: Path, content: bytes) -> StoredTensors:
    """The content of ``adapter_model.safetensors``, if it is nothing but LoRA.

    Raises:
        ArtefactError: truncated or broken; a matrix without its partner; other tensors than LoRA's.
    """
    path = folder / TENSOR_FILE
    stored = read_tensors(path, content)
    _require_no_others(path, stored)
    return stored


def _require_no_others(path: Path, stored: StoredTensors) -> None:
    for key, tensor in stored.others.items():
        raise ArtefactError(
            f"'{path}' holds '{key}' of shape {tuple(tensor.shape)} and {tensor.dtype}; expected only matrices named "
            "...lora_A.weight, ...lora_B.weight and the like"
        )
