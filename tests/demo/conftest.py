from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

# The demo is made by scripts, which are programs and no part of the package.
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.append(str(SCRIPTS))


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script that makes the demo model, as a module; torch's settings are restored afterwards."""
    if not (SCRIPTS / "make_demo_model.py").is_file():
        pytest.skip("scripts/ is not beside tests/")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    threads = torch.get_num_threads()
    yield importlib.import_module("make_demo_model")
    torch.use_deterministic_algorithms(mode=False)
    torch.set_num_threads(threads)
