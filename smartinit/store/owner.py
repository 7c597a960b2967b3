"""Whose a temporary file or a lease is, written into its name, so that what the dead have left can be told."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

FOREIGN_SECONDS = 24 * 3600
"""How long another machine's mark counts: whether its process lives cannot be seen from here."""


def owner_mark() -> str:
    """``<host>.<pid>`` of this process, as part of a file name."""
    return f"{host()}.{os.getpid()}"


def owner_lives(mark_host: str, pid: str, modified: float, now: float) -> bool:
    """Whether the process of a mark may still run.

    Args:
        mark_host: first part of its mark.
        pid: second part.
        modified: time of the marked file, seconds since the epoch.
        now: the same of now.
    """
    asked = mark_host == host() and pid.isascii() and pid.isdigit()
    if not asked or os.name == "nt":  # os.kill(pid, 0) is no question on Windows
        return abs(now - modified) < FOREIGN_SECONDS  # a clock may have gone backwards
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError, ValueError):  # also numbers of thousands of digits
        return False
    except PermissionError:
        return True
    return True


def host() -> str:
    """This machine's name as file names can have it, and its space of process numbers: containers share names."""
    kept = [letter if letter.isascii() and letter.isalnum() else "-" for letter in socket.gethostname().lower()]
    space = ""
    with suppress(OSError, AttributeError):
        space = "".join(filter(str.isdigit, os.readlink("/proc/self/ns/pid")))  # noqa: PTH115 - text, not a path
    return f"{''.join(kept)[:40] or 'host'}-{space}"
