"""Data-parallel runs in real process groups: ranks exchange summaries, and all get the same result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).parent / "run_eva.py"


class Ranks(NamedTuple):
    """How the ranks ended, and what each saved by case."""

    codes: list[int]
    outputs: list[str]
    saved: dict[str, list[dict[str, torch.Tensor]]]


def run(folder, world, *cases):
    """Start all ranks at once and wait for them, at most so long that a hang is a failure."""
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(world), str(folder), *cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    files = {case: [folder / f"{case}-{rank}-of-{world}.safetensors" for rank in range(world)] for case in cases}
    saved = {case: [load_file(f) for f in paths] for case, paths in files.items() if all(f.exists() for f in paths)}
    return Ranks([rank.returncode for rank in ranks], outputs, saved)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), 1, "plain")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, "plain", "more", "uneven", "skip", "nan")


def test_defect_20_ranks_exchange_summaries_and_agree(one, two):
    (single,), (first, second) = one.saved["plain"], two.saved["plain"]
    bases = [name for name in single if name.startswith("model.")]
    assert len(bases) == 14
    for name in bases:
        assert torch.equal(first[name], second[name]), "every rank has the same result, bit by bit"
        moment = single[f"scatter.{name}"]
        captured = (first[name].double() * (first[name].double() @ moment)).sum()
        assert captured > 0.995 * torch.linalg.eigvalsh(moment)[-8:].sum(), name
    four_times_the_tokens = two.saved["more"][0]
    assert int(first["sent"]) == int(four_times_the_tokens["sent"]) > 0
    activations = 6 * 320 * sum({"q": 160, "o": 160, "gate": 160, "down": 48}.values()) * 2
    assert int(first["sent"]) < activations


def test_ranks_with_fewer_batches_do_not_hang_the_others(two):
    first, second = two.saved["uneven"]
    assert all(torch.equal(basis, second[name]) for name, basis in first.items())


def test_a_rank_that_skips_a_bad_batch_stays_in_step(two):
    first, second = two.saved["skip"]
    assert all(torch.equal(basis, second[name]) for name, basis in first.items())


def test_a_rank_that_fails_says_why_and_the_other_ends(two):
    assert two.codes[1] == 3
    assert "NonFiniteError: the input of layer 'model.layers.0.self_attn.q_proj'" in two.outputs[1]
    assert two.codes[0] == 3, "the other rank cannot finish alone, and must not wait for ever"
    assert "another rank failed" in two.outputs[0]
    assert "nan" not in two.saved
