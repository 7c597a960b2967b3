"""Computes one artefact with the store of argv[1] and prints what was a hit, how often the model ran, and a digest."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import reuse_cases as cases

import smartinit as si


def main(place: str, locking: str) -> None:
    model = cases.new_model()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()  # all begin at once
    store = si.Store(place, locking=locking == "locks")
    artefact = si.compute(model, cases.lora(), cases.new_batches(), store=store, show_progress_bar=False)
    digest = hashlib.sha256(b"".join(pair.a.numpy().tobytes() for pair in artefact.factors.values())).hexdigest()
    sys.stdout.write(f"{cases.hit(artefact)} {len(cases.FORWARD)} {digest}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
