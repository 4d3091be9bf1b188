"""Files appear whole or not at all, and a file that cannot be read says why in one line."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.errors import InputError
from hsai.files import atomic_write, read_json, sha256, write_json_atomic

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == path.parent and temporary.suffix == path.suffix
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    with pytest.raises(failure):
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"half")
            raise failure
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_a_block_that_writes_nothing_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        with atomic_write(tmp_path / "a.json"):
            pass
    assert os.listdir(tmp_path) == []


def test_a_name_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"the directory {tmp_path / 'absent'} does not exist"):
        write_json_atomic(tmp_path / "absent" / "a.json", {})
    with pytest.raises(InputError, match="it is a directory"):
        write_json_atomic(tmp_path, {})
    assert os.listdir(tmp_path) == []


def test_the_bytes_are_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_json_atomic(tmp_path / "a.json", 1)
    assert calls == ["fsync", "replace", "fsync"]


@settings(deadline=None, max_examples=50)
@given(value=JSON_VALUES)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    write_json_atomic(path, value)
    assert read_json(path) == value


def test_json_keeps_order_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "b": 1,\n  "a": "é"\n}\n'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": object()}])
def test_what_json_cannot_hold_is_not_written(tmp_path: Path, value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        write_json_atomic(tmp_path / "a.json", value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": ]}', r"Expecting value at line 2 column 7 \(character 15 of 17\)"),
        (b"", r"Expecting value at line 1 column 1 \(character 0 of 0\)"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    ],
)
def test_corrupt_json_names_the_path_and_the_position(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path} is not a JSON file: {message}$"):
        read_json(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_json, sha256):
        with pytest.raises(InputError, match=f"^cannot read {tmp_path / 'absent'}: No such file or directory$"):
            read(tmp_path / "absent")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    (tmp_path / "b").write_bytes(json.dumps({}).encode())
    assert sha256(tmp_path / "b") == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
