"""``python -m smartinit`` is the same as ``smartinit``."""

from __future__ import annotations

import sys

from smartinit.cli import main

if __name__ == "__main__":
    sys.exit(main())
