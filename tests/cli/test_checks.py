from __future__ import annotations

import pytest

from smartinit.cli.checks import check_output_file, check_output_folder, check_plot
from smartinit.errors import MissingDependencyError, OutputError


def test_a_new_folder_with_new_parents_is_fine_and_nothing_is_made(tmp_path):
    check_output_folder(tmp_path / "a" / "b" / "adapter", force=False)
    assert not (tmp_path / "a").exists()


def test_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    check_output_folder(Path("adapter"), force=False)


def test_an_existing_adapter_needs_force(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(OutputError, match="exists already; choose another --out or replace it with --force"):
        check_output_folder(folder, force=False)
    check_output_folder(folder, force=True)


def test_force_replaces_no_folder_of_other_things(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(OutputError, match="is not replaced, because it holds other files"):
        check_output_folder(tmp_path / "thesis", force=True)


def test_what_can_be_no_folder(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OutputError, match="is a file"):
        check_output_folder(file, force=True)
    with pytest.raises(OutputError, match="cannot be written"):
        check_output_folder(file / "adapter", force=False)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="dangling link"):
        check_output_folder(tmp_path / "link", force=False)


def test_a_place_that_cannot_be_written(tmp_path):
    from pathlib import Path

    if not Path("/proc/self").exists():
        pytest.skip("needs a file system that not even root can write")
    with pytest.raises(OutputError, match="cannot be written"):
        check_output_folder(Path("/proc/smartinit/adapter"), force=False)


def test_plots(tmp_path, monkeypatch):
    check_plot(None)
    check_plot(tmp_path / "a.png")
    with pytest.raises(OutputError, match="folder that does not exist"):
        check_plot(tmp_path / "nowhere" / "a.png")
    with pytest.raises(OutputError, match="no suffix of a figure"):
        check_plot(tmp_path / "a.txt")
    with pytest.raises(OutputError, match="is a folder"):
        check_output_file(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"smartinit\[plot\]"):
        check_plot(tmp_path / "a.png")
