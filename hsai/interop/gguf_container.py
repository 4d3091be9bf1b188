"""The container of GGUF files (github.com/ggml-org/ggml/docs/gguf.md): metadata, and where each tensor lies.

The header of a file that came from elsewhere is not to be trusted. PyPI's `gguf`, which knows the format's constants
and writes our files, reads whatever a header claims: it walks counts of 2^60 in a loop, and takes a slice beyond the
end of the file for a short array. So this reader checks each size against the file before it believes it, and every
fault is one `InputError`. What it reads of good files is what `gguf.GGUFReader` reads, by a test.
"""

import dataclasses
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from hsai.errors import InputError
from hsai.interop.gguf_blocks import DEQUANTIZERS, dequantize

VERSIONS = (2, 3)
MAX_ITEMS = 1 << 24
"""Entries of an array in the header; the largest vocabularies have 2^18 tokens."""
MAX_DIMS = 4
MAX_NAME = 64
"""Bytes of a tensor's name, as in ggml."""

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "<u1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """Where a tensor lies, and in which form."""

    name: str
    """As the file calls it: "blk.0.attn_q.weight"."""

    shape: tuple[int, ...]
    """Outermost first, as numpy has it; the file lists the innermost first."""

    type: GGMLQuantizationType
    """How its numbers are stored."""

    offset: int
    """Of its first byte in the file."""

    nbytes: int
    """How many there are."""


class Metadata(dict[str, Any]):
    """int, float, bool, str, list[str], or a numpy array of one axis, by key; `used` are the keys that were taken."""

    def __init__(self, path: Path, values: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init__(values)
        self.path = path
        self.used: set[str] = set()

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, which must be of `kind` (an int where a float is asked for is one); else `default`.

        Raises:
          InputError: the key has another type, or is no finite number; or it is missing, and there is no default.
        """
        self.used.add(key)
        if key not in self:
            if default is None:
                raise InputError(f"{self.path}: its metadata lacks {key}")
            return default
        value: Any = self[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"{self.path}: {key} is {quote(value)}, and should be of type {kind.__name__}")
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A file whose header was read and checked; tensors are read when asked for."""

    path: Path

    metadata: Metadata

    tensors: dict[str, TensorRecord]
    """By name, in the file's order."""

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as float32 numbers, in its record's shape.

        Raises:
          InputError: its type is not one of those that are read, or the file has become shorter.
        """
        record = self.tensors[name]
        if record.type not in DEQUANTIZERS:
            known = ", ".join(sorted(kind.name for kind in DEQUANTIZERS))
            raise InputError(
                f"{self.path}: tensor {name!r} has the quantization {record.type.name}; those that are read are {known}"
            )
        with open(self.path, "rb") as file:
            file.seek(record.offset)
            data = np.fromfile(file, np.uint8, record.nbytes)
        if data.size != record.nbytes:
            raise InputError(f"{self.path} is truncated: tensor {name!r} has {data.size} of {record.nbytes} bytes")
        return dequantize(record.type, data).reshape(record.shape)


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Reads and checks a file's header.

    Raises:
      InputError: the file is missing or unreadable; is no GGUF file, or of a version or byte order that is not read; is
        truncated; its header claims more than the file holds, or contradicts itself; it is one part of a split model.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a .gguf file")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise InputError(f"{path} is not a GGUF file: it has {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def quote(value: Any) -> str:
    """A value from a file, for a message of one line: escaped, and not too long."""
    text = repr(value.tolist() if isinstance(value, np.ndarray) and value.size < 8 else value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:70]}... ({len(text)} characters)"


class _Header:
    """A cursor over the header: nothing is taken that is not there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def read(self) -> GgufFile:
        if self.data[:4] != b"GGUF":
            raise InputError(f"{self.path} is not a GGUF file: it begins with {quote(bytes(self.data[:4]))}")
        self.at = 4
        version = self.number("<u4", "the version")
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                raise InputError(f"{self.path} is a big-endian GGUF file; only little-endian ones are read")
            raise InputError(f"{self.path} is of GGUF version {version}; those that are read are 2 and 3")
        tensors, keys = self.number("<u8", "the number of tensors"), self.number("<u8", "the number of keys")
        self.check_count(tensors, 24, "tensors")
        self.check_count(keys, 13, "metadata keys")
        metadata = Metadata(self.path)
        for _ in range(keys):
            key = self.string("a metadata key")
            if key in metadata:
                raise InputError(f"{self.path}: the metadata key {quote(key)} stands there twice")
            metadata[key] = self.value(key)
        if metadata.get("split.count", 1) not in (0, 1):
            raise InputError(
                f"{self.path} is one of {quote(metadata['split.count'])} parts of a model; "
                "join them with llama.cpp's llama-gguf-split --merge"
            )
        found = [self.tensor() for _ in range(tensors)]
        start = self.find_data(metadata)
        records: dict[str, TensorRecord] = {}
        for record in found:
            if record.name in records:
                raise InputError(f"{self.path}: the tensor {quote(record.name)} stands there twice")
            records[record.name] = self.place(record, start)
        self.check_overlaps(records)
        return GgufFile(path=self.path, metadata=metadata, tensors=records)

    def take(self, count: int, what: str) -> int:
        """Steps over `count` bytes; returns where they begin."""
        start = self.at
        if count > len(self.data) - start:
            left = len(self.data) - start
            raise InputError(f"{self.path} is truncated: {what} needs {count} bytes at {start}, and {left} are left")
        self.at = start + count
        return start

    def check_count(self, count: int, smallest: int, what: str) -> None:
        """Refuses a count of things, of `smallest` bytes at least, that the rest of the file cannot hold."""
        if count > (len(self.data) - self.at) // smallest or count > MAX_ITEMS:
            raise InputError(
                f"{self.path}: its header claims {count} {what}, which {len(self.data)} bytes do not hold"
                if count <= MAX_ITEMS
                else f"{self.path}: its header claims {count} {what}; at most {MAX_ITEMS} are read"
            )

    def number(self, dtype: str, what: str) -> int:
        size = int(dtype[-1])
        start = self.take(size, what)
        return int.from_bytes(self.data[start : start + size], "little")

    def string(self, what: str) -> str:
        length = self.number("<u8", what)
        start = self.take(length, what)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {what} is not UTF-8 (byte {start + error.start} of the file)") from error

    def value(self, key: str) -> Any:
        kind = self.kind(key)
        if kind == GGUFValueType.STRING:
            return self.string(f"the value of {quote(key)}")
        if kind != GGUFValueType.ARRAY:
            return self.array(kind, 1, key)[0].item()
        inner = self.kind(key)
        count = self.number("<u8", f"the length of {quote(key)}")
        if inner == GGUFValueType.ARRAY:
            raise InputError(f"{self.path}: {quote(key)} is an array of arrays, which llama.cpp does not read either")
        size = 8 if inner == GGUFValueType.STRING else np.dtype(_SCALARS[inner]).itemsize
        self.check_count(count, size, f"entries of {quote(key)}")
        if inner == GGUFValueType.STRING:
            what = f"an entry of {quote(key)}"
            return [self.string(what) for _ in range(count)]
        return self.array(inner, count, key)

    def kind(self, key: str) -> GGUFValueType:
        number = self.number("<u4", f"the type of {quote(key)}")
        if number not in GGUFValueType._value2member_map_:
            raise InputError(f"{self.path}: {quote(key)} has the unknown value type {number}")
        return GGUFValueType(number)

    def array(self, kind: GGUFValueType, count: int, key: str) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(count * dtype.itemsize, f"the value of {quote(key)}")
        values = np.frombuffer(self.data[start : self.at], dtype)
        if kind == GGUFValueType.BOOL:
            if np.any(values > 1):
                raise InputError(f"{self.path}: {quote(key)} is a truth value of {values.max()}; it must be 0 or 1")
            return values.astype(np.bool_)
        return values

    def tensor(self) -> TensorRecord:
        """A tensor's record; its offset is still relative to the beginning of the data."""
        name = self.string("a tensor's name")
        shown = f"tensor {quote(name)}"
        if len(name.encode()) > MAX_NAME:
            raise InputError(f"{self.path}: {shown} has a name of {len(name.encode())} bytes; at most {MAX_NAME}")
        dims = self.number("<u4", f"the dimensions of {shown}")
        if not 1 <= dims <= MAX_DIMS:
            raise InputError(f"{self.path}: {shown} has {dims} dimensions; it must have 1 to {MAX_DIMS}")
        shape = [self.number("<u8", f"the shape of {shown}") for _ in range(dims)]
        number = self.number("<u4", f"the type of {shown}")
        if number not in GGMLQuantizationType._value2member_map_:
            raise InputError(f"{self.path}: {shown} has the unknown type {number}")
        kind = GGMLQuantizationType(number)
        offset = self.number("<u8", f"the offset of {shown}")
        if min(shape) < 1 or math.prod(shape) >= 1 << 63:
            raise InputError(f"{self.path}: {shown} has the impossible shape {shape}")
        block, size = GGML_QUANT_SIZES[kind]
        if shape[0] % block:
            raise InputError(
                f"{self.path}: {shown} has rows of {shape[0]}, no multiple of {kind.name}'s block, {block}"
            )
        nbytes = math.prod(shape) // block * size
        return TensorRecord(name=name, shape=tuple(reversed(shape)), type=kind, offset=offset, nbytes=nbytes)

    def find_data(self, metadata: dict[str, Any]) -> int:
        """Where the tensors' data begin: behind the header, aligned."""
        self.alignment = metadata.get("general.alignment", 32)
        good = type(self.alignment) is int and self.alignment > 0 and self.alignment & (self.alignment - 1) == 0
        if not good:
            raise InputError(f"{self.path}: general.alignment is {quote(self.alignment)}, and must be a power of two")
        return -(-self.at // self.alignment) * self.alignment

    def place(self, record: TensorRecord, start: int) -> TensorRecord:
        """The record with its offset in the file, checked."""
        shown = f"tensor {quote(record.name)}"
        if record.offset % self.alignment:
            raise InputError(f"{self.path}: {shown} begins at {record.offset}, not aligned to {self.alignment}")
        begin = start + record.offset
        if begin + record.nbytes > len(self.data):
            raise InputError(
                f"{self.path} is truncated: {shown} ends at byte {begin + record.nbytes}, the file at {len(self.data)}"
            )
        return dataclasses.replace(record, offset=begin)

    def check_overlaps(self, records: dict[str, TensorRecord]) -> None:
        end, before = 0, ""
        for record in sorted(records.values(), key=lambda record: record.offset):
            if record.offset < end:
                raise InputError(f"{self.path}: tensors {quote(before)} and {quote(record.name)} overlap")
            end, before = record.offset + record.nbytes, record.name
