"""Bodies that are JSON objects, and all that is not."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.serve.errors import ApiError
from hsai.serve.json_body import DEEPEST, read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**50), 10**50) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=30)
@given(st.dictionaries(st.text(), VALUES), st.booleans())
def test_objects_are_read(content: dict, ascii: bool) -> None:
    assert read_object(json.dumps(content, ensure_ascii=ascii).encode()) == content


def nest(levels: int, open: str, close: str) -> bytes:
    return b'{"a": ' + open.encode() * levels + b"1" + close.encode() * levels + b"}"


@pytest.mark.parametrize(("open", "close"), [("[", "]"), ('{"a":', "}")])
def test_nesting(open: str, close: str) -> None:
    assert read_object(nest(DEEPEST - 1, open, close))["a"]
    for levels in (DEEPEST, 900, 100_000):
        with pytest.raises(ApiError, match="nested too deeply"):
            read_object(nest(levels, open, close))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"", "is empty"),
        (b" ", "is not JSON: Expecting value at line 1"),
        (b'{"a": 1', "is not JSON: .* at line 1, column 8"),
        (b"{'a': 1}", "is not JSON"),
        (b'{"a": 1} {}', "is not JSON: Extra data"),
        (b'{"a": "\x01"}', "is not JSON: Invalid control character"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 0xff at 7"),
        (b'{"a": "\xed\xa0\x80"}', "is not UTF-8: byte 0xed"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8: byte 0xff at 0"),
        (b'\xef\xbb\xbf{"a": 1}', "is not JSON"),
        (b"[]", r"no object: it begins with '\['"),
        (b'  "x"', "no object: it begins with '\"'"),
        (b"null", "no object: it begins with 'n'"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": -Infinity}', "-Infinity is no JSON"),
        (b'{"a": 1e999}', "1e999 is beyond float64"),
        (b'{"a": ' + b"1" * 10**5 + b"}", "an integer of 100000 digits"),
    ],
)
def test_what_is_no_object(body: bytes, fault: str) -> None:
    with pytest.raises(ApiError, match=fault) as caught:
        read_object(body)
    error = caught.value.body["error"]
    assert (caught.value.status, error["code"], error["param"]) == (400, "invalid_json", None)
    assert len(error["message"]) < 200 and "\n" not in error["message"]


def test_numbers_are_finite() -> None:
    assert math.isfinite(read_object(b'{"a": 1.7976931348623157e308}')["a"])
    assert read_object(b'{"a": -1e-999}') == {"a": 0.0}
