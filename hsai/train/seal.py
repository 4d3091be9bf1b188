"""The seal of a checkpoint: a SHA-256 a file, so that a damaged one is refused before anything is read from it.

TensorStore checks its indices but not the weights behind them: a bit that flipped on the disk would go into training
unseen. And an index that it cannot read makes it print pages. Both end here, in one line.
"""

from pathlib import Path

from hsai.errors import InputError
from hsai.files import read_json, sha256, write_json_atomic

SEAL = "sha256.json"
VERSION = 1
# Written (or, as _CHECKPOINT_METADATA, written again with the time of the commit) by Orbax after the seal; they hold no
# data.
_UNSEALED = frozenset({SEAL, "commit_success.txt", "_CHECKPOINT_METADATA"})


def write_seal(directory: Path) -> None:
    """Takes the checksum of every file below `directory` and writes them to its `sha256.json`."""
    files = {name: sha256(directory / name) for name in _list_files(directory)}
    write_json_atomic(directory / SEAL, {"version": VERSION, "files": files})


def check_seal(directory: Path, *, part: int = 0, parts: int = 1) -> None:
    """Compares the files of a checkpoint with its seal: all names, and the contents of one of `parts` shares.

    Raises:
      InputError: the seal is missing or of another version; a file is missing, altered, or not under the seal.
    """
    seal = read_json(directory / SEAL)
    if not isinstance(seal, dict) or seal.get("version") != VERSION or not isinstance(seal.get("files"), dict):
        raise InputError(f"{directory / SEAL} is not the seal of a checkpoint of version {VERSION}")
    sealed: dict[str, str] = seal["files"]
    for name in sorted(set(sealed) ^ set(_list_files(directory))):
        raise InputError(f"{directory / name} is {'missing' if name in sealed else 'not part of the checkpoint'}")
    for name in sorted(sealed)[part::parts]:
        if sha256(directory / name) != sealed[name]:
            raise InputError(f"{directory / name} was altered: its SHA-256 is not the one that was written")


def _list_files(directory: Path) -> list[str]:
    """Names of all files that a seal covers, relative to `directory`, sorted."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if Path(name).name not in _UNSEALED)
