"""What a computation depends on besides its request and its data: the model, the caller's functions, the numerics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smartinit.activations.data_digest import callable_key
from smartinit.activations.rows import (
    forward_fn_dict,
    label_mask_options,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from smartinit.targets.fingerprint import model_fingerprint

if TYPE_CHECKING:
    from torch import nn

    from smartinit.job import Job
    from smartinit.reuse.data import Unit
    from smartinit.run_options import Options

ALGORITHM = 1
"""Of statistics, spectra and factors; raised whenever a change of the package changes a result."""

# The functions that select tokens by the batch's masks.
_READ_NO_PADDING = tuple(
    callable_key(function)
    for function in (
        forward_fn_dict,
        prepare_model_inputs_fn_language_modeling,
        prepare_layer_inputs_fn_language_modeling,
    )
)


@dataclass(frozen=True)
class Identity:
    """Of one call.

    Attributes:
        root: digest of the model.
        tensors: name -> digest.
        functions: name -> what identifies a function; None where nothing does.
        seed: of the call.
        skip_bad_batches: of the call.
    """

    root: str
    tensors: Mapping[str, str]
    functions: Mapping[str, Any]
    seed: int
    skip_bad_batches: bool

    @classmethod
    def of(cls, model: nn.Module, options: Options) -> Identity:
        """Cost: one read of the model's weights, unless their fingerprint is given.

        Raises:
            ModelError: a model without values, and no fingerprint.
        """
        fingerprint = model_fingerprint(model) if options.fingerprint is None else options.fingerprint
        functions = {**options.capture, "loss_fn": options.loss_fn}
        return cls(
            fingerprint.root,
            fingerprint.tensors,
            {name: _function_key(value) for name, value in functions.items()},
            options.seed,
            options.skip_bad_batches,
        )

    @property
    def problem(self) -> str | None:
        """Why what depends on the caller's functions has no name; None if it has one."""
        name = next((name for name, key in self.functions.items() if not _known(key)), None)
        if name is None:
            return None
        return (
            f"{name} is a function of your own, and nothing says when it changes; give it an attribute store_key='…' "
            "that you change with it"
        )

    def unit(self, job: Job) -> Unit:
        """Whether rows are all that counts, or also how they are padded and put into batches.

        A loss is a mean over a batch, a bad batch is left out as a whole, and functions of the caller's own may read
        what is padding.
        """
        own = any(key not in _READ_NO_PADDING for name, key in self.functions.items() if name != "loss_fn")
        return "batches" if own or self.skip_bad_batches or job.method.needs == "gradients" else "rows"

    def policy(self, job: Job) -> dict[str, Any]:
        """Everything but the data that the statistics of a job depend on, as leaves of a key."""
        return {
            "algorithm": ALGORITHM,
            "model": self.root,
            "functions": self.functions,
            "labels": label_mask_options(job.request.config),
            "skip_bad_batches": self.skip_bad_batches,
            "seed": self.seed,
            "unit": self.unit(job),
            "numerics": numerics(),
        }


def numerics() -> dict[str, Any]:
    """Settings of torch under which a forward pass gives other numbers."""
    autocast = str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else None
    if torch.cuda.is_available() and torch.is_autocast_enabled("cuda"):
        autocast = str(torch.get_autocast_dtype("cuda"))
    return {"autocast": autocast, "float32_products": torch.get_float32_matmul_precision()}


def _function_key(value: Any) -> object:  # noqa: ANN401 - a function, None, or a mapping of functions
    if isinstance(value, Mapping):
        return {str(name): callable_key(function) for name, function in value.items()}
    return callable_key(value)


def _known(key: object) -> bool:
    return all(value is not None for value in key.values()) if isinstance(key, Mapping) else key is not None
