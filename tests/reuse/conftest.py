from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from reuse_cases import batches, forward, model

__all__ = ["batches", "forward", "model"]
