"""Folders with a Megatron adapter: any cut into shards holds the same tensors; broken ones are refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smartinit.errors import (
    ArtefactError,
    ConfigError,
    MissingFileError,
    OutputError,
    UnknownNameError,
    VerificationError,
)
from smartinit.formats.megatron_folder import MARKER, ShardedFolder, write_folder
from smartinit.formats.megatron_layout import parts
from smartinit.formats.rows import shard_rows

if TYPE_CHECKING:
    from pathlib import Path

LAYER = "decoder.layers.0."
QKV, FC1, FC2 = (
    f"{LAYER}{name}.adapter." for name in ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
)
EXPERTS = f"{LAYER}mlp.experts.linear_fc1.adapter."
CONFIG = dict(peft_type="lora", dim=8, alpha=16, target_modules=["linear_qkv"], gated_linear_unit=True)


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    return {
        f"{QKV}linear_in.weight": numbers(8, 16),
        f"{QKV}linear_out.weight": numbers(24, 8).half(),
        f"{FC1}linear_in.weight": numbers(8, 16).bfloat16(),
        f"{FC1}linear_out.weight": numbers(48, 8),
        f"{FC1}weight_magnitude": numbers(48).double(),
        f"{FC2}linear_in.weight": numbers(8, 24),
        f"{FC2}linear_out.weight": numbers(16, 8),
        f"{FC2}weight_magnitude": numbers(16),
        f"{EXPERTS}linear_in.weight": numbers(3, 8, 16),
        f"{EXPERTS}linear_out.weight": numbers(3, 48, 8),
        "odd.adapter.linear_out.weight": numbers(5, 3),
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_shards_holds_the_same_tensors(tmp_path: Path, size: int) -> None:
    whole = tensors()
    folder = ShardedFolder.open(write_folder(tmp_path / "a", whole, CONFIG, tensor_parallel=size))
    assert folder.config == {**CONFIG, "format": "smartinit-megatron-1"}
    assert list(folder.keys()) == sorted(whole)
    for key, tensor in whole.items():
        found = folder.read(key)
        assert (found.dtype, folder.shape(key), folder.dtype(key)) == (tensor.dtype, tuple(tensor.shape), tensor.dtype)
        assert torch.equal(found, tensor)
        middle = [(n // 3, n - n // 4) for n in tensor.shape]
        assert torch.equal(folder.read(key, middle), tensor[tuple(slice(*pair) for pair in middle)])
    for other in (1, 2, 3, 4):
        for rank in range(other):
            expected = shard_rows(whole[f"{EXPERTS}linear_out.weight"], rank, other, gated=True, dim=1)
            found = folder.read_shard(f"{EXPERTS}linear_out.weight", 1, rank, other, gated=True)
            assert torch.equal(found, expected)


def test_shards_are_those_of_megatrons_ranks(tmp_path: Path) -> None:
    whole = tensors()
    write_folder(tmp_path / "a", whole, CONFIG, tensor_parallel=2)
    second = load_file(tmp_path / "a" / "shard-00001-of-00002.safetensors")
    gated = torch.cat([torch.arange(12, 24), torch.arange(36, 48)])
    expected = {
        f"{QKV}linear_in.weight": whole[f"{QKV}linear_in.weight"][4:],
        f"{QKV}linear_out.weight": whole[f"{QKV}linear_out.weight"][12:],
        f"{FC1}linear_in.weight": whole[f"{FC1}linear_in.weight"][4:],
        f"{FC1}linear_out.weight": whole[f"{FC1}linear_out.weight"][gated],
        f"{FC1}weight_magnitude": whole[f"{FC1}weight_magnitude"][gated],
        f"{FC2}linear_in.weight": whole[f"{FC2}linear_in.weight"][:, 12:],
        f"{FC2}linear_out.weight": whole[f"{FC2}linear_out.weight"][8:],
        f"{EXPERTS}linear_in.weight": whole[f"{EXPERTS}linear_in.weight"][:, 4:],
        f"{EXPERTS}linear_out.weight": whole[f"{EXPERTS}linear_out.weight"][:, gated],
    }
    assert second.keys() == expected.keys()  # a row-parallel magnitude and what is not shared evenly: the first's
    for key, tensor in expected.items():
        assert torch.equal(second[key], tensor), key


def test_only_what_overlaps_is_read(tmp_path: Path) -> None:
    folder = ShardedFolder.open(write_folder(tmp_path / "a", tensors(), CONFIG, tensor_parallel=4))
    for i in (0, 2, 3):
        (tmp_path / "a" / f"shard-{i:05d}-of-00004.safetensors").unlink()
    key = f"{QKV}linear_out.weight"
    assert torch.equal(folder.read(key, [(6, 12), (0, 8)]), tensors()[key][6:12])
    with pytest.raises(ArtefactError, match="cannot read"):
        folder.read(key)


def test_ranks_hold_parts_in_the_order_of_rows() -> None:
    assert parts((48, 8), 0, 1, 2, gated=True) == [
        (((12, 24), (0, 8)), (0, 0)),
        (((36, 48), (0, 8)), (12, 0)),
    ]
    with pytest.raises(ConfigError, match="each half of 48 rows"):
        parts((48, 8), 0, 0, 5, gated=True)


def change(path: Path, where: list[Any], value: object) -> None:
    content = json.loads(path.read_text())
    inner = content
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = value
    path.write_text(json.dumps(content))


KEY = f"{FC1}linear_out.weight"
PIECES = ["tensors", KEY, "pieces"]
FILE = "shard-00000-of-00002.safetensors"


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (["format"], "smartinit-megatron-9", "has format 'smartinit-megatron-9'"),
        (["dim"], 0, "says dim=0, which is no dim of an adapter"),
        (["dim"], True, "says dim=True"),
        (["alpha"], "16", "says alpha='16'"),
        (["peft_type"], "LORA", "says peft_type='LORA'"),
        (["target_modules"], "linear_qkv", "says target_modules='linear_qkv'"),
        (["target_modules"], [], r"says target_modules=\[\]"),
        (["dim"], 10**30, "says dim=1000"),
        (["alpha"], 1e308, r"says alpha=1e\+308"),
        (["alpha"], 10**400, "says alpha=1000"),
        (["alpha"], -1, "says alpha=-1"),
        (["layers"], [], r"says layers=\[\]"),
        (["layers"], {"decoder.x": 7}, "says 7 of layer 'decoder.x'; expected a dim and an alpha"),
        (["layers"], {"decoder.x": {"alpha": -3}}, "says {'alpha': -3} of layer 'decoder.x'"),
        (["layers"], {"decoder.x": {"alpha": 10**400}}, "of layer 'decoder.x'; expected"),
        (["layers"], {"decoder.x": {"dim": 0}}, "says {'dim': 0} of layer 'decoder.x'"),
        (["tensors"], {}, "lists no tensors"),
        (["tensors", KEY], 3, "gives None as the shape of"),
        (["tensors", KEY, "shape"], [48, -8], "as the shape of"),
        (["tensors", KEY, "shape"], [2**39, 2**39], "as the shape of"),
        (["tensors", KEY, "shape"], [64, 8], "leave out a part of"),
        (["tensors", KEY, "shape"], [40, 8], "reach beyond the end of"),
        (["tensors", KEY, "dtype"], "int8", "gives 'int8' .* as the dtype of"),
        (PIECES, [], "leave out a part of"),
        ([*PIECES, 0, "file"], "../../etc/passwd", "which is no piece, for"),
        ([*PIECES, 0, "ranges"], [[0, 12]], "which is no piece, for"),
        ([*PIECES, 0, "ranges"], [[0, 13], [0, 8]], "cover a part twice of"),
        ([*PIECES, 0, "ranges"], [[0, 11], [0, 8]], "leave out a part of"),
        ([*PIECES, 0, "ranges"], [[0, 12], [0, 4]], "leave out a part of"),
        ([*PIECES, 0, "ranges"], [[12, 0], [0, 8]], "which is no piece, for"),
        ([*PIECES, 0, "at"], [-1, 0], "which is no piece, for"),
    ],
)
def test_json_that_does_not_say_where_a_tensor_is(tmp_path: Path, where: list[Any], value: object, words: str) -> None:
    folder = write_folder(tmp_path / "a", tensors(), CONFIG, tensor_parallel=2)
    change(folder / MARKER, where, value)
    with pytest.raises(ArtefactError, match=words):
        ShardedFolder.open(folder)


def test_pieces_twice_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", tensors(), CONFIG, tensor_parallel=2)
    pieces = json.loads((folder / MARKER).read_text())["tensors"][KEY]["pieces"]
    change(folder / MARKER, PIECES, [*pieces, pieces[0]])
    with pytest.raises(ArtefactError, match="cover a part twice"):
        ShardedFolder.open(folder)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (
            torch.zeros(24, 8, dtype=torch.float16),
            r"of shape \(24, 8\) and F16, where .* says \(24, 8\) and torch.float32",
        ),
        (torch.zeros(20, 8), r"of shape \(20, 8\)"),
        (torch.zeros(24), r"of shape \(24,\)"),
        (None, "cannot read"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, stored: torch.Tensor | None, words: str) -> None:
    folder = write_folder(tmp_path / "a", tensors(), CONFIG, tensor_parallel=2)
    held = load_file(folder / FILE)
    save_file({name: t for name, t in {**held, KEY: stored}.items() if t is not None}, folder / FILE)
    with pytest.raises(ArtefactError, match=words):
        ShardedFolder.open(folder).read(KEY)


def test_no_memory_is_taken_for_what_the_files_do_not_hold(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", tensors(), CONFIG)
    n = 2**20  # four terabytes
    change(folder / MARKER, ["tensors", KEY, "shape"], [n, n])
    change(folder / MARKER, [*PIECES, 0, "ranges"], [[0, n], [0, n]])
    with pytest.raises(ArtefactError, match=r"of shape \(48, 8\) and F32, where .* says \(1048576, 1048576\)"):
        ShardedFolder.open(folder).read(KEY)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    bad = {**tensors(), KEY: torch.full((48, 8), torch.nan)}
    with pytest.raises(VerificationError, match="NaN or Inf; it is not written"):
        write_folder(tmp_path / "a", bad, CONFIG)
    assert not list(tmp_path.iterdir())
    folder = write_folder(tmp_path / "a", tensors(), CONFIG)
    file = folder / "shard-00000-of-00001.safetensors"
    save_file({**load_file(file), KEY: bad[KEY]}, file)
    with pytest.raises(VerificationError, match="holds NaN or Inf"):
        ShardedFolder.open(folder).read(KEY)


def test_folders_and_arguments_that_are_none(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", tensors(), CONFIG)
    opened = ShardedFolder.open(folder)
    with pytest.raises(UnknownNameError, match="holds no 'x'"):
        opened.read("x")
    with pytest.raises(ConfigError, match="has no part"):
        opened.read(KEY, [(0, 49), (0, 8)])
    with pytest.raises(OutputError, match="exists already"):
        write_folder(folder, tensors(), CONFIG)
    write_folder(folder, {KEY: tensors()[KEY]}, CONFIG, force=True)
    assert list(ShardedFolder.open(folder).keys()) == [KEY]
    with pytest.raises(ConfigError, match="tensor_parallel=0"):
        write_folder(tmp_path / "b", tensors(), CONFIG, tensor_parallel=0)
    with pytest.raises(ConfigError, match=r"cannot be written: .* says dim=None"):
        write_folder(tmp_path / "b", tensors(), {**CONFIG, "dim": None})
    with pytest.raises(ConfigError, match=r"is torch\.int64"):
        write_folder(tmp_path / "b", {KEY: torch.zeros(48, 8, dtype=torch.int64)}, CONFIG)
    assert not (tmp_path / "b").exists()
    (folder / MARKER).write_text("{")
    with pytest.raises(ArtefactError, match="is not JSON"):
        ShardedFolder.open(folder)
    (folder / MARKER).unlink()
    with pytest.raises(MissingFileError, match="is not finished"):
        ShardedFolder.open(folder)
    with pytest.raises(MissingFileError, match="there is no folder"):
        ShardedFolder.open(tmp_path / "none")
