"""The container: what gguf-py writes is read; what lies is refused in one line, at once."""

import math
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from hsai.errors import InputError
from hsai.interop.gguf_container import open_gguf
from tests.interop.gguf_files import write_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two tensors, 64 numbers each; some metadata."""
    tensors = {
        "one": (np.arange(64, dtype=np.float32).reshape(2, 32), None),
        "two": (np.arange(68, dtype=np.uint8).reshape(2, 34), GGMLQuantizationType.Q8_0),
    }
    return write_file(tmp_path / "file.gguf", {"a.name": "text", "a.list": ["x", "yz"], "a.number": 7}, tensors)


def test_reads_every_kind_of_value_as_gguf_does(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "file.gguf", "llama")
    for kind, value in {
        "uint8": 200, "int8": -5, "uint16": 60_000, "int16": -30_000, "uint32": 4_000_000_000, "int32": -7,
        "float32": 0.5, "uint64": 1 << 63, "int64": -(1 << 62), "float64": math.pi, "bool": True, "string": "grün 🦊",
    }.items():  # fmt: skip
        getattr(writer, f"add_{kind}")(f"key.{kind}", value)
    for name, values in {"i": [1, -2], "f": [0.25, 1.0], "s": ["", "ß"], "b": [True, False]}.items():
        writer.add_array(f"key.{name}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_gguf(tmp_path / "file.gguf").metadata
    for key, field in GGUFReader(tmp_path / "file.gguf").fields.items():
        if not key.startswith("GGUF."):
            value = found[key].tolist() if isinstance(found[key], np.ndarray) else found[key]
            assert value == field.contents() and type(value) is type(field.contents()), key


def test_no_beginning_of_a_file_is_a_file(path: Path) -> None:
    content = path.read_bytes()
    for length in range(open_gguf(path).tensors["two"].offset + 68):  # behind it there is only padding
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="truncated|not a GGUF file|do not hold") as caught:
            open_gguf(path)
        assert "\n" not in str(caught.value)


def patch(at: int, form: str, value: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(form, data, at, value)


def after(marker: bytes, skip: int, form: str, value: int) -> Callable[[bytearray], None]:
    """Writes `value` `skip` bytes behind the end of the only `marker`."""

    def change(data: bytearray) -> None:
        assert data.count(marker) == 1
        struct.pack_into(form, data, data.index(marker) + len(marker) + skip, value)

    return change


def rename(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        at = data.index(old)
        data[at : at + len(old)] = new

    return change


# Behind a tensor's name: dimensions uint32, their sizes uint64 (innermost first), type uint32, offset uint64.
FAULTS = {
    "magic": (patch(0, "<I", 0x12345678), "it begins with b'xV4"),
    "version 1": (patch(4, "<I", 1), "of GGUF version 1; those that are read are 2 and 3"),
    "big endian": (patch(4, ">I", 3), "big-endian"),
    "tensors beyond the file": (patch(8, "<Q", 1 << 60), "claims 1152921504606846976 tensors"),
    "more tensors than there are": (patch(8, "<Q", 9), "tensor '' has 0 dimensions"),
    "keys beyond the file": (patch(16, "<Q", 1 << 63), "claims 9223372036854775808 metadata keys"),
    "a key's length": (patch(24, "<Q", 1 << 62), "truncated: a metadata key needs 4611686018427387904 bytes"),
    "a text's length": (after(b"a.name", 4, "<Q", 1 << 40), "the value of 'a.name' needs 1099511627776 bytes"),
    "a list's length": (after(b"a.list", 8, "<Q", 1 << 33), "claims 8589934592 entries of 'a.list'"),
    "a value's type": (after(b"a.number", 0, "<I", 99), "'a.number' has the unknown value type 99"),
    "a list of lists": (after(b"a.list", 4, "<I", 9), "'a.list' is an array of arrays"),
    "a list's type": (after(b"a.list", 4, "<I", 13), "'a.list' has the unknown value type 13"),
    "no UTF-8": (after(b"a.name", 12, "<B", 0xFF), "the value of 'a.name' is not UTF-8"),
    "one key twice": (rename(b"a.list", b"a.name"), "the metadata key 'a.name' stands there twice"),
    "one tensor twice": (rename(b"two", b"one"), "the tensor 'one' stands there twice"),
    "no dimensions": (after(b"two", 0, "<I", 0), "tensor 'two' has 0 dimensions"),
    "many dimensions": (after(b"two", 0, "<I", 1 << 31), "tensor 'two' has 2147483648 dimensions"),
    "an empty dimension": (after(b"two", 4, "<Q", 0), "impossible shape"),
    "dimensions that overflow": (after(b"one", 4, "<Q", 1 << 63), "impossible shape"),
    "a large dimension": (after(b"one", 4, "<Q", 1 << 40), "truncated: tensor 'one' ends at byte"),
    "no whole blocks": (after(b"two", 4, "<Q", 33), "rows of 33, no multiple of Q8_0's block, 32"),
    "an unknown type": (after(b"one", 20, "<I", 77), "tensor 'one' has the unknown type 77"),
    "an offset beyond the file": (after(b"two", 24, "<Q", 1 << 50), "truncated: tensor 'two' ends at byte"),
    "an offset that overflows": (after(b"two", 24, "<Q", (1 << 64) - 32), "truncated: tensor 'two' ends at byte"),
    "an odd offset": (after(b"two", 24, "<Q", 8), "tensor 'two' begins at 8, not aligned to 32"),
    "tensors that overlap": (after(b"two", 24, "<Q", 32), "tensors 'one' and 'two' overlap"),
    "a newline in a name": (rename(b"two", b"\n\x00o"), None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_header_that_lies_is_refused(fault: str, path: Path) -> None:
    change, refusal = FAULTS[fault]
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    begin = time.perf_counter()
    if refusal is None:
        assert len(open_gguf(path).tensors) == 2
    else:
        with pytest.raises(InputError, match=refusal) as caught:
            open_gguf(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("alignment", [0, 24, 7])
def test_a_wrong_alignment_is_refused(alignment: int, tmp_path: Path) -> None:
    write_file(tmp_path / "file.gguf", {"general.alignment": alignment}, {"one": (np.zeros(4, np.float32), None)})
    with pytest.raises(InputError, match=f"general.alignment is {alignment}, and must be a power of two"):
        open_gguf(tmp_path / "file.gguf")


def test_another_alignment_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "file.gguf", "llama")
    writer.add_custom_alignment(128)
    numbers = {"one": np.arange(5, dtype=np.float32), "two": np.arange(7, dtype=np.float32)}
    for name, array in numbers.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "file.gguf")
    assert all(np.array_equal(file.read(name), array) for name, array in numbers.items())


def test_other_faults(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory; give a .gguf file"):
        open_gguf(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        open_gguf(tmp_path / "none.gguf")
    write_file(tmp_path / "part.gguf", {"split.count": 3}, {"one": (np.zeros(4, np.float32), None)})
    with pytest.raises(InputError, match="one of 3 parts of a model"):
        open_gguf(tmp_path / "part.gguf")
    kind = GGMLQuantizationType.Q2_K
    write_file(tmp_path / "q2.gguf", {}, {"one": (np.zeros((1, 84), np.uint8), kind)})
    with pytest.raises(InputError, match="'one' has the quantization Q2_K; those that are read are BF16, F16, F32"):
        open_gguf(tmp_path / "q2.gguf").read("one")
    file = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="truncated: tensor 'two'"):
        file.read("two")
