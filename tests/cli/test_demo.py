from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.usefixtures("demo_model_folder")


def test_demo_ends_in_an_adapter_that_peft_loads(run_cli, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    shown = run_cli("demo", "--max-batches", 4)
    assert shown.code == 0, shown.err
    assert "its logits equal the base model's exactly" in shown.out
    assert "adapter: demo-output/adapter" in shown.out
    assert (tmp_path / "demo-output" / "adapter" / "adapter_config.json").is_file()
    again = run_cli("demo", "--max-batches", 4, "--json", "--quiet")
    assert again.code == 0, "its own earlier output may be replaced"
    assert again.document["peft_logits_equal"] is True
    assert json.loads((tmp_path / "demo-output" / "adapter" / "smartinit.json").read_text())


def test_demo_draws_where_matplotlib_is(run_cli, tmp_path):
    pytest.importorskip("smartinit.report.figure")
    shown = run_cli("demo", "--max-batches", 2, "--out", tmp_path / "out", "--json", "--quiet")
    assert shown.code == 0, shown.err
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_demo_does_not_replace_other_things(run_cli, tmp_path):
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "adapter" / "thesis.tex").touch()
    assert run_cli("demo", "--out", tmp_path / "out").code == 2
