from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from smartinit.cli.model_folder import check_model_folder, is_local
from smartinit.errors import MissingFileError, ModelError
from smartinit.formats.safetensors_header import read_header


def test_headers_say_what_the_file_holds(tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    entries = read_header(tmp_path / "x.safetensors")
    assert {name: entry.shape for name, entry in entries.items()} == {"a": (2, 3), "b": (5,), "c": (0, 4)}
    assert entries["b"].dtype == "BF16"
    assert entries["a"].size == 6


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_files_are_refused(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(20, 3)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"truncated one|bytes instead of"):
        read_header(path)


def test_a_header_of_absurd_length_reads_no_more_than_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(ValueError, match="10 bytes instead of"):
        read_header(path)


def test_a_whole_folder_passes(saved_model, assets):
    check_model_folder(saved_model)
    check_model_folder(assets / "all-minilm-l6-v2")


def test_sharded_folders(model_folder):
    tensors = load_file(model_folder / "model.safetensors")
    (model_folder / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == file}, model_folder / file)
    (model_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    check_model_folder(model_folder)
    (model_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks model-00002-of-00002"):
        check_model_folder(model_folder)


def spoil_config(folder):
    (folder / "config.json").write_text("{")


def drop_config(folder):
    (folder / "config.json").unlink()


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


SPOILED = [
    (spoil_config, "cannot be read as JSON"),
    (drop_config, "has no config.json"),
    (drop_weights, "has no weights"),
    (only_pickled, r"only pickled weights \(pytorch_model.bin\).*save_pretrained"),
    (truncate, "bytes instead of"),
    (empty, "is empty"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED, ids=lambda value: getattr(value, "__name__", None))
def test_spoiled_folders(model_folder, spoil, message):
    spoil(model_folder)
    with pytest.raises(ModelError, match=message):
        check_model_folder(model_folder)


def test_paths_and_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file.bin").touch()
    assert is_local("models")
    assert not is_local("gpt2")
    assert not is_local("meta-llama/Llama-2-7b-hf")
    for name in ("./nothing", "/nothing", "models/llama", "a/b/c", "~/nothing-here"):
        with pytest.raises(MissingFileError, match="does not exist"):
            is_local(name)
    with pytest.raises(ModelError, match="is a file"):
        is_local("file.bin")
