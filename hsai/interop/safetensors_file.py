"""safetensors files, read with suspicion and a tensor at a time, and written the same way.

The `safetensors` package writes what is all in memory, and copies what it reads. Here a tensor is read when it is asked
for, or not at all: mapped into memory, where the system brings what is used; and written when it is made. The format is
eight bytes that say how long the header is, the header (JSON: dtype, shape and place of every tensor), and the numbers.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hsai.errors import InputError
from hsai.files import atomic_write

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INTEGERS = {np.dtype(f"{sign}int{bits}"): f"{sign or 'i'}{bits}".upper() for sign in ("", "u") for bits in (8, 16, 32)}
"""What packed weights are made of: written here, and never read from the files of others."""
ALIGNMENT = 64
"""Numbers begin at a multiple of this many bytes: XLA uses such memory where it lies."""
LONGEST_HEADER = 100_000_000
"""As the `safetensors` package has it; longer ones are refused before they are read."""
METADATA = "__metadata__"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One tensor of a file."""

    path: Path
    """The file."""

    name: str
    """What it is called there."""

    dtype: np.dtype
    """Of its numbers."""

    shape: tuple[int, ...]
    """Its dimensions."""

    begin: int
    """The first of its bytes, from the beginning of the file."""

    end: int
    """The byte behind its last."""

    def read(self) -> np.ndarray:
        """The tensor; `InputError` if the file has become shorter since its header was read."""
        count = (self.end - self.begin) // self.dtype.itemsize
        with open(self.path, "rb") as file:
            file.seek(self.begin)
            flat = np.fromfile(file, self.dtype, count)
        if flat.size != count:
            raise InputError(f"{self.path} is truncated: tensor {self.name!r} ends at byte {self.end}")
        return flat.reshape(self.shape)


def read_records(path: Path, *, integers: bool = False) -> dict[str, TensorRecord]:
    """What a file holds, in the order of its bytes; no tensor is read.

    Args:
      path: of the file.
      integers: whether a tensor's dtype may also be one of INTEGERS, beside those of DTYPES.
    Raises:
      InputError: the file is cut off, its header is no header, or says what the file's size does not bear out; a
        tensor's dtype is another.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise InputError(f"{path} is no whole safetensors file: a header of {length} bytes in {size}")
            text = file.read(length)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_refuse_twins)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is {type(header).__name__}, and not an object")
    header.pop(METADATA, None)
    dtypes = DTYPES | ({name: dtype for dtype, name in INTEGERS.items()} if integers else {})
    records = [_read_record(path, name, value, 8 + length, dtypes) for name, value in header.items()]
    records.sort(key=lambda record: (record.begin, record.end))
    place = 8 + length
    for record in records:
        if record.begin != place:
            fault = "overlaps the one before it" if record.begin < place else "leaves a gap before it"
            raise InputError(f"{path}: tensor {record.name!r} {fault}, at byte {record.begin}")
        place = record.end
    if place != size:
        fault = "truncated" if place > size else "longer than its header says"
        raise InputError(f"{path} is {fault}: it has {size} bytes, and its tensors end at {place}")
    return {record.name: record for record in records}


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one of our own files, as read-only views of its pages in memory: none is read before it is used.

    The file must not be changed in place as long as they are in use; one that takes its name does no harm.

    Raises:
      InputError: as `read_records`.
    """
    records = read_records(path, integers=True)
    content = np.memmap(path, np.uint8, "r")
    return {
        name: np.asarray(content[record.begin : record.end]).view(record.dtype).reshape(record.shape)
        for name, record in records.items()
    }


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], pieces: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes tensors as they come, whole or not at all.

    Args:
      path: of the file.
      shapes: shape and dtype of every tensor, in the order in which they come.
      pieces: names and arrays; a tensor comes whole, or in slices of its leading axes, one after the other. Each is
        cast to the tensor's dtype.
    Raises:
      ValueError: the tensors are not those that were announced.
    """
    header: dict[str, Any] = {METADATA: {"format": "pt"}}  # without which `transformers` would not load the file
    place = 0
    for name, (shape, dtype) in shapes.items():
        end = place + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": (NAMES | INTEGERS)[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    left = {name: math.prod(shape) for name, (shape, _) in shapes.items()}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, piece in pieces:
            shape, dtype = shapes.get(name, ((), np.dtype(np.float32)))
            is_next = name == next(iter(left), None) and piece.size <= left[name]
            if not is_next or tuple(piece.shape) != shape[len(shape) - piece.ndim :]:
                raise ValueError(f"tensor {name!r} {list(piece.shape)} was not announced at this place")
            # As bytes: `tofile` would not say why it failed, as on a full disk.
            file.write(np.ascontiguousarray(piece, dtype).reshape(-1).view(np.uint8).data)
            left[name] -= piece.size
            if left[name] == 0:
                del left[name]
        if left:
            raise ValueError(f"tensor {next(iter(left))!r} was announced and did not come whole")


def _read_record(path: Path, name: str, value: Any, start: int, dtypes: Mapping[str, np.dtype]) -> TensorRecord:
    what = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{what} is described by {str(value)[:80]}, and not by dtype, shape and data_offsets")
    shape, offsets = value["shape"], value["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 1 << 60 for n in numbers):
            raise InputError(f"{what} has the shape or place {str(numbers)[:80]}")
    if value["dtype"] not in dtypes:
        raise InputError(f"{what} is {value['dtype']!r}; what can be read is {', '.join(dtypes)}")
    dtype = dtypes[value["dtype"]]
    size = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise InputError(f"{what} needs {size} bytes for {value['dtype']} {shape}, and its place is {offsets}")
    begin, end = (start + offset for offset in offsets)
    return TensorRecord(path=path, name=name, dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found
