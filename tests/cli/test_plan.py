from __future__ import annotations

import json
import re

import pytest


def plan(run_cli, model, *arguments):
    return run_cli("plan", "--model", model, "--json", *arguments)


def test_a_dry_run_needs_no_weights_and_no_data(run_cli, model_folder):
    (model_folder / "model.safetensors").unlink()
    found = plan(run_cli, model_folder, "--rank", 4)
    assert found.code == 0, found.err
    document = found.document
    assert len(document["targets"]) == 4
    assert document["targets"]["model.layers.0.self_attn.v_proj"] == {"shape": [16, 32], "rank": 4}
    assert document["sites"]["count"] == 2
    assert document["ranks"] == 16
    assert document["data"] is None
    assert document["refused"] == []


def test_the_guess_of_the_sites_is_what_a_run_finds(run_cli, model_folder, data_file, tmp_path):
    options = ("--target-modules", "all-linear", "--rank", 4)
    guessed = plan(run_cli, model_folder, *options).document["sites"]["names"]
    done = run_cli(
        "compute", "--model", model_folder, "--data", data_file, "--out", tmp_path / "a", "--quiet", *options
    )
    assert done.code == 0
    found = json.loads((tmp_path / "a" / "smartinit.json").read_text())["sites"]
    assert sorted(map(sorted, guessed)) == sorted(map(sorted, found))


def test_with_data_it_counts_and_estimates(run_cli, model_folder, data_file):
    document = plan(run_cli, model_folder, "--data", data_file, "--batch-size", 8).document
    assert (document["data"]["rows"], document["data"]["batches"]) == (40, 5)
    assert document["data"]["tokens"] > 400
    assert document["time"]["seconds"] >= 0
    assert "FLOP/s" in document["time"]["assumption"]
    bounded = plan(run_cli, model_folder, "--data", data_file, "--batch-size", 8, "--max-batches", 2).document
    assert bounded["data"]["batches"] == 2


def test_memory_counts_the_weights_in_the_chosen_precision(run_cli, model_folder):
    single, half = (
        plan(run_cli, model_folder, "--dtype", dtype).document["memory_bytes"]["weights"]
        for dtype in ("float32", "bfloat16")
    )
    assert single == 2 * half > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "33"], "rank 33 of"),
        (["--option", "bits=4"], "has no option 'bits'"),
        (["--min-rank", "20"], "min_rank=20 .* is above the most"),
    ],
)
def test_what_compute_would_refuse(run_cli, model_folder, arguments, message):
    found = plan(run_cli, model_folder, *arguments)
    assert found.code == 2
    assert re.search(message, found.document["refused"][0])


def test_text(run_cli, model_folder, data_file):
    shown = run_cli("plan", "--model", model_folder, "--data", data_file, "--rank", 40)
    assert shown.code == 2
    for words in ("self_attn.q_proj", "guessed from names", "at most about", "refused: rank 40"):
        assert words in shown.out


def test_errors(run_cli, model_folder):
    assert plan(run_cli, model_folder, "--target-modules", "nothing").code == 2
    assert plan(run_cli, "./missing").code == 2
    assert plan(run_cli, model_folder, "--data", "./missing.jsonl").code == 2
