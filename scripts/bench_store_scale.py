"""A store of very many entries: what looking up, listing and planning to prune take, and how much memory.

    .venv/bin/python scripts/bench_store_scale.py          # 10,000 and 100,000 entries, in a temporary folder
    .venv/bin/python scripts/bench_store_scale.py --entries 1000 --folder DIR

Manifests are written with the package's own `Manifest.to_bytes`; an entry has a small blob of its own and one that it
shares with all others. Each figure comes from a process of its own, whose whole memory is shown at its peak, the
interpreter included. Lookups are the median of 1,000. The others are run three times: the first may find the files on
the disk, of the other two the faster one is shown besides. What is made in --folder stays there, and is used again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartinit.store import Key, Store
from smartinit.store.blobs import Blob, checksum
from smartinit.store.explain import nearest
from smartinit.store.folder import make_store
from smartinit.store.layout import Layout
from smartinit.store.listing import list_entries, stored_bytes
from smartinit.store.manifest import Manifest
from smartinit.store.naming import find_key
from smartinit.store.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

_LOOKUPS = 1000
_TAGS = 100
_METHODS = ("eva", "pissa", "corda", "olora")
_DAY = 86400


def main() -> None:
    """Make the stores, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--folder", type=Path, help="where the stores are made, and stay; else a temporary folder")
    parser.add_argument("--only", choices=MEASURES, help="one figure of the store in --folder, as JSON")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measured(Store(options.folder), options.only, options.entries[0])))
        return
    with tempfile.TemporaryDirectory(prefix="smartinit-scale-") as scratch:
        columns = {}
        for count in options.entries:
            folder = (options.folder or Path(scratch)) / str(count)
            started = time.perf_counter()
            if not folder.is_dir():
                make(folder, count)
            print(f"{count:,} entries made in {time.perf_counter() - started:.0f} s", file=sys.stderr)
            columns[count] = {name: in_process(folder, name, count) for name in MEASURES}
    show(columns)


def make(root: Path, count: int) -> None:
    """A store of ``count`` entries, each of which was used at another time in the last hundred days."""
    layout = Layout(root)
    make_store(layout)
    dice = random.Random(0)  # noqa: S311 - no secret
    shared = blob(layout, b"shared" * 100)
    now = time.time()
    for folder in (layout.used, *(layout.index(f"tag-{tag}") for tag in range(_TAGS))):
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        key = key_of(number)
        tag = f"tag-{number % _TAGS}"
        manifest = Manifest(
            key=key.digest,
            blobs={"own.bin": blob(layout, number.to_bytes(8, "little") * 16), "shared.bin": shared},
            kind=key.kind,
            leaves=key.leaves,
            meta={"ranks": 16, "layers": 224, "settled": True},
            tags=(tag,),
            created=now,
            writer={"smartinit": "0", "torch": "0", "host": "bench"},
        )
        layout.entry(key.digest).write_bytes(manifest.to_bytes())
        (layout.index(tag) / key.digest).touch()
        mark = layout.used / key.digest
        mark.touch()
        when = now - dice.random() * 100 * _DAY
        os.utime(mark, (when, when))


def key_of(number: int) -> Key:
    """A request such as those of the pipeline, in size and depth."""
    return Key(
        "artefact",
        {
            "algorithm": 1,
            "model": hashlib.sha256(b"model %d" % (number % 50)).hexdigest(),
            "data": {"rows": 1000 + number, "digest": hashlib.sha256(b"data %d" % number).hexdigest()},
            "method": _METHODS[number % len(_METHODS)],
            "options": {"rho": 2.0, "tau": 0.99, "whiten": False},
            "config": {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            "numerics": {"autocast": None, "float32_products": "highest"},
            "seed": 0,
        },
    )


def blob(layout: Layout, content: bytes) -> Blob:
    """Write a blob without waiting for the disk."""
    made = Blob(hashlib.sha256(content).hexdigest(), len(content), checksum(memoryview(content)))
    path = layout.blob(made.sha256)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return made


def in_process(folder: Path, name: str, count: int) -> dict[str, float]:
    """One figure, from a process that does nothing else."""
    command = [sys.executable, __file__, "--only", name, "--folder", str(folder), "--entries", str(count)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=3600)
    return json.loads(done.stdout)


def measured(store: Store, name: str, count: int) -> dict[str, float]:
    """Seconds of one measure, the peak of the process's memory in MB, and what it counted."""
    runs = [MEASURES[name](store, count) for _ in range(1 if name == LAST else 3)]
    (first, counted), others = runs[0], runs[1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"first": first, "seconds": min([*others, runs[0]])[0], "megabytes": peak, "counted": counted}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it gave."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def hits(store: Store, count: int) -> tuple[float, int]:
    """Reading an entry, every byte checked."""
    dice, times, found = random.Random(1), [], 0  # noqa: S311
    for _ in range(_LOOKUPS):
        key = key_of(dice.randrange(count)).digest
        seconds, entry = timed(lambda key=key: store.local.get(key, tensors=False))
        times.append(seconds)
        found += entry is not None
        entry.close()
    return statistics.median(times), found


def misses(store: Store, count: int) -> tuple[float, int]:
    """Asking for what is not there."""
    times = [timed(lambda number=number: store.get(key_of(count + number).digest))[0] for number in range(_LOOKUPS)]
    return statistics.median(times), 0


def prefixes(store: Store, count: int) -> tuple[float, int]:
    """From the first letters of a key to the key."""
    dice = random.Random(2)  # noqa: S311
    times = [timed(lambda: find_key(store.local, key_of(dice.randrange(count)).digest[:12]))[0] for _ in range(10)]
    return statistics.median(times), 1


def tagged(store: Store, _: int) -> tuple[float, int]:
    """The keys of a tag, of which there are a hundred."""
    seconds, keys = timed(lambda: list(store.keys("tag-1")))
    return seconds, len(keys)


def all_keys(store: Store, _: int) -> tuple[float, int]:
    """Every key, one at a time."""
    seconds, number = timed(lambda: sum(map(bool, store.keys())))
    return seconds, number


def listed(store: Store, _: int) -> tuple[float, int]:
    """What `cache ls` reads, for every entry, and the size of all files."""

    def run() -> int:
        stored_bytes(store.local.layout)
        return sum(entry.problem is None for entry in list_entries(store.local.layout))

    return timed(run)


def planned(store: Store, count: int) -> tuple[float, int]:
    """`cache gc --dry-run` to half of the size."""
    seconds, plan = timed(lambda: store.prune(_half(count), dry_run=True))
    return seconds, len(plan.entries)


def planned_by_age(store: Store, _: int) -> tuple[float, int]:
    """`cache gc --unused-for 95d --dry-run`."""
    seconds, plan = timed(lambda: store.prune(unused_for=95 * _DAY, dry_run=True))
    return seconds, len(plan.entries)


def explained(store: Store, count: int) -> tuple[float, int]:
    """Why a request is a miss: the nearest entry."""
    leaves = {**key_of(count // 2).leaves, "seed": 1}
    seconds, found = timed(lambda: nearest(store, Key("artefact", leaves)))
    return seconds, 0 if found is None else len(found[1])


def verified(store: Store, _: int) -> tuple[float, int]:
    """`cache verify`: every file is read."""
    seconds, found = timed(lambda: verify(store.local))
    return seconds, len(found)


def executed(store: Store, count: int) -> tuple[float, int]:
    """`cache gc` to half of the size: this comes last."""
    seconds, freed = timed(lambda: store.prune(_half(count), dry_run=True).execute())
    return seconds, freed.entries


def _half(count: int) -> int:
    return count * 700


def nothing(_: Store, __: int) -> tuple[float, int]:
    """For its memory."""
    return 0.0, 0


MEASURES: dict[str, Callable[[Store, int], tuple[float, int]]] = {
    "(imports alone)": nothing,
    "lookup, hit (median)": hits,
    "lookup, miss (median)": misses,
    "key from its first letters": prefixes,
    "keys of a tag (1 %)": tagged,
    "all keys": all_keys,
    "ls": listed,
    "explain a miss": explained,
    "gc --unused-for --dry-run": planned_by_age,
    "gc --max-size --dry-run": planned,
    "verify": verified,
    "gc --max-size": executed,
}


LAST = "gc --max-size"
"""Once only: there is nothing to do the second time."""


def show(columns: dict[int, dict[str, dict[str, float]]]) -> None:
    """The table, with the machine above it."""
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}\n")
    heads = [f"{count:,}: {what}" for count in columns for what in ("first", "again", "MB", "found")]
    print(f"| what | {' | '.join(heads)} |\n|---|{'--:|' * len(heads)}")
    for name in MEASURES:
        cells = [
            cell
            for column in columns.values()
            for cell in (
                duration(column[name]["first"]),
                duration(column[name]["seconds"]),
                f"{column[name]['megabytes']:.0f}",
                f"{column[name]['counted']:,}",
            )
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def duration(seconds: float) -> str:
    """With a unit that suits."""
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.1f} s"


if __name__ == "__main__":
    main()
