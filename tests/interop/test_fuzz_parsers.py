"""The fuzzer of the two parsers: what it begins with, what it calls a finding, and that it finds none at once."""

import random
from pathlib import Path

import pytest

from hsai.errors import InputError
from hsai.interop.gguf_blocks import DEQUANTIZERS
from hsai.interop.gguf_container import open_gguf
from scripts.fuzz_parsers import PARSERS, damage, find_fault, make_gguf


def test_the_gguf_file_has_every_type_that_is_read(tmp_path: Path) -> None:
    make_gguf(tmp_path / "seed.gguf")
    assert {record.type for record in open_gguf(tmp_path / "seed.gguf").tensors.values()} == set(DEQUANTIZERS)


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    make, read = PARSERS[name]
    path, rng = tmp_path / "file", random.Random(1)
    make(path)
    assert find_fault(read, path) is None
    content, refused = path.read_bytes(), 0
    for _ in range(300):
        path.write_bytes(damage(content, 2048, rng))
        assert find_fault(read, path) is None
        try:
            read(path)
        except InputError:
            refused += 1
    assert refused > 100


def test_findings(tmp_path: Path) -> None:
    def fail(error: Exception) -> str | None:
        def read(path: Path) -> None:
            raise error

        return find_fault(read, tmp_path)

    assert fail(InputError("one line")) is None
    assert "several lines" in str(fail(InputError("two\nlines")))
    assert "KeyError: 3" in str(fail(KeyError(3)))
    assert find_fault(lambda path: bytes(80 << 20) and None, tmp_path) is not None
