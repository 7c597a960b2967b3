"""Which rows are read and how they are cut: the part of a request that concerns the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from smartinit.data.columns import ColumnNames
from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Sampling:
    """How rows become batches; equal values and equal data give equal batches.

    Attributes:
        batch_size: rows per batch.
        max_length: tokens per row; longer rows are cut on the right.
        max_samples: rows that are used at most; ``None`` uses all.
        seed: of the shuffle.
        split: split of a hub dataset or of a folder.
        config_name: configuration of a hub dataset.
        group_by_length: put rows of like length into one batch, which saves padding.
        mask_prompt: leave the tokens of prompts out.
        columns: column names given by the user.
    """

    batch_size: int = 4
    max_length: int = 1024
    max_samples: int | None = None
    seed: int = 0
    split: str = "train"
    config_name: str | None = None
    group_by_length: bool = True
    mask_prompt: bool = True
    columns: ColumnNames = field(default_factory=ColumnNames)

    def __post_init__(self) -> None:
        """Refuse what can hold no token."""
        for name in ("batch_size", "max_length", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sampling:
        """The inverse of `as_dict`."""
        return cls(**{**data, "columns": ColumnNames(**data["columns"])})
