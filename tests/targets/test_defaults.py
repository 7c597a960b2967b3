"""The architectures' default layers."""

from __future__ import annotations

import pytest

from smartinit.targets import DEFAULT_TARGETS


def test_the_defaults_are_pefts():
    pytest.importorskip("peft")
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS

    assert dict(DEFAULT_TARGETS) == {
        kind: layers if isinstance(layers, str) else frozenset(layers) for kind, layers in THEIRS.items()
    }
