"""Sizes and times as people write them: ``10GB``, ``1.5GiB``, ``30d``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")
_POWERS = "kmgtp"
_BYTES: Mapping[str, int] = {
    "": 1,
    "b": 1,
    **{f"{unit}{end}": 1000 ** (power + 1) for power, unit in enumerate(_POWERS) for end in ("", "b")},
    **{f"{unit}ib": 1024 ** (power + 1) for power, unit in enumerate(_POWERS)},
}
_SECONDS: Mapping[str, int] = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class _Quantity(click.ParamType):  # type: ignore[type-arg] # generic in the newest click only
    """A number with a unit."""

    units: Mapping[str, int]
    example: str

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        """The number in the smallest unit."""
        if isinstance(value, (int, float)):
            return value
        match = _NUMBER.fullmatch(str(value).strip().lower().replace("_", ""))
        if match is None or match[2] not in self.units:
            self.fail(f"'{value}' is no {self.name}, such as {self.example}", param, ctx)
        return float(match[1]) * self.units[match[2]]


class Size(_Quantity):
    """Bytes: units of 1000 (kB, MB, GB, TB) or of 1024 (KiB, MiB, GiB, TiB)."""

    name = "size"
    units = _BYTES
    example = "500MB, 10GB or 1.5GiB"


class Duration(_Quantity):
    """Seconds: s, m, h, d or w."""

    name = "time"
    units = _SECONDS
    example = "12h, 30d or 2w"
