"""The cache: one directory an entry, which is whole or not there, and one process at a time that fills it.

CACHE/NAME/             what was fetched; appears by a rename
CACHE/.NAME.partial/    what is on its way; of a process that was killed, the next one takes what is still good
CACHE/.NAME.lock        held (flock) by the process that looks at NAME or fills it; the system frees it at its death
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hsai.errors import InputError
from hsai.files import flush

Progress = Callable[[str, int, int], None]
"""Called with (what is done, how much of it, of how much)."""


def default_cache() -> Path:
    """$XDG_CACHE_HOME/hsai, by default ~/.cache/hsai (XDG Base Directory Specification: a relative path is ignored)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hsai"


def partial_directory(directory: Path) -> Path:
    """Where the entry `directory` is put together."""
    return directory.with_name(f".{directory.name}.partial")


@contextlib.contextmanager
def hold(directory: Path, report: Progress) -> Iterator[None]:
    """Makes the cache if it is not there, and waits until no other process holds the entry `directory`.

    Raises:
      InputError: the cache cannot be made.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"the cache {directory.parent} is a file; give the name of a directory") from error
    except NotADirectoryError as error:
        raise InputError(f"the cache {directory.parent} lies below a file; give another directory") from error
    with open(directory.with_name(f".{directory.name}.lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that fetches {directory.name}", 0, 1)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def publish(built: Path, directory: Path) -> None:
    """Renames the whole entry `built` to `directory`; what stood there was found faulty and goes."""
    if directory.is_dir() and not directory.is_symlink():
        shutil.rmtree(directory)
    else:
        directory.unlink(missing_ok=True)
    os.rename(built, directory)
    flush(directory.parent)
