"""Models and tokenizers through transformers: safetensors only, no remote code unless asked, no surprises."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from smartinit.cli.model_folder import check_model_folder, is_local
from smartinit.errors import ConfigError, MissingFileError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) | frozenset(
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
)


@dataclass(frozen=True)
class ModelSource:
    """A model that has been found and whose configuration has been read.

    Attributes:
        name: folder or hub id, as the user gave it.
        config: transformers' configuration.
        local: whether it is a folder.
        trust_remote_code: the user allowed it.
    """

    name: str
    config: Any
    local: bool
    trust_remote_code: bool = False

    @property
    def model_class(self) -> Any:  # noqa: ANN401 - a class of transformers
        """The class that the checkpoint was saved from: module names then are those a trainer sees."""
        for name in self.config.architectures or ():
            found = getattr(transformers, name, None)
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
                return found
        if "AutoModelForCausalLM" in (getattr(self.config, "auto_map", None) or {}):
            return transformers.AutoModelForCausalLM
        return transformers.AutoModel

    @property
    def causal(self) -> bool:
        """Whether it is a language model that predicts the next token."""
        chosen = self.model_class
        return chosen is transformers.AutoModelForCausalLM or chosen.__name__ in _CAUSAL

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding."""
        return getattr(self.config.get_text_config(), "vocab_size", None)

    @property
    def options(self) -> dict[str, Any]:
        """Common keywords of ``from_pretrained``."""
        return {"local_files_only": self.local, "trust_remote_code": self.trust_remote_code}


def find_model(model: str, *, trust_remote_code: bool = False, weights: bool = True) -> ModelSource:
    """Check the folder and read its configuration.

    Raises:
        MissingFileError: neither a folder nor an id of the hub that can be reached.
        ModelError: the folder is no model, or one that this command cannot run.
    """
    local = is_local(model)
    path = str(Path(model).expanduser()) if local else model
    if local:
        check_model_folder(Path(path), weights=weights)
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(
                path, local_files_only=local, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            raise _unreadable(model, local, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"the model {model} is an encoder-decoder, which the command line cannot feed; "
            "call smartinit.compute with a data loader of your own"
        )
    return ModelSource(path, config, local, trust_remote_code)


def load_tokenizer(source: ModelSource) -> Any:  # noqa: ANN401 - transformers' tokenizers have many classes
    """The tokenizer that lies beside the model.

    Raises:
        ModelError: there is none.
    """
    with quiet_transformers():
        try:
            return transformers.AutoTokenizer.from_pretrained(source.name, **source.options)
        except Exception as error:
            raise ModelError(
                f"the model {source.name} has no readable tokenizer ({_first_line(error)}); put tokenizer.json and "
                "tokenizer_config.json beside it"
            ) from error


def load_weights(source: ModelSource, *, dtype: str = "auto", device: str = "auto") -> nn.Module:
    """The model in eval mode on its device, its weights checked.

    Raises:
        ConfigError: a device that does not exist.
        ModelError: weights that are missing, do not fit the configuration, or are not finite.
    """
    place = choose_device(device)
    with quiet_transformers():
        try:
            model, info = source.model_class.from_pretrained(
                source.name,
                config=source.config,
                dtype=_choose_dtype(dtype, source.config, place),
                use_safetensors=True,
                low_cpu_mem_usage=True,
                output_loading_info=True,
                **source.options,
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise _unreadable(source.name, source.local, error) from error
    missing = sorted(info["missing_keys"])
    if missing and source.model_class is not transformers.AutoModel:
        raise ModelError(
            f"the weights of {source.name} lack {len(missing)} tensors of {source.model_class.__name__}, "
            f"for instance '{missing[0]}'; download the model again"
        )
    require_finite(model, source.name)
    return model.to(place).eval()  # type: ignore[no-any-return]


def load_model(
    path_or_id: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Model and tokenizer in one call; see `find_model`, `load_tokenizer`, `load_weights` for what is raised."""
    source = find_model(path_or_id, trust_remote_code=trust_remote_code)
    return load_weights(source, dtype=dtype, device=device), load_tokenizer(source)


def meta_model(source: ModelSource) -> nn.Module:
    """The model's modules without weights, for a dry run.

    Raises:
        ModelError: its configuration does not make a model.
    """
    with quiet_transformers(), torch.device("meta"):
        try:
            if hasattr(source.model_class, "from_config"):  # an auto class
                return source.model_class.from_config(source.config, trust_remote_code=source.trust_remote_code)  # type: ignore[no-any-return]
            return source.model_class(source.config)  # type: ignore[no-any-return]
        except Exception as error:
            raise ModelError(f"the configuration of {source.name} makes no model: {_first_line(error)}") from error


def choose_device(name: str) -> torch.device:
    """``auto`` is the first accelerator, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name} is not here: {_first_line(error)}") from error
    return device


def longest_input(source: ModelSource, tokenizer: Any) -> int | None:  # noqa: ANN401
    """Tokens that the model can read at most, if it says so."""
    text = source.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    bounds = [
        bound for bound in (positions, tokenizer.model_max_length) if isinstance(bound, int) and 0 < bound < 10**9
    ]
    return min(bounds, default=None)


def require_finite(model: nn.Module, name: str) -> None:
    """Refuse weights with NaN or Inf; one pass over the memory, no copies.

    Raises:
        ModelError: names the first such tensor.
    """
    for key, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.numel() == 0 or weight.is_meta or weight.element_size() == 1:
            continue  # aminmax knows no float8
        low, high = torch.aminmax(weight.detach())  # both are NaN if any element is
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ModelError(f"the weights of {name} are not finite: '{key}' holds NaN or Inf; use another checkpoint")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no log lines of transformers; errors still raise."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _choose_dtype(name: str, config: Any, device: torch.device) -> Any:  # noqa: ANN401
    if name != "auto":
        return getattr(torch, name)
    saved = getattr(config, "dtype", None)
    # Half precision on a CPU is slow and overflows where the GPU's kernels do not.
    return torch.float32 if device.type == "cpu" and saved in (torch.float16, "float16") else "auto"


def _unreadable(model: str, local: bool, error: Exception) -> Exception:
    if not local and isinstance(error, OSError):
        return MissingFileError(
            f"'{model}' is neither a folder here nor a model of the hub that can be reached; check --model"
        )
    return ModelError(f"the model {model} cannot be loaded: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
