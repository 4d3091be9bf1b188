"""Where text comes from: the files of a source, which of them are taken, and which are held out.

Whether a file is taken, whether it is held out and where it stands in the stream is drawn by a hash of its name, so
that all machines agree, and a part of the files (a byte cap, the first tokens of an evaluation) is a fair sample of
the whole instead of its alphabetical beginning.
"""

import dataclasses
import glob
import hashlib
import itertools
import os
import platform
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from hsai.errors import InputError

PYTHON_STDLIB = "python_stdlib"

_WILDCARDS = frozenset("*?[")
# Packages that were installed beside the standard library, and compiled files, are no part of it.
_FOREIGN = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that is known by name and size, and not read yet."""

    name: str
    """Path relative to the root of the source, with forward slashes: the same on every machine."""

    path: Path
    """Where it lies on this machine."""

    size: int
    """Bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a source, sorted by name."""

    description: str
    """For people: what this is and where it was found."""

    files: tuple[SourceFile, ...]
    """At least one."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all names and sizes: changes when a file is added, removed, renamed or resized."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One file's text."""

    name: str
    """The name of its `SourceFile`."""

    text: str
    """Not empty."""

    size: int
    """UTF-8 bytes of the text."""


@dataclasses.dataclass(kw_only=True)
class Skipped:
    """Names of the files that `read_documents` left out, by reason."""

    undecodable: list[str] = dataclasses.field(default_factory=list)
    """Not UTF-8."""

    empty: list[str] = dataclasses.field(default_factory=list)
    """Without a single character."""

    duplicate: list[str] = dataclasses.field(default_factory=list)
    """The same bytes as a file that was read before; a copy could otherwise sit on both sides of the split."""


def find_source(source: str) -> Source:
    """The source that a config names: `"python_stdlib"`, or else a directory, file or glob of text."""
    return list_python_stdlib() if source == PYTHON_STDLIB else list_text_files(source)


def list_python_stdlib() -> Source:
    """Every .py file of the standard library of the Python that runs this, without installed packages.

    Raises:
      InputError: this Python keeps no sources on disk (some embedded builds).
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(file for file in _walk(root, _FOREIGN) if file.name.endswith(".py"))
    if not files:
        raise InputError(f"the standard library at {root} holds no .py files; give a directory of text as data.source")
    return Source(description=f"Python {platform.python_version()} standard library at {root}", files=files)


def list_text_files(pattern: str) -> Source:
    """The files below a directory, or those that match a glob (`**` goes into directories), or a single file.

    Hidden files and directories are left out of a directory. Names are relative to the directory, or to the part of the
    glob before its first wildcard.

    Raises:
      InputError: nothing is there.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        root, found = path, _walk(path)
    elif path.is_file():
        root, found = path.parent, [_source_file(path, path.parent)]
    elif any(set(part) & _WILDCARDS for part in path.parts):
        root = Path(*itertools.takewhile(lambda part: not set(part) & _WILDCARDS, path.parts))
        matches = {Path(match) for match in glob.glob(str(path), recursive=True)}
        found = sorted((_source_file(p, root) for p in matches if p.is_file()), key=lambda file: file.name)
    else:
        raise InputError(f"data.source {pattern!r} does not exist; give {PYTHON_STDLIB}, a directory, a file or a glob")
    files = tuple(found)
    if not files:
        raise InputError(f"data.source {pattern!r} holds no files; give a directory, a file or a glob that does")
    return Source(description=f"text at {root.absolute()}", files=files)


def choose_files(files: Iterable[SourceFile], max_bytes: int | None, seed: int) -> tuple[SourceFile, ...]:
    """Puts files into a random order that is fixed by `seed`, and takes about `max_bytes` of them, never more.

    Raises:
      InputError: all files are empty, or not even the smallest fits.
    """
    files = tuple(file for file in files if file.size > 0)
    if not files:
        raise InputError("data.source holds only empty files; give at least 2 files of text")
    ordered = _shuffle("order", files, seed)
    if max_bytes is None:
        return tuple(ordered)
    chosen = _fill(ordered, max_bytes)
    if not chosen:
        smallest = min(file.size for file in ordered)
        raise InputError(f"data.max_bytes={max_bytes} is below the smallest file, of {smallest} bytes")
    return tuple(chosen)


def split_files(
    files: Sequence[SourceFile], heldout_fraction: float, seed: int
) -> tuple[tuple[SourceFile, ...], tuple[SourceFile, ...]]:
    """Divides files into (train, held out); each keeps the given order.

    Files are held out in a random order that is fixed by `seed`, until they make up about `heldout_fraction` of the
    bytes, never more; but where every file is too large for that, the smallest one is.

    Raises:
      InputError: there are fewer than two files.
    """
    if len(files) < 2:
        raise InputError(f"data.source: the split is by file and {len(files)} was taken; give at least 2 files of text")
    budget = int(heldout_fraction * sum(file.size for file in files))
    held = _fill(_shuffle("split", files, seed), budget) or [min(files, key=lambda file: (file.size, file.name))]
    names = {file.name for file in held}
    train = tuple(file for file in files if file.name not in names)
    return train, tuple(file for file in files if file.name in names)


def read_documents(files: Iterable[SourceFile], skipped: Skipped, seen: set[bytes]) -> Iterator[Document]:
    """Reads files in the given order; what cannot be used is left out and noted in `skipped`.

    Args:
      files: what to read.
      skipped: receives the names of files that are left out.
      seen: SHA-256 digests of the contents read so far; share it between calls to find copies across both splits.

    Raises:
      InputError: a file has gone or may not be read.
    """
    for file in files:
        try:
            content = file.path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {file.path}: {error.strerror}") from error
        if not content:
            skipped.empty.append(file.name)
            continue
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            skipped.duplicate.append(file.name)
            continue
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            skipped.undecodable.append(file.name)
            continue
        seen.add(digest)
        yield Document(name=file.name, text=text, size=len(content))


def _walk(root: Path, without: Collection[str] = ()) -> list[SourceFile]:
    """All files below `root` that are not hidden, sorted by name; directories named in `without` are left out.

    Symbolic links to directories are not followed: they may be loops.
    """
    files: list[SourceFile] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        files += [_source_file(path, root) for path in paths if path.is_file()]
    return sorted(files, key=lambda file: file.name)


def _source_file(path: Path, root: Path) -> SourceFile:
    return SourceFile(name=path.relative_to(root).as_posix(), path=path, size=path.stat().st_size)


def _shuffle(purpose: str, files: Iterable[SourceFile], seed: int) -> list[SourceFile]:
    """Sorts files by a hash of purpose, seed and name: the same order in every process, on every machine."""

    def draw(file: SourceFile) -> bytes:
        return hashlib.sha256(f"{purpose}\0{seed}\0{file.name}".encode("utf-8", "surrogateescape")).digest()

    return sorted(files, key=draw)


def _fill(files: Iterable[SourceFile], max_bytes: int) -> list[SourceFile]:
    """Takes files that are not empty, in order, each that fits into what is left of `max_bytes`.

    One that does not fit is passed over, or a single large file would end the sample; but at nine tenths it ends, or
    the rest would be filled with all the small files there are.
    """
    taken: list[SourceFile] = []
    total = 0
    for file in files:
        if total >= 0.9 * max_bytes:
            break
        if 0 < file.size <= max_bytes - total:
            taken.append(file)
            total += file.size
    return taken
