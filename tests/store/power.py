"""A model of a disk that loses power: what was flushed is there, of the rest anything may be.

A file's bytes last once the file was flushed; before, they may be missing, cut off, or zeros. A name (made, renamed,
linked or removed) lasts once its folder was flushed; before, each change of a name may have come to the disk or not,
whatever the others did. A rename within one folder or between two is one change.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

FLUSHED, ALL, NOTHING = "only what was flushed", "all names, no bytes", "all names, zeros"


@dataclass
class Change:
    """Effects of one call on folders: (folder, name, the node that it has from now on, or None)."""

    effects: list[tuple[int, str, int | None]]
    lasting: bool = False


@dataclass
class Disk:
    """Everything that a program did below a folder, in order."""

    root: Path
    bytes: dict[int, bytearray] = field(default_factory=dict)  # of every file
    flushed: dict[int, bytes] = field(default_factory=dict)
    folders: set[int] = field(default_factory=set)
    changes: list[Change] = field(default_factory=list)
    descriptors: dict[int, int] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)  # inode -> node: a file system gives inodes out again

    def __post_init__(self) -> None:
        self.folders.add(self._new(self.root))

    def heard(  # noqa: C901 - one line for each call
        self, name: str, args: tuple[Any, ...], result: Any
    ) -> None:
        """One step of `faulty.Steps`, after it was done."""
        if name == "open":
            if args[1] & os.O_CREAT:
                node = self._new(args[0])
                self.bytes[node], self.flushed[node] = bytearray(), b""
                self._name(args[0], node)
            self.descriptors[result] = self._node(args[0])
        elif name == "write":
            self.bytes[self.descriptors[args[0]]] += args[1]
        elif name == "fsync":
            node = self.descriptors[args[0]]
            if node in self.bytes:
                self.flushed[node] = bytes(self.bytes[node])
            else:
                for change in self.changes:
                    change.lasting |= any(folder == node for folder, _, _ in change.effects)
        elif name == "mkdir":
            node = self._new(args[0])
            self.folders.add(node)
            self._name(args[0], node)
        elif name == "link":
            self._name(args[1], self._node(args[1]))
        elif name == "unlink":
            self._change([(args[0], None)])
        elif name == "replace":
            self._change([(args[0], None), (args[1], self._node(args[1]))])

    def crash(self, into: Path, how: str, random_: random.Random) -> None:
        """What is on the disk if the power fails now, as files below a new folder."""
        named: dict[int, dict[str, int]] = {folder: {} for folder in self.folders}
        for change in self.changes:
            kept = how != FLUSHED and (how in (ALL, NOTHING) or random_.random() < 0.5)
            if change.lasting or kept:
                for folder, name, node in change.effects:
                    if node is None:
                        named[folder].pop(name, None)
                    else:
                        named[folder][name] = node
        self._make(self._node(self.root), into, named, how, random_)

    def _make(
        self, folder: int, place: Path, named: dict[int, dict[str, int]], how: str, random_: random.Random
    ) -> None:
        place.mkdir()
        for name, node in named[folder].items():
            if node in self.folders:
                self._make(node, place / name, named, how, random_)
            else:
                (place / name).write_bytes(self._content(node, how, random_))

    def _content(self, node: int, how: str, random_: random.Random) -> bytes:
        flushed, written = self.flushed[node], bytes(self.bytes[node])
        if flushed == written or how in (FLUSHED, ALL):
            return flushed
        zeros = flushed + bytes(len(written) - len(flushed))
        if how == NOTHING:
            return zeros
        return random_.choice([flushed, zeros, written[: random_.randrange(len(written))], written])

    def _name(self, path: str | Path, node: int) -> None:
        self._change([(path, node)])

    def _change(self, effects: list[tuple[str | Path, int | None]]) -> None:
        self.changes.append(Change([(self._node(Path(path).parent), Path(path).name, node) for path, node in effects]))

    def _new(self, path: str | Path) -> int:
        self.nodes[Path(path).stat().st_ino] = len(self.folders) + len(self.bytes) + 1
        return self._node(path)

    def _node(self, path: str | Path) -> int:
        return self.nodes.get(Path(path).stat().st_ino, 0)  # 0: above the root
