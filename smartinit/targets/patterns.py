"""PEFT's rules for which module names a config means, and which rank and alpha it gives them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from smartinit.config.lora import entries_regex
from smartinit.targets.names import base_names, match_names, normalise_name
from smartinit.targets.pattern_index import compiled, pattern_index

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from smartinit.config import LoraConfig

T = TypeVar("T")


@lru_cache(maxsize=1 << 16)
def _wildcard(entry: str) -> re.Pattern[str]:
    return re.compile(entries_regex([entry]))


def in_entries(entries: Collection[str], name: str) -> bool:
    """Whether a list entry is the whole name or a dotted suffix of it; ``*`` in an entry is any text."""
    suffix = name
    while True:
        if suffix in entries:
            return True
        _, dot, suffix = suffix.partition(".")
        if not dot:
            break
    return any(_wildcard(entry).fullmatch(name) for entry in entries if "*" in entry)


def is_excluded(config: LoraConfig, name: str) -> bool:
    """Whether ``exclude_modules`` names this module, or ``modules_to_save`` names it or a module around it."""
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if compiled(excluded).fullmatch(name):
            return True
    elif excluded and in_entries(excluded, name):
        return True
    saved = config.modules_to_save or ()
    return any(compiled(rf"(^|.*\.){entry}($|\..*)").match(name) for entry in saved)


def match_module(config: LoraConfig, name: str) -> bool:
    """Whether the config makes a target of the module with this name in the base model.

    As PEFT: a string is a regular expression for the whole name; a list entry is a whole name or a dotted suffix, and
    layers_to_transform then chooses among the suffix matches. ``target_modules=None`` and ``"all-linear"`` depend on
    the model and match nothing here: `select_targets` resolves them.
    """
    targets = config.target_modules
    if targets is None or is_excluded(config, name):
        return False
    if isinstance(targets, str):
        return compiled(targets).fullmatch(name) is not None
    # PEFT looks at the layer's number only if the name was not given in full.
    return name in targets or (in_entries(targets, name) and in_chosen_layers(config, name))


def in_chosen_layers(config: LoraConfig, name: str) -> bool:
    """Whether ``layers_to_transform`` includes the layer of this name, or does not restrict the layers at all."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    pattern = config.layers_pattern
    parents = [pattern] if isinstance(pattern, str) else pattern
    # Lazily, to find the layer's number and not that of an expert inside it. As in PEFT, without layers_pattern the
    # number needs two parts before it: `transformer.h.0.attn` has one, `h.0.attn` has not.
    before = [rf"(?:^|.*?\.){parent}" for parent in parents or ()] or [r".*?\.[^.]*"]
    matches = (compiled(rf"{start}\.(?P<layer>\d+)\.").match(name) for start in before)
    found = next((match for match in matches if match), None)
    if found is None:
        return False
    number = int(found["layer"])
    return number == layers if isinstance(layers, int) else number in layers


def rank_finder(config: LoraConfig) -> Callable[[str], int]:
    """`rank_for` of many names, for as long as the configuration stays as it is: its patterns are gone through once."""
    return _finder(config.rank_pattern, config.r)


def alpha_finder(config: LoraConfig) -> Callable[[str], float]:
    """`alpha_for` of many names, as `rank_finder`."""
    return _finder(config.alpha_pattern, config.lora_alpha)


def rank_for(config: LoraConfig, name: str) -> int:
    """The rank of a module: ``rank_pattern``'s, else ``r``. Wrappers before the name do not matter, ``^`` does."""
    return rank_finder(config)(name)


def alpha_for(config: LoraConfig, name: str) -> float:
    """The alpha of a module: ``alpha_pattern``'s, else ``lora_alpha``; names as in `rank_for`."""
    return alpha_finder(config)(name)


def _finder(patterns: Mapping[str, T], default: T) -> Callable[[str], T]:
    """PEFT's rule: the first pattern that matches the name's end; failing that, the name itself as a key."""
    if not patterns:
        return lambda _: default
    index = pattern_index(tuple(patterns))

    def find(name: str) -> T:
        names = base_names(name)
        key = index.first(names)
        if key is not None:
            return patterns[key]
        return next((patterns[candidate] for candidate in names if candidate in patterns), default)

    return find


__all__ = [
    "alpha_finder",
    "alpha_for",
    "in_chosen_layers",
    "in_entries",
    "is_excluded",
    "match_module",
    "match_names",
    "normalise_name",
    "rank_finder",
    "rank_for",
]
