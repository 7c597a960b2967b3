"""The options of single methods, under PEFT's names and with its defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from smartinit.config.checks import choice, integer, number, positive
from smartinit.errors import ArgumentError

T = TypeVar("T")

# LoRA-GA's authors and PEFT name two of the four scales differently; PEFT's names are kept.
_SCALES = MappingProxyType({"gd": "gd_scale", "weightS": "weight_svd"})


@dataclass
class LoraRuntimeConfig:
    """How, not what, to compute; never saved. See PEFT's class of this name."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """LoftQ (arXiv 2310.08659).

    Attributes:
        loftq_bits: width of the quantised base: 2, 4 or 8.
        loftq_iter: alternating steps, at least 1.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        choice("loftq_bits", self.loftq_bits, (2, 4, 8))
        self.loftq_iter = integer("loftq_iter", self.loftq_iter, 1)


@dataclass
class EvaConfig:
    """EVA (arXiv 2410.07170).

    Attributes:
        rho: a layer's rank may grow to ``r * rho`` when ranks are redistributed; 1 keeps them equal.
        tau: a direction has settled once its cosine with the estimate before is at least this, in 0..1.
        use_label_mask: leave out tokens whose label is ``label_mask_value``.
        label_mask_value: see ``use_label_mask``.
        whiten: divide row ``j`` of ``A`` by the square root of its singular value.
        adjust_scaling_factors: keep ``alpha / rank`` constant when a rank changes.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        """Check the fields."""
        number("rho", self.rho, "a finite number of at least 1", 1, math.inf)
        number("tau", self.tau, "a number from 0 to 1", 0, 1)


@dataclass
class CordaConfig:
    """CorDA (arXiv 2406.05223).

    Attributes:
        cache_file: what was computed lies here, or is kept here: safetensors with a digest of model, data and
            options; a file for anything else is refused. (PEFT's pickle is.)
        covariance_file: likewise, the inputs' second moments.
        corda_method: ``"ipm"`` starts from the directions that the data uses most, ``"kpm"`` from those it uses
            least, which spares what the base model knows.
        verbose: PEFT's; progress is shown by the caller here.
        use_float16_for_covariance: PEFT's; covariances are kept in full precision here.
        prune_temporary_fields: PEFT's; nothing is left on the model here.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        """Check the fields."""
        choice("corda_method", self.corda_method, ("ipm", "kpm"))


@dataclass
class LoraGAConfig:
    """LoRA-GA (arXiv 2407.05000).

    Attributes:
        direction: which singular vectors of the gradient go to ``A`` and which to ``B``.
        scale: how they are scaled; the authors' names ``"gd"`` and ``"weightS"`` are taken for PEFT's.
        stable_gamma: the gamma of ``scale="stable"``.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        """Check the fields."""
        choice("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        if isinstance(self.scale, str):
            self.scale = _SCALES.get(self.scale, self.scale)  # type: ignore[assignment]
        choice("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        positive("stable_gamma", self.stable_gamma)


METHOD_CONFIGS: Mapping[str, tuple[str, type[Any]]] = MappingProxyType(
    {
        "eva": ("eva_config", EvaConfig),
        "corda": ("corda_config", CordaConfig),
        "loftq": ("loftq_config", LoftQConfig),
        "lora_ga": ("lora_ga_config", LoraGAConfig),
    }
)
"""Method -> (field of `LoraConfig`, class). A table, so that one method's options cannot hide another's."""


def read_config(name: str, value: object, kind: type[T]) -> T | None:
    """A method's options from our class, PEFT's class of the same name, a dict, or nothing (None or an empty dict).

    Raises:
        ConfigError: a key that does not exist, or a value that cannot be.
        ArgumentError: anything else.
    """
    keys = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if value is None or value == {}:
        return None
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        for key in value:
            choice(f"{name}'s key", key, keys)
        return kind(**value)
    if type(value).__name__ == kind.__name__:
        return kind(**{key: getattr(value, key) for key in keys if hasattr(value, key)})
    raise ArgumentError(
        f"{name} is a {type(value).__name__}, but a {kind.__name__}, a dict or None was expected: "
        f"write {name}={kind.__name__}(...)"
    )
