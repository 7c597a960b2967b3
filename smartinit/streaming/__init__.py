"""Models larger than memory: their files are read tensor by tensor."""

from __future__ import annotations

from smartinit.streaming.shards import WeightFiles, find_weight_folder, open_weights

__all__ = ["WeightFiles", "find_weight_folder", "open_weights"]
