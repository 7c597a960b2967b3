"""The examples of docs/store.md run as they stand, one after the other, and do what the page says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from smartinit.cli import main
from smartinit.demo import data_file

PAGE = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
HITS = [None, "artefact", "spectra", "artefact"]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path, monkeypatch, demo_model_folder):
    """A folder with the demo model and data, and no other store than the one in it."""
    shutil.copytree(demo_model_folder, tmp_path / "model")
    rows = data_file("train").read_text().splitlines(keepends=True)[:160]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SMARTINIT_CACHE")
    return tmp_path


def test_the_commands_run(place, capfd):
    lines = [line[2:] for block in blocks("console") for line in block.splitlines()]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "smartinit"
        capfd.readouterr()
        assert main([*words[1:], "--json"]) == 0, line
        document = json.loads(capfd.readouterr().out)
        found += [document["hit"]] if words[1] == "compute" else []
        if words[1] == "get":
            assert Path(document["path"]).is_dir()
    assert found == HITS
    assert (place / "cache" / "CACHEDIR.TAG").is_file()


def test_the_python_runs(place, capsys):
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, "store.md", "exec"), namespace)  # noqa: S102 - this page's own text
    assert namespace["hits"] == [None, "artefact", "spectra"]
    assert namespace["scale"].shape[0] == 1
    assert "of the same recipe" in capsys.readouterr().out
    assert (place / "cache" / "entries" / "my-own-entry.json").is_file()
