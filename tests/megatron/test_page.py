"""The examples of docs/megatron.md run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).parents[2] / "docs" / "megatron.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    page: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), page)  # noqa: S102 - this page's own text
    assert {path.name for path in tmp_path.iterdir()} == {"start", "trained"}
    assert sorted(page["artefact"].factors) == [f"{i}.linear_fc{j}" for i in (0, 1) for j in (1, 2)]
    assert all(torch.isfinite(p).all() for p in page["twin"].parameters())
