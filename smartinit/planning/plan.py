"""A plan: how many ranks, and which alpha, every target gets."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Plan:
    """Rank and alpha by target name, in model order. Rank 0 means: no adapter there.

    Attributes:
        ranks: target name -> rank.
        alphas: target name -> lora_alpha (a target of rank 0 keeps the alpha it was given).
        use_rslora: scaling is ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    use_rslora: bool = False

    def __post_init__(self) -> None:
        """Freeze the mappings: a plan is a value."""
        object.__setattr__(self, "ranks", MappingProxyType(dict(self.ranks)))
        object.__setattr__(self, "alphas", MappingProxyType(dict(self.alphas)))

    @property
    def total(self) -> int:
        """Sum of all ranks."""
        return sum(self.ranks.values())

    def scaling(self, name: str) -> float:
        """The factor ``s`` of ``s·B A``; 0.0 for a target without an adapter."""
        rank = self.ranks[name]
        if rank == 0:
            return 0.0
        return self.alphas[name] / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def digest(self) -> str:
        """Sha256 of the canonical JSON."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {"ranks": dict(self.ranks), "alphas": dict(self.alphas), "use_rslora": self.use_rslora}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Plan:
        """The inverse of `as_dict`."""
        return cls(
            ranks=dict(data["ranks"]),  # type: ignore[call-overload]
            alphas=dict(data["alphas"]),  # type: ignore[call-overload]
            use_rslora=bool(data["use_rslora"]),
        )
