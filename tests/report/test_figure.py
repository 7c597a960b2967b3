"""The file: its format, its bytes, and what happens when it cannot be made."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

import smartinit as si
from smartinit.errors import ArtefactError, ConfigError, MissingDependencyError, MissingFileError, OutputError
from smartinit.report.figure import plot_artefact

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def with_matplotlib():
    return pytest.importorskip("matplotlib")


@pytest.fixture
def small(make):
    return make([("h.0.q_proj", "h.0.k_proj"), ("h.1.q_proj", "h.1.k_proj")], r=4)


pytestmark = pytest.mark.usefixtures("with_matplotlib")


def test_a_png_with_nothing_cut_off(artefact, tmp_path):
    from matplotlib.image import imread

    path = plot_artefact(artefact, tmp_path / "figure.png", title="EVA")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 4.4 * 300 < width < 18 * 300
    assert 3 * 300 < height < 20_000
    pixels = imread(path)
    assert pixels.shape[:2] == (height, width)
    border = np.concatenate([pixels[:10].reshape(-1, 4), pixels[-10:].reshape(-1, 4), pixels[:, :10].reshape(-1, 4)])
    assert (border == 1).all()
    assert (pixels[:, -10:] == 1).all()
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_svg_of_the_embedded_model(demo_artefact, tmp_path):
    root = ET.fromstring(plot_artefact(demo_artefact, tmp_path / "figure.svg").read_bytes())  # noqa: S314 - our own
    texts = ["".join(element.itertext()).strip() for element in root.iter(f"{SVG}text")]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "q_proj, k_proj, v_proj"):
        assert texts.count(name) >= 1, name
    ids = [element.attrib["id"] for element in root.iter(f"{SVG}g") if "id" in element.attrib]
    assert sum(i.startswith("rank:") for i in ids) == 42
    assert sum(i.startswith("missing:") for i in ids) == 0
    assert sum(i.startswith("curve:") for i in ids) == 24
    assert sum(i.startswith("given:") for i in ids) == 4
    assert len(ids) == len(set(ids))


def test_svg_of_a_bert(make, shapes, tmp_path):
    root = ET.fromstring(plot_artefact(make(shapes["BERT"]), tmp_path / "figure.svg").read_bytes())  # noqa: S314
    texts = {"".join(element.itertext()).strip() for element in root.iter(f"{SVG}text")}
    assert {"attention.output.dense", "output.dense", "pooler.dense", "other", "not a target"} <= texts
    ids = [element.attrib["id"] for element in root.iter(f"{SVG}g") if "id" in element.attrib]
    assert sum(i.startswith("rank:") for i in ids) == 12 * 6 + 1
    assert sum(i.startswith("missing:") for i in ids) == 12 + 6
    assert sum(i.startswith("curve:") for i in ids) == 12 * 4 + 1


def test_pdf_and_suffixes_in_capitals(small, tmp_path):
    assert plot_artefact(small, tmp_path / "figure.pdf").read_bytes()[:5] == b"%PDF-"
    assert plot_artefact(small, str(tmp_path / "figure.PNG")).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_equal_artefacts_give_equal_bytes(small, make, tmp_path, suffix, monkeypatch):
    again = make(small.sites, r=4)
    one = plot_artefact(small, tmp_path / f"one.{suffix}", title="T").read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")  # another day
    assert plot_artefact(again, tmp_path / f"two.{suffix}", title="T").read_bytes() == one
    assert plot_artefact(again, tmp_path / f"two.{suffix}", title="U").read_bytes() != one


def test_a_loaded_artefact_gives_the_same_bytes_in_another_process_which_never_loads_pyplot(demo_artefact, tmp_path):
    here = plot_artefact(demo_artefact, tmp_path / "figure.svg").read_bytes()
    demo_artefact.save(tmp_path / "adapter")
    code = (
        "import hashlib, sys\n"
        "from smartinit.artefact import Artefact\n"
        "from smartinit.report.figure import plot_artefact\n"
        "assert 'matplotlib' not in sys.modules\n"
        "path = plot_artefact(Artefact.load(sys.argv[1]), sys.argv[2])\n"
        "print(hashlib.sha256(path.read_bytes()).hexdigest(), 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "adapter", tmp_path / "there.svg"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1"},
    )
    assert done.stdout.split() == [hashlib.sha256(here).hexdigest(), "False"]


def test_the_users_settings_are_neither_used_nor_changed(small, tmp_path, with_matplotlib):
    plain = plot_artefact(small, tmp_path / "plain.svg").read_bytes()
    with with_matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "path"}):
        before = dict(with_matplotlib.rcParams)
        assert plot_artefact(small, tmp_path / "mine.svg").read_bytes() == plain
        assert dict(with_matplotlib.rcParams) == before


def test_titles(small, tmp_path):
    def texts(title):
        root = ET.fromstring(plot_artefact(small, tmp_path / "figure.svg", title=title).read_bytes())  # noqa: S314
        return ["".join(element.itertext()).strip() for element in root.iter(f"{SVG}text")]

    assert "a $\\frac{1}{$ & <b>" in texts("a $\\frac{1}{$ & <b>"), "no formula, no markup"
    assert set(texts("two words")) - set(texts(None)) == {"two words"}
    long = " ".join(["word"] * 60)
    lines = [text for text in texts(long) if text.startswith("word")]
    assert len(lines) > 3
    assert " ".join(lines) == long


def test_an_older_figure_is_replaced_and_kept_when_drawing_fails(small, tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"older")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(MissingDependencyError):
            plot_artefact(small, path)
    assert path.read_bytes() == b"older"
    plot_artefact(small, path)
    assert path.read_bytes() != b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_matplotlib_missing(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"needs matplotlib.*pip install 'smartinit\[plot\]'"):
        plot_artefact(small, tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["figure.jpg", "figure", "figure.png.gz", ".png"])
def test_unknown_suffix(small, tmp_path, name):
    with pytest.raises(ConfigError, match=r"supported are \.png, \.svg, \.pdf"):
        plot_artefact(small, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(small, tmp_path):
    with pytest.raises(MissingFileError, match="nowhere"):
        plot_artefact(small, tmp_path / "nowhere" / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(small, tmp_path):
    (tmp_path / "figure.png").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        plot_artefact(small, tmp_path / "figure.png")
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_no_targets(small, tmp_path):
    from dataclasses import replace

    with pytest.raises(ArtefactError, match="no targets"):
        plot_artefact(replace(small, plan=si.Plan({}, {})), tmp_path / "figure.png")
