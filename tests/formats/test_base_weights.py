"""Quantised base weights beside an adapter: in shards, whole, and only ours."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from smartinit.errors import ArtefactError, VerificationError
from smartinit.formats.base_weights import read_base_weights, write_base_weights
from smartinit.formats.record import read_record_only

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = {f"layer.{i}": torch.full((4, 4), float(i)) for i in range(5)}  # 64 bytes each


@pytest.mark.parametrize(("limit", "files"), [(1, 5), (64, 5), (128, 3), (1000, 1)])
def test_shards_hold_no_more_than_they_may_and_are_read_back(tmp_path: Path, limit: int, files: int) -> None:
    write_base_weights(tmp_path, WEIGHTS, shard_bytes=limit)
    assert len(list(tmp_path.iterdir())) == files
    found = read_base_weights(tmp_path)
    assert list(found) == list(WEIGHTS)
    assert all(torch.equal(found[name], weight) for name, weight in WEIGHTS.items())


def test_nothing_is_written_for_nothing(tmp_path: Path) -> None:
    write_base_weights(tmp_path, {})
    assert list(tmp_path.iterdir()) == []
    assert read_base_weights(tmp_path) == {}


def test_weights_that_share_memory_and_their_dtype(tmp_path: Path) -> None:
    shared = torch.ones(3, 3, dtype=torch.bfloat16)
    write_base_weights(tmp_path, {"a": shared, "b": shared.T})
    assert {weight.dtype for weight in read_base_weights(tmp_path).values()} == {torch.bfloat16}


def test_a_missing_or_broken_shard_and_nan(tmp_path: Path) -> None:
    write_base_weights(tmp_path, WEIGHTS, shard_bytes=64)
    (tmp_path / "base-00003-of-00005.safetensors").unlink()
    with pytest.raises(ArtefactError, match="only some files of the quantised base"):
        read_base_weights(tmp_path)
    (tmp_path / "one").mkdir()
    write_base_weights(tmp_path / "one", WEIGHTS)
    (tmp_path / "one" / "base-00001-of-00001.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ArtefactError, match="no readable safetensors file"):
        read_base_weights(tmp_path / "one")
    with pytest.raises(VerificationError, match=r"base of layer 'x' holds NaN"):
        write_base_weights(tmp_path, {"x": torch.full((2, 2), torch.nan)})


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "start/../x", "base-1-of-1.safetensors", "README.md"])
def test_a_hostile_record_makes_us_read_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "smartinit.json").write_text(
        json.dumps({"format": 2, "files": {"adapter_config.json": "0", name: "0"}})
    )
    with pytest.raises(ArtefactError, match="no digests of the files beside it"):
        read_record_only(tmp_path)
