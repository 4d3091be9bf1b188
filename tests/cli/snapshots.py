"""What is on the disk, to be compared before and after."""

import hashlib
from pathlib import Path


def snapshot(directory: Path) -> dict[str, tuple[int, int, str]]:
    """Size, time of modification (ns) and SHA-256 of everything below `directory`, by its name."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[path.relative_to(directory).as_posix()] = (status.st_size, status.st_mtime_ns, digest)
    return found
