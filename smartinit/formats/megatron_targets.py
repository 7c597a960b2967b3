"""``target_modules`` that mean exactly the layers of an adapter, as short as they can be said."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_LAYER = re.compile(r"(?:language_model\.)?decoder\.layers\.(?P<layer>\d+)\.(?P<tail>.+)")
_EXPERT = re.compile(r"\.local_experts\.\d+\.")
_CANONICAL = {
    "adapter_q": "linear_q",
    "adapter_k": "linear_k",
    "adapter_v": "linear_v",
    "adapter_gate": "linear_fc1_gate",
    "adapter_up": "linear_fc1_up",
}


def target_modules(places: Iterable[tuple[str, str]], layers: int | None) -> list[str]:
    """What to give to ``LoRA(target_modules=…)``, or of canonical adapters to ``CanonicalLoRA``.

    The bare name of a layer, where every layer of the model has one; ``*`` and the end of the name for experts, which
    share their own names with others; the full names of all others.

    Args:
        places: name of the layer, and ending of its adapter (``""``, ``".adapter_q"``).
        layers: how many the model has; None: not known, and so all names are given in full.
    """
    found: dict[str, dict[int, list[str]]] = {}
    out: list[str] = []
    for module, ending in places:
        name = _named(module, ending)
        match = _LAYER.fullmatch(name)
        if match is None:
            out.append(name)
            continue
        tail = _EXPERT.sub(".local_experts.*.", match["tail"])
        found.setdefault(tail, {}).setdefault(int(match["layer"]), []).append(name)
    experts = any(".experts." in tail or ".shared_experts." in tail for tail in found)
    for tail, names in found.items():
        own = tail.rpartition(".")[2]
        if layers is None or len(names) != layers or len({len(ones) for ones in names.values()}) > 1:
            out += [name for ones in names.values() for name in ones]
        elif experts and "linear_fc" in own:
            out.append(f"*.{tail}")
        else:
            out.append(own)
    return list(dict.fromkeys(out))


def _named(module: str, ending: str) -> str:
    """The name by which a canonical target is asked for; that of the layer otherwise."""
    target = _CANONICAL.get(ending.removeprefix("."))
    return module if target is None else f"{module.rpartition('.')[0]}.{target}"
