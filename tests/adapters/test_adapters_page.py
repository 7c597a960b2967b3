"""The examples of docs/adapters.md run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    page: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), page)  # noqa: S102 - this page's own text
    assert capsys.readouterr().out.startswith("trainable params: ")
    tokens, model, again = (page[name] for name in ("tokens", "model", "again"))
    assert torch.equal(page["mixed"][1], page["plain"][1])
    assert not torch.equal(page["mixed"][0], page["plain"][0])
    again.eval().set_adapter(model.active_adapters)
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
