"""Names of the same module under the wrappers that models are put in."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Child names under which torch.compile, FSDP and activation checkpointing keep the module that they stand for."""

# `module` is what DistributedDataParallel calls the model; but a model may have an attribute of that name.
_AMBIGUOUS = "module."
_PREFIXES = ("base_model.model.", *(f"{wrapper}." for wrapper in WRAPPERS), _AMBIGUOUS)
_INSIDE = re.compile(rf"\.(?:{'|'.join((*WRAPPERS, 'base_layer'))})(?=\.|$)")


def spellings(name: str) -> tuple[str, ...]:
    """The name, without wrappers inside it, and then with one leading wrapper less each time."""
    found = [name]
    shorter = _INSIDE.sub("", name)
    while shorter:
        if shorter != found[-1]:
            found.append(shorter)
        prefix = next((prefix for prefix in _PREFIXES if shorter.startswith(prefix)), None)
        if prefix is None:
            break
        shorter = shorter.removeprefix(prefix)
    return tuple(found)


def normalise_name(name: str) -> str:
    """The module's name in the base model.

    Takes off any stack of leading ``base_model.model.`` (PEFT), ``module.`` (data parallel), ``_orig_mod.``
    (torch.compile) and ``_fsdp_wrapped_module.``, and the same kind of wrapper inside the name, a ``.base_layer``
    included. Where a model may have an attribute called ``module``, compare with what exists: `match_names`.
    """
    return spellings(name)[-1]


def base_names(name: str) -> tuple[str, ...]:
    """The names that it can have in the base model: several only if ``module.`` may be an attribute of the model."""
    found = spellings(name)
    start = len(found) - 1
    while start > 0 and found[start - 1] == _AMBIGUOUS + found[start]:
        start -= 1
    return found[start:]


def match_names(wanted: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    """Which available name each wanted one means: itself if it is there, else the same one under other wrappers.

    Two wanted names never get the same available one, and names which differ by the fewest wrappers are matched
    first, so that a model's own attribute called ``module`` is told from a wrapper. A wanted name without a partner
    is left out. Cost: O(n log n).
    """
    wanted = list(wanted)
    by_spelling: dict[str, list[tuple[int, str]]] = {}
    for name in available:
        for taken_off, spelling in enumerate(spellings(name)):
            by_spelling.setdefault(spelling, []).append((taken_off, name))
    pairs = [
        (taken_off + also, name, partner)
        for name in wanted
        for taken_off, spelling in enumerate(spellings(name))
        for also, partner in by_spelling.get(spelling, ())
    ]
    found: dict[str, str] = {}
    used: set[str] = set()
    for _, name, partner in sorted(pairs, key=lambda pair: pair[0]):
        if name not in found and partner not in used:
            found[name] = partner
            used.add(partner)
    return {name: found[name] for name in wanted if name in found}
