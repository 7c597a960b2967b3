"""Run by test_eviction.py: readers, writers and pruning at once, each a process of its own.

    python eviction.py FOLDER rules|sweeps|killed ROUNDS SEED

rules   pruning removes entries all the time: every read gives the right bytes or nothing
sweeps  pruning removes only blobs that nothing names, without a grace: what was put is there
killed  the same, and pruning is killed all the time: what was put is there in the end

Prints one JSON object: what was done how often.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))
from faulty import audit, content

from smartinit.store import prune
from smartinit.store.local import LocalStore
from smartinit.store.prune import plan_prune

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = 8
warnings.simplefilter("error")
prune.GRACE = -1.0  # type: ignore[misc, attr-defined]


def files(number: int) -> dict[str, bytes]:
    return {"own": content(number, 5_000), "shared": content(-1 - number % 2, 3_000)}


def right(store: LocalStore, number: int) -> bool:
    """Whether the entry is there; if so, all that its reader sees is right, until the end."""
    entry = store.get(f"k{number}", tensors=False)
    if entry is None:
        return False
    with entry:
        for _ in range(2):
            assert {name: bytes(entry.content(name)) for name in entry.files} == files(number), "wrong bytes"
            time.sleep(0.0005)
    return True


class Party:
    """Processes that work until the writers among them are done."""

    def __init__(self, root: Path, seed: int) -> None:
        self.store = LocalStore(root / "store")
        self.stop, self.said, self.seed = root / "stop", root / "said", seed
        self.said.mkdir(parents=True)
        self.children: dict[int, bool] = {}

    def add(self, work: Callable[[random.Random], dict[str, int]], *, waited_for: bool = False) -> int:
        number = len(self.children)
        child = os.fork()
        if not child:
            code = 1
            try:
                (self.said / str(number)).write_text(json.dumps(work(random.Random(self.seed * 100 + number))))
                code = 0
            finally:
                if code:
                    sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(code)
        self.children[child] = waited_for
        return child

    def until_done(self, random_: random.Random, work: Callable[[random.Random], dict[str, int]]) -> dict[str, int]:
        total: dict[str, int] = {}
        while not self.stop.exists():
            for name, count in work(random_).items():
                total[name] = total.get(name, 0) + count
        return total

    def end(self) -> dict[str, int]:
        codes = {os.waitpid(child, 0)[1] for child, waited_for in self.children.items() if waited_for}
        self.stop.touch()
        codes |= {os.waitpid(child, 0)[1] for child, waited_for in self.children.items() if not waited_for}
        assert codes == {0}, codes
        total: dict[str, int] = {}
        for path in self.said.iterdir():
            for name, count in json.loads(path.read_text()).items():
                total[name] = total.get(name, 0) + count
        return total


def read(store: LocalStore, random_: random.Random) -> dict[str, int]:
    return {"reads": 1, "hits": int(right(store, random_.randrange(KEYS)))}


def gc(store: LocalStore, random_: random.Random, *, rules: bool) -> dict[str, int]:
    plan = plan_prune(store, max_bytes=random_.choice([0, 10_000]) if rules else None)
    freed = plan.execute()
    assert not freed.problems, freed.problems
    return {"gc": 1, "evicted": freed.entries, "swept": freed.blobs}


def remove(store: LocalStore, random_: random.Random) -> dict[str, int]:
    time.sleep(0.002)
    return {"removed": int(store.remove(f"k{random_.randrange(KEYS)}"))}


def write(store: LocalStore, random_: random.Random, rounds: int) -> dict[str, int]:
    for _ in range(rounds):
        number = random_.randrange(KEYS)
        store.put(f"k{number}", files=files(number), tags=["all"], replace=random_.random() < 0.2)
    return {"puts": rounds}


def put_and_remove(store: LocalStore, rounds: int, number: int) -> dict[str, int]:
    """Each writer has keys of its own, and blobs that it shares."""
    for index in range(rounds):
        store.put(f"k{number}", files=files(number))
        assert right(store, number), f"put {index} of k{number} is lost"
        if index + 1 < rounds:
            store.remove(f"k{number}")
    return {"puts": rounds, "lost": 0}


def keep_killing(party: Party, random_: random.Random) -> dict[str, int]:
    kills = 0
    while not party.stop.exists():
        child = os.fork()
        if not child:
            while True:  # until it is killed
                gc(party.store, random_, rules=False)
        time.sleep(random_.expovariate(1 / 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    return {"kills": kills}


def put_much(store: LocalStore, rounds: int, number: int) -> dict[str, int]:
    for index in range(rounds):
        store.put(f"k{number}-{index}", files=files(number))
        if index + 1 < rounds:
            store.remove(f"k{number}-{index}")
    store.put(f"k{number}", files=files(number))
    return {"puts": rounds}


def main() -> None:
    root, what, rounds, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    party = Party(root, seed)
    store = party.store
    store.put("k0", files=files(0))
    if what == "rules":
        for _ in range(2):
            party.add(lambda random_: write(store, random_, rounds), waited_for=True)
            party.add(lambda random_: party.until_done(random_, lambda random_: gc(store, random_, rules=True)))
        for _ in range(3):
            party.add(lambda random_: party.until_done(random_, lambda random_: read(store, random_)))
        party.add(lambda random_: party.until_done(random_, lambda random_: remove(store, random_)))
    else:
        work = put_and_remove if what == "sweeps" else put_much
        for number in range(4):
            party.add(lambda _random, number=number: work(store, rounds, number), waited_for=True)
        for _ in range(2):
            if what == "sweeps":
                party.add(lambda random_: party.until_done(random_, lambda random_: gc(store, random_, rules=False)))
            else:
                party.add(lambda random_: keep_killing(party, random_))
    found = party.end()
    if what != "rules":
        for _ in range(2):
            gc(store, random.Random(0), rules=False)
        assert all(right(store, number) for number in range(4)), "what was put is lost"
        assert [path.name for path in store.layout.unfinished.iterdir()] == []
    assert audit(store.layout.root) == []
    if what == "rules":
        plan_prune(store, max_bytes=0).execute()
        assert list(store.keys()) == [], "nobody reads any more"
        assert audit(store.layout.root) == []
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
