"""Damaged files: what bad disks, other programs and hands make of a file of ours."""

import json
import random
from typing import Any

from hypothesis import strategies as st

_TEXT = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "\ud800", "\udfff x", "\0", "a\nb", "../..", "x" * 300, "0x1", "passed"]),
)
_NUMBER = st.one_of(
    st.integers(-3, 30),
    st.sampled_from([-1, 1 << 63, 1 << 64, 1 << 200, 10**4000, 0.5, -0.0, 1e308, 5e-324]),
)
#: Any JSON value, most of them of another type than what they replace.
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBER, _TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_TEXT, inner, max_size=3)),
    max_leaves=6,
)
#: Texts that are no value that Python writes.
_RAW = st.sampled_from(
    [
        *("NaN", "-Infinity", "1e400", "9" * 5000, '"\\ud800"', '"\\udc80\\ud800"', "[" * 5000),
        *("[" * 70 + "]" * 70, '{"a":' * 3000, "\\", "nul", "\ufeff", "\x00", '{"e":1,"e":2}'),
    ]
)
_PLACE = "\x01here\x02"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value in a document, itself first."""
    inner = value.items() if isinstance(value, dict) else []
    inner = enumerate(value) if isinstance(value, list) else inner
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place; without it if that is KeyError."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    key, *rest = path
    if new is KeyError and not rest:
        del copy[key]
    else:
        copy[key] = replaced(copy[key], tuple(rest), new)
    return copy


@st.composite
def values(draw: st.DrawFn, document: Any) -> str:
    """A JSON text in which one to three values are other ones, missing, twice, or new."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(document)))
        kind = draw(st.sampled_from(["value", "value", "value", "raw", "gone", "more"]))
        if kind == "gone" and path:
            document = replaced(document, path, KeyError)
        elif kind == "more":
            extra = {draw(_TEXT): draw(VALUES)}
            document = replaced(document, path, extra)
        elif kind == "raw":
            text = json.dumps(replaced(document, path, _PLACE))
            return text.replace(json.dumps(_PLACE), draw(_RAW))
        else:
            document = replaced(document, path, draw(VALUES))
    return json.dumps(document)


@st.composite
def content(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes of a file that was cut, zeroed, overwritten or mixed with others."""
    at, end = sorted(draw(st.integers(0, len(whole))) for _ in range(2))
    how = draw(st.sampled_from(["cut", "zero", "junk", "flip", "twice", "swap", "empty"]))
    if how == "cut":
        return whole[:at]
    if how == "zero":
        return whole[:at] + bytes(end - at) + whole[end:]
    if how == "junk":
        return whole[:at] + draw(st.binary(max_size=40)) + whole[end:]
    if how == "flip" and whole:
        at = min(at, len(whole) - 1)
        return whole[:at] + bytes([whole[at] ^ 1 << draw(st.integers(0, 7))]) + whole[at + 1 :]
    if how == "twice":
        return whole + whole[at:]
    if how == "swap":
        lines = whole.splitlines(keepends=True)
        random.Random(at).shuffle(lines)
        return b"".join(lines)
    return b""


def files(whole: bytes) -> st.SearchStrategy[bytes]:
    """Damaged versions of a file, JSON or lines of JSON, by its values or by its bytes."""
    try:
        by_values = values(json.loads(whole)).map(str.encode)
    except ValueError:
        lines = whole.splitlines()
        by_values = st.integers(0, len(lines) - 1).flatmap(
            lambda number: values(json.loads(lines[number])).map(
                lambda line: b"\n".join([*lines[:number], line.encode(), *lines[number + 1 :], b""])
            )
        )
    return st.one_of(by_values, by_values, content(whole))
