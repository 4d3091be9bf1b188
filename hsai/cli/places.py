"""Where a command writes: refused beforehand if it cannot, and left as it was if the command fails.

Files and bundles appear whole or not at all by themselves; the directories above them are what is seen to here.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from hsai.errors import InputError


def check_place(path: Path, option: str) -> None:
    """Refuses a directory that could not be made, or written to, in the end.

    Args:
      path: it need not exist.
      option: by which it was given, such as "--out".
    Raises:
      InputError: it is a file, or lies below one, or this user may not write there.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{option} {path} is a file; give the name of a directory")
    above = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not above.is_dir():
        raise InputError(f"{option} {path} cannot be made: {above} is a file; give another directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: {above} may not be written to; give another directory")


@contextlib.contextmanager
def no_empty_directories(paths: Iterable[Path]) -> Iterator[None]:
    """When the block raises, removes those directories at or above `paths` that it made and left empty."""
    missing = {place for path in paths for place in (path.absolute(), *path.absolute().parents) if not place.exists()}
    try:
        yield
    except BaseException:
        for place in sorted(missing, key=lambda place: len(place.parts), reverse=True):
            # Of several processes with one file system, another may be faster.
            with contextlib.suppress(FileNotFoundError):
                if not any(place.iterdir()):
                    place.rmdir()
        raise
