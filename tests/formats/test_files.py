"""A reader never sees half of a file or folder, and nothing is left behind when writing fails."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from smartinit.errors import OutputError
from smartinit.formats.files import new_folder, write_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def full_disk(limit: int = 100) -> Iterator[None]:
    """Every write that would make a file longer than this fails in the kernel, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden names included."""
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str, **options: object) -> None:
    """Make a folder with one file and the marker."""
    with new_folder(folder, marker="marker", **options) as unfinished:
        write_file(unfinished / "file", text.encode())
        write_file(unfinished / "marker", b"")


def test_a_file_is_replaced_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    with full_disk(), pytest.raises(OutputError, match=r"cannot write .*file.*: File too large"):
        write_file(path, b"x" * 1000)
    assert path.read_bytes() == b"old"
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er"
    with new_folder(target, marker="marker") as unfinished:
        assert not target.exists()
        assert unfinished.parent == target.parent
        write_file(unfinished / "file", b"1")
    assert names(target) == ["file"]
    assert names(target.parent) == ["er"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("force", [False, True])
def test_after_an_error_nothing_has_changed(tmp_path: Path, error: BaseException, force: bool) -> None:
    target = tmp_path / "out"
    if force:
        fill(target, "old")
    before = names(tmp_path)
    with pytest.raises(type(error)), new_folder(target, force=force, marker="marker") as unfinished:  # noqa: PT012
        write_file(unfinished / "file", b"1")
        raise error
    assert names(tmp_path) == before
    if force:
        assert (target / "file").read_text() == "old"


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        fill(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    (tmp_path / "out" / "stale").write_text("x")
    fill(tmp_path / "out", "new", force=True)
    assert names(tmp_path / "out") == ["file", "marker"]
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_force_does_not_delete_what_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds other files and no marker"):
        fill(tmp_path / "home", "new", force=True)
    assert names(tmp_path / "home") == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "new", force=True)
    assert names(tmp_path) == ["empty", "home"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    fill(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill(tmp_path / "link", "new", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_the_former_folder_comes_back_when_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "old")
    rename = type(tmp_path).rename

    def fail_on_the_last_step(self: Path, target: Path) -> Path:
        if target.name == "out" and (self / "file").read_text() == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", fail_on_the_last_step)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        fill(tmp_path / "file", "new", force=True)
    with pytest.raises(OutputError, match=r"cannot write folder .*out"):
        fill(tmp_path / "file" / "out", "new")
    with pytest.raises(OutputError, match="cannot write"):
        fill(tmp_path / ("x" * 300), "new")
    assert names(tmp_path) == ["file"]


def test_a_parent_without_permission_is_an_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            fill(tmp_path / "out", "new")
        assert names(tmp_path) == []
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OutputError, match="File too large"):
        fill(tmp_path / "out", "x" * 1000)
    assert names(tmp_path) == []
