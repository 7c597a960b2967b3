"""Whether two configurations train the same things, so that values of one adapter can take the place of another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from smartinit.config import LoraConfig


def _rows(trained: object) -> object:
    """Which rows are trained; a list means those of the input embedding, whatever its name."""
    if isinstance(trained, Mapping):
        trained = next(iter(trained.values())) if len(trained) == 1 else dict(trained)
    return trained or None


# What two adapters must have in common -> how its values are compared. Whole modules are compared by their tensors'
# names as well, which do not say which rows or which parameter they are for.
_OPTIONS: Mapping[str, Callable[[Any], object]] = {
    "use_dora": bool,
    "lora_bias": bool,
    "bias": str,
    "ensure_weight_tying": bool,
    "target_parameters": lambda names: list(names or ()),
    "trainable_token_indices": _rows,
    "modules_to_save": bool,
}


def difference(mine: LoraConfig, other: LoraConfig) -> tuple[str, str] | None:
    """Where they train different things, ``("option=value", "other value")``; None if they do not."""
    for option, meaning in _OPTIONS.items():
        ours, theirs = getattr(mine, option), getattr(other, option)
        if meaning(ours) != meaning(theirs):
            return f"{option}={ours!r}", repr(theirs)
    return None
