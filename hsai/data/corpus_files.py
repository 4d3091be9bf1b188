"""A corpus on disk: its files, how they are written, and how they are checked and opened.

A corpus directory holds tokenizer.json, train.tokens, heldout.tokens (.npy arrays of one dimension, little-endian
uint16, or uint32 for vocabularies beyond 65,536) and meta.json, which is written last and carries a SHA-256 a file.
Each document is the end-of-text token followed by its tokens.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.files import read_json, sha256

FORMAT = "hsai-corpus"
VERSION = 1
META = "meta.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "heldout")
FILES = (TOKENIZER, *(f"{split}.tokens" for split in SPLITS))
REMEDY = "give another directory, or remove this one to have it built again"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """An open corpus; the tokens are memory-mapped, not read."""

    directory: Path
    """Where its files are."""

    tokenizer: Tokenizer
    """What the tokens were made with."""

    train: np.ndarray
    """uint16 or uint32 (tokens,): the training documents."""

    heldout: np.ndarray
    """uint16 or uint32 (tokens,): the held-out documents."""

    meta: Mapping[str, Any]
    """What meta.json says: config, source, content_sha256, counts, skipped, files."""

    reused: bool
    """True when the files were there already and nothing was built."""


def open_corpus(directory: str | os.PathLike[str], *, verify: bool = False) -> Corpus:
    """Opens a corpus that was built before.

    Args:
      directory: of the corpus.
      verify: read all files and compare checksums as well; sizes are always compared.

    Raises:
      InputError: there is no corpus, it is of another version, or a file is missing, cut or altered.
    """
    directory = Path(directory)
    if not (directory / META).exists():
        raise InputError(f"{directory} holds no corpus ({META} is missing); build one, or give the directory of one")
    meta = _read_meta(directory / META)
    for name in FILES:
        _check_file(directory / name, meta["files"][name], verify)
    tokenizer = Tokenizer.reload(directory / TOKENIZER, meta.get("tokenizer", {}))
    dtype = token_dtype(tokenizer.vocab_size)
    train, heldout = (_map_tokens(directory / f"{split}.tokens", dtype) for split in SPLITS)
    return Corpus(directory=directory, tokenizer=tokenizer, train=train, heldout=heldout, meta=meta, reused=True)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned little-endian type of two bytes or more that holds ids below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class TokenWriter:
    """Writes a one-dimensional .npy array whose length is known only at the end; use as a context manager."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.count = 0
        self._path = path
        self._dtype = dtype
        self._file: BinaryIO

    def __enter__(self) -> "TokenWriter":
        self._file = open(self._path, "wb")
        self._write_header()
        self._start = self._file.tell()
        return self

    def append(self, ids: Iterable[int]) -> None:
        """Adds token ids at the end."""
        tokens = np.fromiter(ids, self._dtype)
        tokens.tofile(self._file)
        self.count += len(tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._file.seek(0)
                self._write_header()
                # NumPy pads the header so that the first dimension can grow in place; if it ever did not, the
                # header would run into the tokens.
                if self._file.tell() != self._start:
                    raise RuntimeError(f"the .npy header of {self._path} changed its length")

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _read_meta(path: Path) -> dict[str, Any]:
    """meta.json, with the entries that reading depends on."""
    meta = read_json(path)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"{path} does not describe a corpus (its format is not {FORMAT!r}); give another directory")
    if meta.get("version") != VERSION:
        raise InputError(f"{path} is of corpus version {meta.get('version')!r}; this hsai reads {VERSION}; {REMEDY}")
    files = meta.get("files")
    whole = isinstance(files, dict) and all(
        isinstance(files.get(name), dict) and {"bytes", "sha256"} <= files[name].keys() for name in FILES
    )
    if not whole or not all(isinstance(meta.get(name), dict) for name in ("config", "source", "counts")):
        raise InputError(f"{path} was altered: entries are missing; {REMEDY}")
    return meta


def _check_file(path: Path, entry: Mapping[str, Any], verify: bool) -> None:
    """Compares a file with its entry in meta.json."""
    if not path.is_file():
        raise InputError(f"{path} is missing; {REMEDY}")
    if path.stat().st_size != entry["bytes"]:
        raise InputError(f"{path} has {path.stat().st_size} bytes and should have {entry['bytes']}; {REMEDY}")
    if verify and sha256(path) != entry["sha256"]:
        raise InputError(f"{path} was altered: its SHA-256 is not the {entry['sha256']} in {META}; {REMEDY}")


def _map_tokens(path: Path, dtype: np.dtype) -> np.ndarray:
    """The tokens of `path`, on disk."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path} was altered: it is not a .npy file; {REMEDY}") from error
    if tokens.dtype != dtype or tokens.ndim != 1:
        raise InputError(f"{path} was altered: it holds {tokens.dtype}{tokens.shape}, not {dtype}(tokens,); {REMEDY}")
    return tokens
