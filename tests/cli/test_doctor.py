from __future__ import annotations

import dataclasses

import pytest
import torch

from smartinit.artefact import Artefact


def test_environment(run_cli):
    found = run_cli("doctor", "--json").document
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0] or found["packages"]["torch"]
    assert found["devices"][0]["name"] == "cpu"
    assert found["free_disk_bytes"]["temporary"] > 0
    assert "free memory" in run_cli("doctor").out


def test_an_honest_adapter_is_verified(run_cli, adapter):
    done = run_cli("doctor", "--verify", adapter, "--json", "--quiet")
    assert done.code == 0, done.err
    layers = done.document["layers"]
    assert len(layers) == 4
    assert len({layer["layer"] for layer in layers}) == 4
    assert all(0.99 <= layer["share"] <= 1 + 1e-9 for layer in layers)
    assert "verified: every sampled layer" in run_cli("doctor", "--verify", adapter, "--quiet", "--layers", 1).out


@pytest.fixture
def forge(adapter):
    """Write an adapter whose digests are right but whose directions are not."""

    def write(change):
        artefact = Artefact.load(adapter)
        factors = {name: dataclasses.replace(pair, a=change(pair.a)) for name, pair in artefact.factors.items()}
        dataclasses.replace(artefact, factors=factors).save(adapter, force=True)

    return write


def test_random_directions_are_found_out(run_cli, adapter, forge):
    generator = torch.Generator().manual_seed(0)
    forge(lambda a: torch.randn(a.shape, generator=generator))
    done = run_cli("doctor", "--verify", adapter, "--quiet", "--json")
    assert done.code == 4
    assert not done.document["ok"]
    assert "NOT verified" in run_cli("doctor", "--verify", adapter, "--quiet").out


def test_the_scale_of_the_rows_does_not_matter(run_cli, adapter, forge):
    forge(lambda a: a * torch.arange(1, len(a) + 1)[:, None])
    assert run_cli("doctor", "--verify", adapter, "--quiet").code == 0


def test_a_file_with_another_digest(run_cli, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text() + " ")
    done = run_cli("doctor", "--verify", adapter, "--quiet")
    assert done.code == 4
    assert "sha256 differs" in done.err


def test_other_data(run_cli, adapter, data_file):
    data_file.write_text(data_file.read_text() + '{"text": "one more"}\n')
    done = run_cli("doctor", "--verify", adapter, "--quiet")
    assert done.code == 4
    assert "is not the data" in done.err


def test_another_model(run_cli, adapter, assets):
    done = run_cli("doctor", "--verify", adapter, "--quiet", "--model", assets / "all-minilm-l6-v2")
    assert done.code in {2, 4}
    assert done.err.count("\n") == 1


def test_what_it_cannot_verify(run_cli, tmp_path, assets):
    assert run_cli("doctor", "--verify", tmp_path / "missing").code == 2
    assert run_cli("doctor", "--verify", assets / "roberta-base-lora-mnli").code == 6
    assert run_cli("doctor", "--model", "x").code == 2
