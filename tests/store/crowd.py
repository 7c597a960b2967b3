"""Run by test_many_processes.py: processes are forked, start at once, and want the same.

    python crowd.py FOLDER PROCESSES same|differing|apart locking|free

Prints one JSON object: how many computed, the digests of what they got, exit codes, warnings.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from faulty import audit, entry_files

from smartinit.store import Store


def digest(files: dict[str, Path]) -> str:
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(files[name].read_bytes())
    return whole.hexdigest()


def work(root: Path, number: int, what: str, *, locking: bool) -> dict[str, object]:
    """Get a result, or compute it."""
    store, computed = Store(root, locking=locking), False
    key = f"k{number}" if what == "apart" else "k"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with store.single_flight(key, timeout=120):
            entry = store.local.get(key, tensors=False)
            if entry is None:
                computed = True
                time.sleep(0.02)
                store.put(key, files=entry_files(number if what == "differing" else 1), tags=["all"])
        entry = entry or store.local.get(key, tensors=False)
        assert entry is not None
        found = digest(dict(entry.files))
        entry.close()
    return {"computed": computed, "digest": found, "warnings": [str(warning.message) for warning in caught]}


def main() -> None:
    """Fork, start, collect."""
    root, processes, what, locking = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "locking"
    (root / "said").mkdir(parents=True)
    waiting, go = os.pipe()
    children = []
    for number in range(processes):
        child = os.fork()
        if not child:
            code = 1
            try:
                os.close(go)
                os.read(waiting, 1)  # until the parent closes its end
                said = work(root / "store", number, what, locking=locking)
                (root / "said" / str(number)).write_text(json.dumps(said))
                code = 0
            finally:
                if code:
                    sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(code)
        children.append(child)
    os.close(waiting)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [json.loads(path.read_text()) for path in (root / "said").iterdir()]
    found = {
        "codes": sorted(set(codes)),
        "computed": sum(one["computed"] for one in said),
        "digests": len({one["digest"] for one in said}),
        "warnings": sorted({warning for one in said for warning in one["warnings"]}),
        "problems": audit(root / "store"),
        "unfinished": [path.name for path in (root / "store" / "tmp").iterdir()],
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
