"""The modules that are trained, and writing computed factors into them."""

from __future__ import annotations

from smartinit.adapters.attach import write_factors
from smartinit.adapters.checkpoints import AdapterCheckpoints
from smartinit.adapters.layer import LoraLayer
from smartinit.adapters.model import LoraModel

__all__ = ["AdapterCheckpoints", "LoraLayer", "LoraModel", "write_factors"]
