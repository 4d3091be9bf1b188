"""Writes files so that a reader sees the old one or the new one, never half of one; reads JSON and takes checksums.

A run may be killed at any instant. What stands under a final name is therefore always whole: it is written to a
temporary name in the same directory, flushed to the disk, and renamed. What cannot be read back says so in one line.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

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


def lock_directory(directory: Path, name: str, *, option: str) -> TextIO:
    """Makes the directory if need be, and locks it until the file is closed or the process ends, however it does.

    Args:
      directory: for one process at a time.
      name: of the file in it that is locked; it is made, and stays.
      option: of the command, by which another directory is given.
    Returns: that file.
    Raises:
      InputError: it cannot be written to, or another process holds it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / name, "a")
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror}; give another {option}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise InputError(f"{directory} is in use by another run; wait for it, or give another {option}") from error
    return lock


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, holding: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new directory beside `path`; it is renamed to `path` when the block ends, and removed when it raises.

    Its parents are made. A directory that stands at `path` steps aside, and back if the renaming fails: until the new
    one is whole, the old one stays.

    Args:
      path: of the directory.
      holding: a file by which a directory is known to be of the kind that may be replaced.
      overwrite: whether it may.
    Raises:
      InputError: `path` is a file; it exists, and may not be overwritten; it is of another kind.
    """
    target = Path(os.path.abspath(path))
    check_replaceable(target, holding=holding, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    building.mkdir()
    try:
        yield building
        _publish(building, target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def check_replaceable(target: Path, *, holding: str, overwrite: bool) -> None:
    """Refuses what `atomic_directory` would, for those who have much to compute before it."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file; give the name of a directory")
    if not overwrite:
        raise InputError(f"{target} exists; choose another name, or say --overwrite (overwrite=True)")
    if any(target.iterdir()) and not (target / holding).is_file():
        raise InputError(f"{target} is not overwritten: it has no {holding}; choose another name")


def _publish(building: Path, target: Path) -> None:
    aside = building.with_name(f"{building.name}.old")
    exists = target.exists()
    if exists:
        os.rename(target, aside)
    try:
        os.rename(building, target)
    except BaseException:
        if exists:
            os.rename(aside, target)
        raise
    flush(target.parent)
    if exists:
        # The new one stands; what cannot be removed of the old one is no reason to say that it does not.
        shutil.rmtree(aside, ignore_errors=True)


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
