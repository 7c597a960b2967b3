"""Run by test_kills.py: writers are forked and killed, and what they leave is looked at by another fork.

    python kills.py FOLDER steps 1              one kill at every step of a put
    python kills.py FOLDER random COUNT [SEED]  kills at random moments

Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))
from faulty import Steps, audit, content, entry_files, watched

from smartinit.store.local import LocalStore
from smartinit.store.prune import plan_prune

if TYPE_CHECKING:
    from collections.abc import Callable

warnings.simplefilter("error")


def forked(work: Callable[[], None]) -> int:
    """Process id of a child that does some work and ends."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        os._exit(code)


def ended(child: int) -> int:
    """Its exit code; negative: the signal that ended it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def look(root: Path, keys: range, acknowledged: int) -> None:
    """In a process of its own: every key is absent or whole, what was acknowledged is there, writing goes on."""
    assert audit(root) == []
    store = LocalStore(root)
    for number in keys:
        entry = store.get(f"k{number}", tensors=False)
        assert entry is not None or number >= acknowledged, f"k{number} was acknowledged, and is lost"
        if entry is not None:
            assert {name: path.read_bytes() for name, path in entry.files.items()} == entry_files(number)
            entry.close()
    number = keys[-1]
    store.put(f"k{number}", files=entry_files(number), tags=["all"])
    assert store.get(f"k{number}", tensors=False) is not None
    plan_prune(store).execute()
    left = [path.name for path in store.layout.unfinished.iterdir()]
    assert left == [], f"unfinished files of the dead stay: {left}"
    assert store.get(f"k{number}", tensors=False) is not None
    assert audit(root) == []


def at_every_step(folder: Path) -> dict[str, int]:
    """Kill a put at its first step, its second, and so on, in a new store and in one that has entries."""
    kills = 0
    for name, existing in (("new", 0), ("used", 2)):
        for step in range(1, 1000):
            root = folder / f"{name}{step}"
            for number in range(existing):
                LocalStore(root).put(f"k{number}", files=entry_files(number), tags=["all"])

            def write(root: Path = root, step: int = step, existing: int = existing) -> None:
                left = [step]

                def before(_name: str, _args: tuple[object, ...]) -> None:
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)

                with watched(Steps(before)):
                    LocalStore(root).put(f"k{existing}", files=entry_files(existing), tags=["all"])

            code = ended(forked(write))
            assert code in (0, -signal.SIGKILL), code
            acknowledged = existing + (code == 0)
            assert ended(forked(partial(look, root, range(existing + 1), acknowledged))) == 0, f"{name}, step {step}"
            if code == 0:
                break
            kills += 1
        else:
            raise AssertionError("a put of a thousand steps")
    return {"kills": kills}


def whole(root: Path, first: int, acknowledged: int) -> int:
    """Exit code of a process that looks."""
    return ended(forked(lambda: look(root, range(first, acknowledged + 1), acknowledged)))


def at_random(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Kill writers that put entries one after the other, now and then the same again, or in place of another."""
    random_, survivors, lost = random.Random(seed), 0, 0
    root, first = folder / "store", 0
    for _ in range(count):
        reads, writes = os.pipe()

        def write(root: Path = root, first: int = first, writes: int = writes) -> None:
            store = LocalStore(root)
            for number in range(first, first + 200):
                store.put(f"k{number}", files=entry_files(number), tags=["all"], replace=number % 5 == 0)
                if number % 7 == 0:
                    store.put(f"k{number}", files=entry_files(number))
                os.write(writes, b".")

        child = forked(write)
        os.close(writes)
        assert os.read(reads, 1), "the writer has ended"
        time.sleep(random_.expovariate(1 / 0.02))
        os.kill(child, signal.SIGKILL)
        ended(child)
        written = 1
        while got := os.read(reads, 1000):
            written += len(got)
        os.close(reads)
        acknowledged = first + written
        assert whole(root, first, acknowledged) == 0, f"after {acknowledged} entries"
        survivors += written
        lost += written == 200
        first = acknowledged + 1
        if first > 400:  # auditing all of it takes longer and longer
            root, first = folder / f"store{survivors}", 0
    return {"kills": count - lost, "acknowledged": survivors}


if __name__ == "__main__":
    where, how, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    assert content(1) != content(2)
    found = at_every_step(where) if how == "steps" else at_random(where, times, int(sys.argv[4]))
    sys.stdout.write(json.dumps(found) + "\n")
