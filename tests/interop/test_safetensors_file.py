"""Files that are whole are read as the `safetensors` package reads them; all others are refused in one line."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from hsai.errors import InputError
from hsai.interop.safetensors_file import ALIGNMENT, map_tensors, read_records, write_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.half": np.arange(5, dtype=np.float16),
    "c": np.zeros((0, 4), np.float32),
    "d": np.full((), 7, np.float32),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Written by the package."""
    safetensors.numpy.save_file(TENSORS, tmp_path / "file.safetensors", {"format": "pt"})
    return tmp_path / "file.safetensors"


def test_what_the_package_writes_is_read(path: Path) -> None:
    records = read_records(path)
    assert records.keys() == TENSORS.keys()
    for name, record in records.items():
        found = record.read()
        assert found.dtype == TENSORS[name].dtype and found.shape == TENSORS[name].shape
        assert np.array_equal(found, TENSORS[name])


def test_the_package_reads_what_is_written(tmp_path: Path) -> None:
    tensors = TENSORS | {"e": np.arange(3).astype(jnp.bfloat16), "f": np.arange(6.0).reshape(2, 3).T.astype(np.float32)}
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "x.safetensors", shapes, tensors.items())
    found = safetensors.flax.load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and np.array_equal(found[name], tensor)
        assert np.array_equal(read_records(tmp_path / "x.safetensors")[name].read(), tensor)


def test_mapped_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    """Aligned as jax takes them without a copy; a file that takes the name does no harm."""
    tensors = {
        "a": np.arange(64, dtype=np.float32).reshape(4, 16),
        "b": np.arange(128, dtype=np.uint16).view(jnp.bfloat16),
        "c": np.arange(-64, 64, dtype=np.int8),
        "d": np.arange(7, dtype=np.uint32),
        "e": np.zeros((0, 3), np.float32),
    }
    path = tmp_path / "x.safetensors"
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    write_tensors(path, shapes, tensors.items())
    found = map_tensors(path)
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "other").rename(path)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and np.array_equal(found[name], tensor), name
        assert found[name].ctypes.data % ALIGNMENT == 0 or name == "e"
        array = jax.device_put(found[name], jax.devices()[0])
        assert name == "e" or array.unsafe_buffer_pointer() == found[name].ctypes.data
        assert not found[name].flags.writeable


def test_tensors_may_come_in_slices(tmp_path: Path) -> None:
    """Of leading axes, as many as one likes; integers too, which packed weights are made of."""
    tensors = {
        "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "b": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "c": np.arange(-3, 3, dtype=np.int8).reshape(3, 2).T,
        "d": np.zeros((2, 0), np.float32),
    }
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    pieces = [("a", tensors["a"][0, 0]), ("a", tensors["a"][0, 1]), ("a", tensors["a"][0, 2]), ("a", tensors["a"][1])]
    pieces += [("b", tensors["b"]), ("c", tensors["c"][0]), ("c", tensors["c"][1]), ("d", tensors["d"])]
    write_tensors(tmp_path / "x.safetensors", shapes, pieces)
    found = safetensors.flax.load_file(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and np.array_equal(found[name], tensor), name
    for wrong in (
        pieces[:3],
        [*pieces[:2], pieces[3], *pieces[2:]],
        [("a", np.zeros(3, np.float32))],
        [*pieces, pieces[0]],
    ):
        with pytest.raises(ValueError, match="announced"):
            write_tensors(tmp_path / "y.safetensors", shapes, wrong)
        assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("names", [["a"], ["a", "b.half", "d"], ["b.half", "a"]])
def test_only_what_was_announced_is_written(names: list[str], tmp_path: Path) -> None:
    shapes = {name: (TENSORS[name].shape, TENSORS[name].dtype) for name in ("a", "b.half")}
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path / "x.safetensors", shapes, [(name, TENSORS[name]) for name in names])
    assert list(tmp_path.iterdir()) == []


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The same numbers behind a header that was changed."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header if text is None else text).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an offset beyond the end": (lambda h: h["a"].update(data_offsets=[0, 1 << 40]), "tensor 'a' needs 24 bytes"),
    "a shape that needs more": (lambda h: h["a"].update(shape=[2, 4]), "tensor 'a' needs 32 bytes"),
    "a negative size": (lambda h: h["a"].update(shape=[-2, -3]), r"tensor 'a' has the shape or place \[-2, -3\]"),
    "sizes whose product overflows": (lambda h: h["a"].update(shape=[1 << 40, 1 << 40]), "tensor 'a' needs"),
    "a size that is no number": (lambda h: h["a"].update(shape=[2, True]), "tensor 'a' has the shape"),
    "a shape that is no list": (lambda h: h["a"].update(shape=6), "tensor 'a' has the shape"),
    "three offsets": (lambda h: h["a"].update(data_offsets=[0, 24, 24]), "its place is"),
    "an unknown dtype": (lambda h: h["a"].update(dtype="F8_E4M3"), "tensor 'a' is 'F8_E4M3'; what can be read is F32"),
    "another key": (lambda h: h["a"].update(color="red"), "tensor 'a' is described by"),
    "no shape": (lambda h: h["a"].pop("shape") and None, "tensor 'a' is described by"),
    "no object": (lambda h: h.update(a=3), "tensor 'a' is described by 3"),
    "tensors that overlap": (lambda h: h["b.half"].update(data_offsets=[4, 14]), "'b.half' overlaps the one before it"),
    "a tensor that is not told": (lambda h: h.pop("a") and None, "leaves a gap before it|longer than its header says"),
    "a list": (lambda h: [1, 2], "the header is list"),
    "no JSON": (lambda h: b"{'a'", "the header is not JSON"),
    "no text": (lambda h: b"\xff\xfe", "the header is not JSON"),
    "a name twice": (lambda h: b'{"x": 1, "x": 2}', "'x' stands there twice"),
    "deep nesting": (lambda h: b"[" * 200_000, "the header is not JSON"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=list(FAULTS))
def test_a_header_that_lies(change: Callable[[dict[str, Any]], Any], message: str, path: Path) -> None:
    rewrite(path, change)
    with pytest.raises(InputError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 8, 40, -1])
def test_a_file_that_is_cut_off(size: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="no whole safetensors file|truncated"):
        read_records(path)


def test_a_file_that_is_too_long_or_not_there(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match="longer than its header says"):
        read_records(path)
    with pytest.raises(InputError, match="cannot read .*: No such file"):
        read_records(path.with_name("other"))
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="a header of 4611686018427387904 bytes in 10"):
        read_records(path)


def test_a_file_that_shrinks_after_its_header_was_read(path: Path) -> None:
    records = read_records(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="is truncated: tensor 'a' ends at byte"):
        records["a"].read()


def test_damage_is_refused_or_harmless(path: Path) -> None:
    """Bytes of the header changed, dropped and doubled at random: no other exception, no tensor of a wrong size."""
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(1500):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(content), 330))
            match draw.randrange(3):
                case 0:
                    content[at] = draw.choice(b'0123456789-[]{}",:eE.\\ \xff\x00')
                case 1:
                    del content[at : at + draw.randint(1, 9)]
                case _:
                    content[at:at] = content[at : at + draw.randint(1, 9)]
        path.write_bytes(content)
        try:
            for record in read_records(path).values():
                assert record.read().shape == record.shape and record.end <= len(content)
        except InputError:
            refused += 1
    assert 1000 < refused < 1500
