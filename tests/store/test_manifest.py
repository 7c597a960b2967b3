"""Manifests answer for their own bytes: what is read is what was written, or an error."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartinit.errors import StoreError, VerificationError
from smartinit.store.blobs import Blob
from smartinit.store.manifest import Manifest

BLOB = Blob("ab" * 32, 3, "cd" * 16)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SAMPLE = Manifest(
    key="k", kind="x", leaves={"a": [1]}, blobs={"f": BLOB}, meta={"b": 2.5}, tags=("t",), basis="c", created=1.5,
    writer={"host": "h"},
)  # fmt: skip


def signed(values):
    """As a liar would write it: other values with a digest that is right."""
    body = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()[:-1]
    return body + b',"check":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def plain(**changes):
    values = json.loads(SAMPLE.to_bytes())
    del values["check"]
    values.update(changes)
    return values


@given(
    meta=st.dictionaries(st.text(), JSON, max_size=3),
    leaves=st.dictionaries(st.text(), JSON, max_size=3),
    created=st.floats(0, 1e11),
    size=st.integers(0, 2**62),
)
def test_what_is_read_is_what_was_written(meta, leaves, created, size):
    written = Manifest(key="k", blobs={"f": Blob("0" * 64, size, "1" * 32)}, meta=meta, leaves=leaves, created=created)
    assert Manifest.from_bytes(written.to_bytes(), "k") == written
    assert Manifest.from_bytes(written.to_bytes(), "k").to_bytes() == written.to_bytes()


def test_no_bit_of_it_may_change():
    content = SAMPLE.to_bytes()
    for place in range(len(content) * 8):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(VerificationError):
            Manifest.from_bytes(bytes(changed), "k")


def test_no_byte_of_it_may_be_missing_or_added():
    content = SAMPLE.to_bytes()
    for length in range(len(content)):
        with pytest.raises(VerificationError):
            Manifest.from_bytes(content[:length], "k")
    for wrong in (content + b"\n", b" " + content, content + content, content[:-1] + b" "):
        with pytest.raises(VerificationError):
            Manifest.from_bytes(wrong, "k")


@pytest.mark.parametrize(
    "changes",
    [
        dict(key="other"), dict(kind=3), dict(basis=None), dict(meta=[]), dict(leaves="x"), dict(writer=1),
        dict(created="now"), dict(created=True), dict(tags=["../x"]), dict(tags=[3]), dict(tags=None), dict(unknown=1),
        dict(blobs=[]), dict(blobs={"../f": BLOB.as_dict()}), dict(blobs={"/f": BLOB.as_dict()}),
        dict(blobs={".f": BLOB.as_dict()}), dict(blobs={"a/b/c": BLOB.as_dict()}), dict(blobs={"f": {}}),
        dict(blobs={"f": BLOB.as_dict() | {"size": -1}}), dict(blobs={"f": BLOB.as_dict() | {"size": True}}),
        dict(blobs={"f": BLOB.as_dict() | {"sha256": "../../x"}}), dict(blobs={"f": BLOB.as_dict() | {"xxh3": 5}}),
        dict(blobs={"f": BLOB.as_dict() | {"sha256": "AB" * 32}}), dict(blobs={"f": BLOB.as_dict() | {"more": 1}}),
    ],
    ids=str,
)  # fmt: skip
def test_nothing_is_believed_because_its_digest_is_right(changes):
    assert Manifest.from_bytes(signed(plain()), "k") == SAMPLE
    with pytest.raises(VerificationError):
        Manifest.from_bytes(signed(plain(**changes)), "k")


def test_a_newer_schema_is_no_damage():
    with pytest.raises(StoreError, match="upgrade smartinit, or use another store"):
        Manifest.from_bytes(signed(plain(schema=2)), "k")


def test_its_size_is_that_of_its_blobs():
    assert Manifest(key="k", blobs={"a": BLOB, "b": BLOB}).size == 6
