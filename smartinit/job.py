"""One artefact that is to be computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smartinit.methods.base import Method
    from smartinit.rank_request import RankRequest
    from smartinit.targets.weight import Target


@dataclass(frozen=True)
class Job:
    """One artefact to be computed.

    Attributes:
        method: how layers start.
        request: ranks.
        targets: the layers, in model order.
    """

    method: Method
    request: RankRequest
    targets: Sequence[Target]
