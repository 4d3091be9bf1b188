"""Writes files so that a reader sees the old one or the new one, never half of one; reads JSON and takes checksums.

A run may be killed at any instant. What stands under a final name is therefore always whole: it is written to a
temporary name in the same directory, flushed to the disk, and renamed. What cannot be read back says so in one line.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hsai.errors import InputError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what the block writes there is renamed to `path` when the block ends.

    The temporary name keeps the suffix of `path` (some writers choose their format by it) and starts with a dot. When
    the block raises, the temporary file is removed and `path` is what it was. On return the bytes and the new name are
    on the disk (fsync of the file, then of its directory).

        with atomic_write(folder / "weights.safetensors") as temporary:
            save_file(tensors, temporary)

    Raises:
      InputError: the directory of `path` does not exist, or `path` is a directory.
      FileNotFoundError: the block wrote no file under the temporary name.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: the directory {target.parent} does not exist")
    if target.is_dir():
        raise InputError(f"cannot write {target}: it is a directory; give the name of a file")
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(target.parent)


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` as JSON (UTF-8, keys in their own order, two spaces a level, newline at the end) through
    `atomic_write`.

    Raises:
      InputError: as `atomic_write`.
      TypeError, ValueError: `obj` holds what JSON cannot (NaN and infinities included); nothing is written.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """What the JSON file at `path` holds.

    Raises:
      InputError: the file is missing or unreadable, is not UTF-8, or is not JSON; with the position of the fault.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
        return json.loads(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a JSON file: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        fault = f"{error.msg} at line {error.lineno} column {error.colno} (character {error.pos} of {len(text)})"
        raise InputError(f"{path} is not a JSON file: {fault}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of the file's bytes, 64 hexadecimal digits; the file is streamed, not held in memory.

    Raises:
      InputError: the file is missing or unreadable.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def flush(path: Path) -> None:
    """Waits until the file (or the directory's list of names) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
