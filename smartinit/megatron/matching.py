"""Which modules a configuration in Megatron Bridge's words means."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from smartinit.adapters.parallel.base import is_linear
from smartinit.config import checks
from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

DEFAULT_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@lru_cache(maxsize=4096)
def _expression(pattern: str) -> re.Pattern[str]:
    """``*`` is any text, dots included, also none; every other character is itself."""
    return re.compile(".*".join(re.escape(part) for part in pattern.split("*")))


def fits(pattern: str, name: str | None, full_name: str | None) -> bool:
    """Whether a pattern is a module's own name, or matches its full one."""
    return name == pattern or (full_name is not None and _expression(pattern).fullmatch(full_name) is not None)


@dataclass
class ModuleMatcher:
    """Targets by name: the fields that all of Megatron Bridge's adapters have.

    Attributes:
        target_modules: names of modules wherever they are (``"linear_qkv"``), or patterns for full names
            (``"*.layers.0.*.linear_qkv"``) in which ``*`` is any text and a dot is a dot.
        exclude_modules: all linear layers but those whose names or full names these match; ``target_modules`` must be
            empty then.
        canonical_mapping: of `smartinit.megatron.CanonicalLoRA`: layer -> the projections in it that are adapted.
    """

    target_modules: list[str] = field(default_factory=lambda: list(DEFAULT_TARGETS))
    exclude_modules: list[str] = field(default_factory=list)
    canonical_mapping: dict[str, set[str]] = field(default_factory=dict)

    def patterns(self) -> list[str]:
        """What names are compared with, the first that fits wins; empty: all linear layers but the excluded ones.

        Raises:
            ConfigError: targets and exclusions together.
            ArgumentError: no lists of names.
        """
        for name in ("target_modules", "exclude_modules"):
            checks.names(name, getattr(self, name) or [])
        chosen = list(self.canonical_mapping or self.target_modules or [])
        if chosen and self.exclude_modules:
            raise ConfigError(
                f"exclude_modules={self.exclude_modules} goes with an empty target_modules only (all linear layers but "
                f"those), not with {chosen}; give one of the two"
            )
        return chosen

    def fitting(self, name: str | None, prefix: str | None) -> list[str]:
        """All patterns that fit a module; see `match`."""
        full_name = f"{prefix}.{name}" if prefix else name
        return [pattern for pattern in self.patterns() if fits(pattern, name, full_name)]

    def match(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> tuple[str, str] | None:
        """The pattern that makes a target of a module, and the module's full name; None if there is none.

        Args:
            m: the module.
            name: its own name.
            prefix: the full name of what it is in.

        Raises:
            ConfigError: targets and exclusions together.
        """
        full_name = f"{prefix}.{name}" if prefix else name
        patterns = self.patterns()
        for pattern in patterns:
            if fits(pattern, name, full_name):
                return pattern, full_name or ""
        if patterns or not is_linear(m):
            return None
        if any(fits(pattern, name, full_name) for pattern in self.exclude_modules):
            return None
        return name or "", full_name or ""
