"""From options to the values that the rest works with; everything cheap is checked here, before torch is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from smartinit.config import INIT_METHODS, EvaConfig, LoraConfig
from smartinit.config.checks import closest
from smartinit.data.columns import ColumnNames
from smartinit.data.sampling import Sampling
from smartinit.errors import ConfigError
from smartinit.planning.limits import Limits

_REGEX = re.compile(r"[\\()\[\]|^$+?{}]")
_STEPS = re.compile(r"pissa_niter_\d+")
# LoRA's own starts, which PEFT writes as True and False.
_BOOLEANS = {"default": True, "kaiming": True, "true": True, "random": False, "false": False}
# As the tables of the documentation write them.
_PYTHON = {"True": True, "False": False, "None": None}
_NUMBERS = re.compile(r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*")


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        config: layers, rank and method.
        sampling: how the data is read.
        limits: bounds of the planner.
        planner: its name; None: the method's own.
        captured: share of each spectrum that ranks must capture, instead of ranks.
        max_batches: bound on the forward passes.
    """

    config: LoraConfig
    sampling: Sampling
    limits: Limits
    planner: str | None
    captured: float | None
    max_batches: int | None

    def planner_options(self) -> dict[str, Any]:
        """As keywords of `smartinit.compute`."""
        return {
            "planner": self.planner,
            "captured": self.captured,
            "budget": self.limits.budget,
            "params": self.limits.params,
            "rank_multiple_of": self.limits.multiple_of,
            "min_rank": self.limits.min_rank,
            "max_rank": self.limits.max_rank,
        }


def read_request(options: dict[str, Any]) -> Request:
    """Check the options of `adapter_options` and `data_options`.

    Raises:
        ConfigError: a value, or a combination, that cannot be.
    """
    return Request(
        config=_config(options),
        sampling=_sampling(options),
        limits=Limits(
            budget=options["budget"],
            params=options["params"],
            multiple_of=options["rank_multiple_of"],
            min_rank=options["min_rank"],
            max_rank=options["max_rank"],
        ),
        planner=options["planner"],
        captured=options["captured"],
        max_batches=options["max_batches"],
    )


def _config(options: dict[str, Any]) -> LoraConfig:
    method, rank = str(options["method"]).lower(), options["rank"]
    start: bool | str = _BOOLEANS.get(method, method)
    known = (*_BOOLEANS, *INIT_METHODS)
    if start not in INIT_METHODS and not isinstance(start, bool) and _STEPS.fullmatch(method) is None:
        raise ConfigError(f"unknown method '{method}'; known: {', '.join(known)}{closest(method, known)}")
    share = options["captured"]
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"--captured {share} cannot be: expected a share above 0, at most 1")
    if rank < 1:
        raise ConfigError(f"--rank {rank} cannot be: expected at least 1")
    return LoraConfig(
        r=rank,
        lora_alpha=rank if options["alpha"] is None else options["alpha"],
        use_rslora=options["rslora"],
        target_modules=read_modules(options["target_modules"]),
        exclude_modules=read_modules(options["exclude_modules"]),
        layers_to_transform=read_layers(options["layers_to_transform"]),
        init_lora_weights=start,
        init_options=read_options(options["init_options"]),
        frozen_a=options["frozen_a"],
        match_gain=options["match_gain"],
        base_model_name_or_path=options["model"],
        # Checked whatever the method: a wrong value is a mistake even where it has no effect.
        eva_config=_eva(options) if method == "eva" else None,
    )


def _eva(options: dict[str, Any]) -> EvaConfig:
    return EvaConfig(
        rho=options["rho"],
        tau=options["tau"],
        use_label_mask=options["label_mask"],
        whiten=options["whiten"],
        adjust_scaling_factors=options["adjust_scaling"],
    )


def _sampling(options: dict[str, Any]) -> Sampling:
    batches, samples = options["max_batches"], options["max_samples"]
    within = None if batches is None else batches * options["batch_size"]  # rows beyond need no tokens
    return Sampling(
        batch_size=options["batch_size"],
        max_length=options["max_length"],
        max_samples=min((bound for bound in (samples, within) if bound is not None), default=None),
        seed=options["seed"],
        split=options["split"],
        config_name=options["data_config"],
        mask_prompt=options["label_mask"],
        columns=ColumnNames(
            text=options["text_column"],
            prompt=options["prompt_column"],
            completion=options["completion_column"],
            messages=options["messages_column"],
        ),
    )


def read_modules(given: tuple[str, ...]) -> list[str] | str | None:
    """Names and wildcards as a list; one regular expression, or ``all-linear``, as a string; nothing as None."""
    if not given:
        return None
    patterns = [text for text in given if text == "all-linear" or _REGEX.search(text)]
    if patterns:
        if len(given) > 1:
            raise ConfigError(f"'{patterns[0]}' must stand alone: give either one regular expression, or names")
        return patterns[0]
    return [name.strip() for text in given for name in text.split(",") if name.strip()]


def read_options(given: tuple[str, ...]) -> dict[str, Any]:
    """``("corda_method=kpm", "iterations=4")`` → names and values; a value is JSON if it can be, else text.

    Raises:
        ConfigError: no ``=``, or a name twice.
    """
    read: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--option '{text}' is no option of a method; expected NAME=VALUE")
        if name.strip() in read:
            raise ConfigError(f"--option {name.strip()} is given twice")
        try:
            read[name.strip()] = _PYTHON.get(value) if value in _PYTHON else json.loads(value)
        except ValueError:
            read[name.strip()] = value
    return read


def read_layers(text: str | None) -> list[int] | None:
    """``"0,2-4"`` → ``[0, 2, 3, 4]``."""
    if text is None:
        return None
    plain = text.replace(" ", "")
    if not _NUMBERS.fullmatch(plain):
        raise ConfigError(f"--layers-to-transform '{text}' is no list of layers; expected numbers such as 0,1,4-7")
    layers: list[int] = []
    for part in plain.split(","):
        first, _, last = part.partition("-")
        layers += range(int(first), int(last or first) + 1)
    return layers
