"""The operating system as `smartinit.store.durable` sees it, with a look at every step that changes something."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from smartinit.store import durable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from typing_extensions import Self

CHANGING = frozenset({"open", "fsync", "replace", "link", "unlink", "utime", "mkdir", "chmod", "fchmod"})
"""Functions of `os` that durable calls to change something, or to make a change last."""


class Steps:
    """``os`` for durable: ``before`` hears of every step (its name and arguments), and may kill or raise."""

    def __init__(
        self, before: Callable[[str, tuple[Any, ...]], None], after: Callable[..., None] | None = None
    ) -> None:
        self.before, self.after = before, after

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CHANGING:
            return real

        def step(*args: Any, **options: Any) -> Any:
            self.before(name, args)
            result = real(*args, **options)
            if self.after is not None:
                self.after(name, args, result)
            return result

        return step

    def open_file(self, descriptor: int, *args: Any, **options: Any) -> _File:
        return _File(open(descriptor, *args, **options), self)


class _File:
    def __init__(self, file: Any, steps: Steps) -> None:
        self._file, self._steps = file, steps

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, view: memoryview) -> int:
        """In two halves, so that a fault can meet a write in its middle."""
        half = len(view) // 2
        if half:
            self._file.write(view[:half])
            self._after(half, view[:half])
        self._steps.before("write", (self.fileno(), len(view)))
        self._file.write(view[half:])
        self._after(len(view) - half, view[half:])
        return len(view)

    def _after(self, count: int, view: memoryview) -> None:
        if self._steps.after is not None:
            self._steps.after("write", (self.fileno(), bytes(view)), count)


@contextmanager
def watched(steps: Steps) -> Iterator[None]:
    """Durable's steps go through ``steps`` inside the block."""
    durable.os, durable.open = steps, steps.open_file  # type: ignore[attr-defined]
    try:
        yield
    finally:
        durable.os = os
        del durable.open  # type: ignore[attr-defined]


def content(number: int, bytes_: int = 50_000) -> bytes:
    """Bytes that are known from a number."""
    piece = hashlib.sha256(str(number).encode()).digest()
    return (piece * (bytes_ // len(piece) + 1))[:bytes_]


def entry_files(number: int) -> dict[str, bytes]:
    """What the writers of these tests store as number ``number``: one blob of its own, and one that many share."""
    return {"own": content(number), "shared": content(-1 - number % 3, 20_000), "empty": b""}


def audit(root: Path) -> list[str]:
    """What is wrong in a store, told without its own code: manifests, their blobs, and every blob's name."""
    blobs = [path for path in (root / "blobs").rglob("*") if path.is_file()]
    wrong = [path.name for path in blobs if hashlib.sha256(path.read_bytes()).hexdigest() != path.name]
    problems = [f"blob {name} has other bytes" for name in wrong]
    for path in (root / "entries").glob("*"):
        raw = path.read_bytes()
        body, _, check = raw.rpartition(b',"check":"')
        if (
            hashlib.sha256(body).hexdigest().encode() + b'"}\n' != check
            or json.loads(raw)["key"] + ".json" != path.name
        ):
            problems.append(f"manifest {path.name} is broken")
            continue
        named = {name: blob["sha256"] for name, blob in json.loads(raw)["blobs"].items()}
        lost = [name for name, sha in named.items() if not (root / "blobs/sha256" / sha[:2] / sha).is_file()]
        problems += [f"{path.name} has lost '{name}'" for name in lost]
    return problems
