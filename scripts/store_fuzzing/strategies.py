"""How hypothesis makes inputs: sound ones with a few things changed, which come further than random bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from store_fuzzing.targets import SEEDS, header_case, manifest_body

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

_NUMBERS = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 10**4000]),
    st.floats(),
    st.booleans(),
)
_TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["../x", "/etc/passwd", "a/../b", "\x1b[2J\n", "\0", "\ud800", "key", "tensors.safetensors", "F32"]
    ),
    st.sampled_from(["0" * 64, "f" * 32, "x" * 3000, "U8", "BF16", "__metadata__", "start/x.json", "con", "\u202e"]),
)
_VALUES = st.recursive(
    st.one_of(st.none(), _NUMBERS, _TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_TEXTS, inner, max_size=4)),
    max_leaves=12,
)


@st.composite
def changed_json(draw: DrawFn, source: bytes) -> bytes:
    """JSON values like ``source``, some of them others, or gone, or twice; as text."""
    value = json.loads(source)
    for _ in range(draw(st.integers(1, 4))):
        value = _changed(draw, value)
    return _written(draw, value)


def _changed(draw: DrawFn, value: Any) -> Any:  # noqa: ANN401 - JSON
    """One value within, changed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        name = draw(st.sampled_from(sorted(value)))
        what = draw(st.integers(0, 9))
        if what == 0:
            return {key: item for key, item in value.items() if key != name}
        if what == 1:
            return {(draw(_TEXTS) if key == name else key): item for key, item in value.items()}
        if what == 2:  # noqa: PLR2004 - a choice
            return value | {draw(_TEXTS): value[name]}
        return value | {name: _changed(draw, value[name])}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], _changed(draw, value[place]), *value[place + 1 :]]
    return draw(_VALUES)


def _written(draw: DrawFn, value: Any) -> bytes:  # noqa: ANN401 - JSON
    try:
        text = json.dumps(value, ensure_ascii=draw(st.booleans()), separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )
    except ValueError:  # a number with more digits than Python writes
        text = b"null"
    if not draw(st.integers(0, 7)):  # the same name twice
        name = draw(st.sampled_from([b'{"key":1,', b'{"a":{},', b'{"schema":1,', b'{"__metadata__":{"a":"b"},']))
        text = name + text[1:] if len(text) > 2 else text  # noqa: PLR2004 - not empty
    return text


@st.composite
def changed_bytes(draw: DrawFn, source: bytes) -> bytes:
    """``source`` with bytes flipped, cut out, put in, repeated."""
    content = bytearray(source)
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        what = draw(st.integers(0, 4))
        if what == 0 and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif what == 1:
            del content[place : place + draw(st.integers(1, 40))]
        elif what == 2:  # noqa: PLR2004 - a choice
            content[place:place] = draw(st.binary(max_size=20))
        elif what == 3:  # noqa: PLR2004 - a choice
            content[place:place] = content[place : place + 40] * draw(st.integers(1, 20))
        else:
            content[place:place] = draw(st.sampled_from([b"[", b'{"a":', b"9", b'"\\u0000"'])) * draw(
                st.sampled_from([1, 100, 5000])
            )
    return bytes(content)


def _manifests() -> SearchStrategy[bytes]:
    body = manifest_body()
    return st.one_of(
        changed_json(body + b"}").map(lambda text: text[:-1]), changed_bytes(body), st.binary(max_size=200)
    )


def _headers() -> SearchStrategy[bytes]:
    case = header_case()
    return st.one_of(
        st.builds(
            lambda tail, text: b"\1" + bytes([tail]) + text, st.sampled_from([0, 1, case[1]]), changed_json(case[2:])
        ),
        changed_bytes(case),
        changed_bytes(SEEDS["header"]()[1]),
        st.binary(max_size=200),
    )


STRATEGIES: dict[str, SearchStrategy[bytes]] = {
    "manifest": _manifests(),
    "header": _headers(),
    "key": st.one_of(
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.from_regex(r"[a-z0-9_-]{1,130}\n?", fullmatch=True).map(str.encode),
        st.binary(max_size=20),
    ),
    "memo": st.one_of(changed_json(SEEDS["memo"]()[0]), changed_bytes(SEEDS["memo"]()[0])),
    "entry": _manifests(),
    "remote": _manifests(),
}
