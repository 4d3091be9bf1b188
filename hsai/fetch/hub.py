"""Models of the Hugging Face hub, through its own client, for whoever is online.

The client resumes what was cut off and renames what is whole. What it does not do is look at a file again that it once
brought; but the hub names each file after its content (SHA-256 for large files, git's SHA-1 for small ones), so that is
done here.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from hsai.errors import InputError
from hsai.fetch.cache import Progress

PREFIX = "hf:"
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "LICENSE*", "README.md")
"""Weights, configs, tokenizers and chat templates; no pickles, no other framework's weights."""


def fetch_hub(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The snapshot of a repository, with the files that `PATTERNS` names.

    Args:
      name: hf:ORG/NAME, of the main branch, or hf:ORG/NAME@REVISION.
      cache: the snapshot goes below it, in huggingface/; by default into the hub's own cache, which other tools share.
      progress: called while files are verified; the client shows its own downloads.
    Raises:
      InputError: it is no such name; huggingface_hub is not installed; the repository cannot be had.
    """
    found = re.fullmatch(r"hf:(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", name)
    if found is None:
        raise InputError(f"{name!r} names no repository; say hf:ORG/NAME, or hf:ORG/NAME@REVISION")
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(f"{name} needs huggingface_hub: pip install 'hsai[hub]'") from error
    settings: dict[str, Any] = {"revision": found[2], "allow_patterns": list(PATTERNS)}
    if cache is not None:
        settings["cache_dir"] = cache / "huggingface"
    snapshot = _download(huggingface_hub, name, found[1], settings)
    altered = _find_altered(snapshot, progress or (lambda step, done, total: None))
    if altered:
        for path in altered:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        snapshot = _download(huggingface_hub, name, found[1], settings)
        if again := _find_altered(snapshot, lambda step, done, total: None):
            raise InputError(f"{again[0]} of {name} is not what the hub says, twice; it is not used")
    return snapshot


def _download(client: Any, name: str, repository: str, settings: dict[str, Any]) -> Path:
    try:
        return Path(client.snapshot_download(repository, **settings))
    except Exception as error:  # of many libraries: the client's own, its HTTP library's, the system's
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # the disk, not the hub
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} cannot be fetched from the Hugging Face hub: {reason}") from error


def _find_altered(snapshot: Path, report: Progress) -> list[Path]:
    """Files of the snapshot whose content is not what the name of their blob says."""
    files = sorted(path for path in snapshot.rglob("*") if path.is_file())
    total, done, altered = sum(path.stat().st_size for path in files), 0, []
    for path in files:
        wanted, size = Path(os.path.realpath(path)).name, path.stat().st_size
        digest = hashlib.sha256() if len(wanted) == 64 else hashlib.sha1(b"blob %d\0" % size)
        if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", wanted):  # a file system without links has no such names
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != wanted:
                altered.append(path)
        done += size
        report("verifying the snapshot", done, total)
    return altered
