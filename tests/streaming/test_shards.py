from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from smartinit.errors import MissingFileError, ModelError, UnknownNameError
from smartinit.streaming import find_weight_folder, open_weights


@pytest.fixture
def tensors(seed) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ["model.embed.weight", "model.layers.0.fc.weight", "model.layers.1.fc.weight", "head.weight"]
    return {name: torch.randn(4 + i, 3, generator=generator) for i, name in enumerate(names)}


@pytest.fixture(params=["whole", "sharded"])
def folder(request, tmp_path, tensors):
    """A model folder, with one file or with a shard for every two tensors."""
    if request.param == "whole":
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        shard(tmp_path, tensors)
    return tmp_path


def shard(folder, tensors, per_file: int = 2) -> None:
    names = list(tensors)
    weight_map = {}
    count = -(-len(names) // per_file)
    for i in range(count):
        some = names[i * per_file : (i + 1) * per_file]
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in some}, folder / file)
        weight_map |= dict.fromkeys(some, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_every_tensor_is_read_as_it_was_saved(folder, tensors):
    with open_weights(folder) as weights:
        assert sorted(weights.names) == sorted(tensors)
        for name, tensor in tensors.items():
            assert weights.shape(name) == tuple(tensor.shape)
            assert torch.equal(weights.read(name), tensor)


def test_tensors_outlive_the_files(folder, tensors):
    with open_weights(folder) as weights:
        read = weights.read("head.weight")
    assert torch.equal(read, tensors["head.weight"])


def test_a_single_file_can_be_named(tmp_path, tensors):
    save_file(tensors, tmp_path / "other-name.safetensors")
    with open_weights(str(tmp_path / "other-name.safetensors")) as weights:
        assert torch.equal(weights.read("head.weight"), tensors["head.weight"])


def test_what_transformers_saves_in_shards(tmp_path, tiny_llama):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with open_weights(tmp_path) as weights:
        for name, parameter in model.named_parameters():
            assert torch.equal(weights.read(name), parameter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_dtypes_stay(tmp_path, dtype):
    save_file({"x": torch.ones(2, 2, dtype=dtype)}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as weights:
        assert weights.read("x").dtype == dtype


def test_names_with_and_without_the_base_models_prefix(folder, tensors):
    with open_weights(folder, prefixes=["model", "", "transformer"]) as weights:
        assert weights.find("layers.0.fc.weight") == "model.layers.0.fc.weight"
        assert weights.find("model.head.weight") == "head.weight"
        assert weights.find("model.layers.0.fc.weight") == "model.layers.0.fc.weight"
        assert torch.equal(weights.read("layers.1.fc.weight"), tensors["model.layers.1.fc.weight"])
        assert "layers.1.fc.weight" in weights
        assert "1.fc.weight" not in weights
        assert 5 not in weights
    with open_weights(folder) as weights:
        assert weights.find("layers.0.fc.weight") is None


def test_the_exact_name_comes_first(tmp_path):
    save_file({"a.weight": torch.zeros(1), "model.a.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with open_weights(tmp_path, prefixes=["model"]) as weights:
        assert weights.read("a.weight") == 0
        assert weights.read("model.a.weight") == 1


def test_an_unknown_name_is_answered_with_the_closest(folder):
    with open_weights(folder) as weights:
        with pytest.raises(UnknownNameError, match=r"no tensor 'model\.layers\.0\.fx\.weight' among its 4; closest: "):
            weights.read("model.layers.0.fx.weight")
        with pytest.raises(UnknownNameError, match="same model"):
            weights.shape("zzz")


def test_memory_holds_one_tensor_at_a_time(tmp_path):
    """64 MB in files of 4 MB: reading and dropping them one by one stays below two of them."""
    psutil = pytest.importorskip("psutil")
    shard(tmp_path, {f"layer.{i}.weight": torch.full((1024, 1024), float(i)) for i in range(16)}, per_file=1)
    process = psutil.Process()
    tracemalloc.start()
    try:
        before, largest = process.memory_full_info().uss, 0
        with open_weights(tmp_path) as weights:
            for i in range(16):
                assert weights.read(f"layer.{i}.weight")[5, 5] == i
                largest = max(largest, process.memory_full_info().uss - before)
    finally:
        tracemalloc.stop()
    assert largest < 3 * 4 * 1024 * 1024


class TestFoldersThatCannotBeRead:
    def test_no_folder(self, tmp_path):
        with (
            pytest.raises(MissingFileError, match="does not exist; expected a model folder"),
            open_weights(tmp_path / "x"),
        ):
            pass

    def test_empty(self, tmp_path):
        with pytest.raises(MissingFileError, match=r"neither model\.safetensors nor"), open_weights(tmp_path):
            pass

    def test_only_pickles(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
        with (
            pytest.raises(MissingFileError, match=r"only pickled weights \(pytorch_model\.bin\)"),
            open_weights(tmp_path),
        ):
            pass

    def test_a_missing_shard(self, tmp_path, tensors):
        shard(tmp_path, tensors)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(MissingFileError, match="lacks model-00002-of-00002"), open_weights(tmp_path):
            pass

    @pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}'])
    def test_a_broken_index(self, tmp_path, index):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ModelError, match="no index of shards"), open_weights(tmp_path):
            pass

    @pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
    def test_an_index_that_leaves_its_folder(self, tmp_path, outside):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(ModelError, match="outside of its folder"), open_weights(tmp_path):
            pass

    @pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
    def test_a_file_that_is_none(self, tmp_path, content):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="no safetensors file, or a truncated one"), open_weights(tmp_path):
            pass

    def test_a_truncated_shard(self, tmp_path, tensors):
        shard(tmp_path, tensors)
        last = tmp_path / "model-00002-of-00002.safetensors"
        last.write_bytes(last.read_bytes()[:-4])
        with open_weights(tmp_path) as weights:
            weights.read("model.embed.weight")
            with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors.*truncated"):
                weights.read("head.weight")

    def test_an_index_that_lies(self, tmp_path, tensors):
        shard(tmp_path, tensors)
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("00002-of", "00001-of"))
        with open_weights(tmp_path) as weights:
            for read in (weights.read, weights.shape):
                with pytest.raises(ModelError, match="does not hold the tensor 'head"):
                    read("head.weight")


def test_a_folder_stands_for_itself_and_an_unknown_id_is_an_error(tmp_path):
    assert find_weight_folder(str(tmp_path)) == tmp_path
    for unknown in ("nobody/nothing-of-this-name", "a/b/c", "not here"):
        with pytest.raises(MissingFileError, match="neither a folder nor in the local cache"):
            find_weight_folder(unknown)


def test_a_hub_id_is_found_in_the_local_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_weight_folder("some/model") == snapshot
    assert find_weight_folder("some/model", "0" * 40) == snapshot
