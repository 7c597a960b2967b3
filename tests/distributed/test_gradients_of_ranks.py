"""Gradients of data-parallel ranks are one mean gradient, equal on every rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).parent / "run_gradients.py"


def run(folder, world, case):
    """Exit codes, what the ranks printed, and what they saved."""
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(world), str(folder), case],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    files = [folder / f"{case}-{rank}-of-{world}.safetensors" for rank in range(world)]
    return [rank.returncode for rank in ranks], outputs, [load_file(file) for file in files if file.exists()]


def test_two_ranks_find_what_one_process_finds(tmp_path):
    codes, outputs, saved = run(tmp_path, 2, "plain")
    assert codes == [0, 0], outputs
    first, second = saved
    (_, _, (single,)) = run(tmp_path, 1, "plain")
    layers = [name for name in single if name.startswith("model.")]
    assert len(layers) == 7
    for name in layers:
        assert torch.equal(first[name], second[name]), "every rank has the same result, bit by bit"
        error = torch.linalg.norm(first[name] - single[name]) / torch.linalg.norm(single[name])
        assert error <= 1e-4, name
    assert (int(first["batches"]), int(single["batches"])) == (3, 6)
    assert int(first["sent"]) > 0


def test_a_rank_that_fails_ends_all(tmp_path):
    codes, outputs, saved = run(tmp_path, 2, "nan")
    assert codes == [3, 3]
    assert "the loss of batch 1 is nan" in outputs[1]
    assert "another rank failed" in outputs[0]
    assert saved == []
