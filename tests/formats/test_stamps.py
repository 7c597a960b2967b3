"""Two files that were not written together are told apart, and edits by hand are not taken for that."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file

from smartinit.config import LoraConfig
from smartinit.errors import ArgumentError, ArtefactError
from smartinit.factors import Factors
from smartinit.formats import peft as folders
from smartinit.formats.peft import CONFIG_FILE, TENSOR_FILE, read_adapter, write_adapter
from smartinit.formats.tensors import file_content
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, alpha: float, **options: Any) -> None:
    """An adapter of one layer, all of whose values are its alpha."""
    pair = Factors(torch.full((2, 4), alpha), torch.full((3, 2), alpha))
    write_adapter(folder, LoraConfig(r=2), Plan({"x": 2}, {"x": alpha}), {"x": pair}, **options)


def files(folder: Path) -> tuple[bytes, bytes]:
    """Configuration and tensors."""
    return (folder / CONFIG_FILE).read_bytes(), (folder / TENSOR_FILE).read_bytes()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers do not wait long."""
    monkeypatch.setattr(folders, "_WAITS", (0.0, 0.01, 0.01))


def mixed(folder: Path, *, newer: str) -> None:
    """The configuration of one adapter beside the tensors of another one of the same shapes."""
    write(folder / "old", 4)
    write(folder, 8)
    (folder / CONFIG_FILE).write_bytes((folder / "old" / CONFIG_FILE).read_bytes())
    os.utime(folder / newer, ns=(2**61, 2**61))


@pytest.mark.usefixtures("hurried")
def test_the_configuration_of_another_adapter_is_refused(tmp_path: Path) -> None:
    mixed(tmp_path, newer=TENSOR_FILE)
    with pytest.raises(ArtefactError, match=r"is not the one that '.*' was written with: the folder is being written"):
        read_adapter(tmp_path)


def test_a_configuration_that_was_edited_means_what_it_says(tmp_path: Path) -> None:
    mixed(tmp_path, newer=CONFIG_FILE)
    assert read_adapter(tmp_path).config.lora_alpha == 4


@pytest.mark.usefixtures("hurried")
def test_fields_that_compute_nothing_may_be_edited_and_copied_in_any_order(tmp_path: Path) -> None:
    write(tmp_path, 4)
    config = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"base_model_name_or_path": "moved"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    os.utime(tmp_path / TENSOR_FILE, ns=(2**61, 2**61))
    assert read_adapter(tmp_path).config.base_model_name_or_path == "moved"


@pytest.mark.usefixtures("hurried")
def test_files_of_other_programs_have_no_stamp(tmp_path: Path) -> None:
    mixed(tmp_path, newer=TENSOR_FILE)
    save_file(load((tmp_path / TENSOR_FILE).read_bytes()), tmp_path / TENSOR_FILE)
    assert read_adapter(tmp_path).config.lora_alpha == 4


def test_a_reader_waits_until_both_files_are_there(tmp_path: Path) -> None:
    mixed(tmp_path / "folder", newer=TENSOR_FILE)
    write(tmp_path / "whole", 8)
    timer = threading.Timer(0.1, lambda: (tmp_path / "whole" / CONFIG_FILE).replace(tmp_path / "folder" / CONFIG_FILE))
    timer.start()
    stored = read_adapter(tmp_path / "folder")
    timer.join()
    assert stored.config.lora_alpha == float(stored.factors["x"].a[0, 0]) == 8


def test_a_reader_beside_a_writer_never_sees_halves(tmp_path: Path) -> None:
    write(tmp_path, 1)
    done = threading.Event()

    def keep_writing() -> None:
        for number in range(60):
            write(tmp_path, 1 + number % 5)
        done.set()

    writer = threading.Thread(target=keep_writing)
    writer.start()
    seen = 0
    while not done.is_set():
        stored = read_adapter(tmp_path)
        assert stored.config.lora_alpha == float(stored.factors["x"].a[0, 0])
        seen += 1
    writer.join()
    assert seen


def test_the_same_adapter_gives_the_same_bytes_whatever_is_stamped(tmp_path: Path) -> None:
    for number in range(8):  # safetensors shuffles metadata
        write(tmp_path / str(number), 4, stamps={"one": "1", "two": "2"})
    assert len({files(tmp_path / str(number)) for number in range(8)}) == 1
    with safe_open(tmp_path / "0" / TENSOR_FILE, "pt") as file:
        metadata = file.metadata()
        assert {key: metadata[key] for key in ("format", "one", "two")} == {"format": "pt", "one": "1", "two": "2"}
        assert torch.equal(file.get_tensor("base_model.model.x.lora_A.weight"), torch.full((2, 4), 4.0))


@pytest.mark.parametrize("length", range(9))
def test_numbers_stay_aligned_whatever_the_header(length: int) -> None:
    content = file_content({"x": torch.arange(3, dtype=torch.float64)}, {"format": "pt", "y": "é" * length})
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert torch.equal(load(content)["x"], torch.arange(3, dtype=torch.float64))


def test_a_folder_is_a_path() -> None:
    with pytest.raises(ArgumentError, match="the adapter folder is a NoneType; expected its path"):
        read_adapter(None)  # type: ignore[arg-type]
