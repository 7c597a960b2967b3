"""The targets of scripts/fuzz_store.py, with few inputs each; inputs that once failed stay here."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
if not (SCRIPTS / "store_fuzzing").is_dir():
    pytest.skip("scripts/ is not beside tests/", allow_module_level=True)
sys.path.append(str(SCRIPTS))

from store_fuzzing import targets  # noqa: E402 - beside tests/
from store_fuzzing.strategies import STRATEGIES  # noqa: E402

FOUND = {
    # made by hand, while the targets were written: each of these failed once
    "keywords of a terminal's": ("manifest", targets.manifest_body().replace(b'"size":', b'"\\u001b[2J\\n":1,"size":')),
    "a time that no calendar has": ("manifest", targets.manifest_body().replace(b'"created":1.5', b'"created":1e300')),
    "more bytes than floats count": (
        "manifest",
        targets.manifest_body().replace(b'"size":0', b'"size":1' + b"0" * 400),
    ),
    "lists in lists": ("manifest", targets.manifest_body().replace(b'"x":1', b'"x":' + b"[" * 500 + b"]" * 500)),
    "a shape that overflows": (
        "header",
        b'\1\0{"a":{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}',
    ),
}


@pytest.mark.parametrize("name", list(targets.TARGETS))
def test_hostile_bytes_are_refused_or_sound(name):
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(STRATEGIES[name])
    def holds(data: bytes) -> None:
        targets.TARGETS[name](data)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a miss is told by a warning
        holds()


@pytest.mark.parametrize("name", list(targets.TARGETS))
def test_the_sound_inputs_that_fuzzing_begins_with(name):
    for data in targets.SEEDS[name]():
        targets.TARGETS[name](data)


@pytest.mark.parametrize(("name", "data"), FOUND.values(), ids=FOUND)
def test_what_once_failed(name, data):
    targets.TARGETS[name](data)
