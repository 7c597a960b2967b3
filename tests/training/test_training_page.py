"""The examples of docs/training.md run as they stand, one after the other, and do what the page says."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.mark.usefixtures("lab")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    page = types.ModuleType("training_page")
    monkeypatch.setitem(sys.modules, page.__name__, page)  # classes in it are looked up by their module's name
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 7
    for block in blocks:
        code = compile(block, str(PAGE), "exec")
        exec(code, vars(page))  # noqa: S102 - this page's own text
    found = vars(page)
    assert found["trainer"].state.global_step == 4
    assert (tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "sft" / "checkpoint-4" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "smartinit_init.json").read_text())["begins_there"] is True
    assert (tmp_path / "trained" / "start" / "adapter_config.json").is_file()
    assert not [name for name, _ in found["merged"].named_parameters() if "lora" in name]
