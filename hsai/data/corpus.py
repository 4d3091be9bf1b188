"""Builds a corpus once: from a source's files to token files, or opens what an earlier call built.

Every file appears whole and meta.json appears last, so a directory without it was left by a build that died, and is
built again. What is built is a function of the config and the source's text alone: builders that race (several runs
started at once) write the same bytes.
"""

import dataclasses
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hsai.data.corpus_files import (
    FILES,
    FORMAT,
    META,
    REMEDY,
    TOKENIZER,
    VERSION,
    Corpus,
    TokenWriter,
    open_corpus,
    token_dtype,
)
from hsai.data.packing import count_windows
from hsai.data.sources import (
    PYTHON_STDLIB,
    Document,
    Skipped,
    Source,
    SourceFile,
    choose_files,
    find_source,
    read_documents,
    split_files,
)
from hsai.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from hsai.errors import InputError
from hsai.files import atomic_write, sha256, write_json_atomic

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""

_log = logging.getLogger(__name__)

# Text handed to the tokenizer at once: enough to keep all cores busy, little enough to need no thought about memory.
_CHUNK_BYTES = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is learned from, and how it is cut."""

    source: str = PYTHON_STDLIB
    """python_stdlib (the sources of this machine's Python), or a directory, file or glob of UTF-8 text."""

    vocab_size: int | None = 4096
    """Tokens in the vocabulary that is learned from the text: 256 bytes, end-of-text, and merges. None learns none: the
    tokenizer is that of the model which the run begins from."""

    max_bytes: int | None = None
    """Take at most this much text, whole files drawn at random; none takes all."""

    heldout_fraction: float = 0.05
    """Share of the text, in whole files, that is kept for evaluation and never trained on."""

    split_seed: int = 0
    """Draws which files are taken and which are held out; the order of training is drawn by the run's own seed."""

    tokenizer_bytes: int = 8_000_000
    """A vocabulary is learned from about this much of the training text."""

    sequence_length: int = 512
    """Tokens a row."""

    prefetch: int = 2
    """Batches that are read ahead."""

    def __post_init__(self) -> None:
        if not self.source:
            raise InputError("data.source is empty; give python_stdlib, or a directory, file or glob of text")
        if self.vocab_size is not None and self.vocab_size < SMALLEST_VOCABULARY:
            raise InputError(
                f"data.vocab_size={self.vocab_size} must be at least {SMALLEST_VOCABULARY} (256 bytes and end-of-text)"
            )
        if not 0 < self.heldout_fraction < 1:
            raise InputError(f"data.heldout_fraction={self.heldout_fraction} must lie between 0 and 1, both excluded")
        for name in ("max_bytes", "tokenizer_bytes", "sequence_length", "prefetch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"data.{name}={value} must be at least 1")


# The fields that decide what is in the files; the others decide how they are read.
_CONTENT_FIELDS = ("source", "vocab_size", "max_bytes", "heldout_fraction", "split_seed", "tokenizer_bytes")


def content_fields(config: DataConfig) -> dict[str, Any]:
    """The fields that decide what a corpus holds, by name: configs that agree on them can share one."""
    return {name: getattr(config, name) for name in _CONTENT_FIELDS}


def build_corpus(
    config: DataConfig,
    directory: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Makes the corpus of `config` in `directory`, or opens the one that is there (`Corpus.reused` tells).

    Of several processes with one file system, let one build and the others wait: racing is harmless but wasteful.

    Args:
      config: what to build. An existing corpus must have been built with the same values.
      directory: of the corpus alone; made if need be.
      progress: is told how far each step is.
      tokenizer: cuts the text, where the config learns no vocabulary from it.

    Raises:
      InputError: the source or the directory cannot be used, there is too little text, the corpus that is there was
        built with another config or tokenizer, or from other text, or its files are damaged. The directory is then left
        as it was, or without a corpus if a build had begun.
    """
    if (tokenizer is None) == (config.vocab_size is None):
        raise ValueError(f"data.vocab_size={config.vocab_size} needs {'a' if tokenizer is None else 'no'} tokenizer")
    directory = Path(directory)
    if (directory / META).exists():
        corpus = open_corpus(directory)
        _check_same(corpus, config, tokenizer)
        _check_length(len(corpus.train), config)
        _log.info("reusing the corpus in %s", directory)
        return corpus
    _check_vacant(directory)
    report = progress or (lambda step, done, total: None)
    source = find_source(config.source)
    chosen = choose_files(source.files, config.max_bytes, config.split_seed)
    train, heldout = split_files(chosen, config.heldout_fraction, config.split_seed)
    if config.vocab_size is not None:
        tokenizer = Tokenizer.train(_read_sample(train, config.tokenizer_bytes, report), config.vocab_size)
    assert tokenizer is not None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_corpus(config, source, {"train": train, "heldout": heldout}, tokenizer, directory, report)
    except InputError:
        for name in FILES:
            (directory / name).unlink(missing_ok=True)
        raise
    except OSError as error:
        raise InputError(f"cannot write the corpus to {directory}: {error.strerror}; give another directory") from error
    return dataclasses.replace(open_corpus(directory), reused=False)


def _write_corpus(
    config: DataConfig,
    source: Source,
    splits: dict[str, Sequence[SourceFile]],
    tokenizer: Tokenizer,
    directory: Path,
    report: Progress,
) -> None:
    """Tokenizes both splits into `directory`; meta.json comes last."""
    tokenizer.save(directory / TOKENIZER)
    skipped = Skipped()
    # Shared by both splits: a held-out copy of a training file would make the held-out loss look too good.
    seen: set[bytes] = set()
    counts: dict[str, dict[str, int]] = {}
    done, total = 0, sum(file.size for members in splits.values() for file in members)
    for split, members in splits.items():
        count = {"files": len(members), "documents": 0, "bytes": 0, "tokens": 0}
        with atomic_write(directory / f"{split}.tokens") as temporary:
            with TokenWriter(temporary, token_dtype(tokenizer.vocab_size)) as writer:
                for chunk in _chunks(read_documents(members, skipped, seen)):
                    for ids in tokenizer.encode_batch([document.text for document in chunk]):
                        writer.append(itertools.chain((tokenizer.eot,), ids))
                    size = sum(document.size for document in chunk)
                    count["documents"] += len(chunk)
                    count["bytes"] += size
                    done += size
                    report("tokenizing text", done, total)
            count["tokens"] = writer.count
            if not count["documents"]:
                raise InputError(f"data.source {config.source!r}: no {split} file holds UTF-8 text of its own")
        counts[split] = count
    # What was skipped was no text, but it was dealt with.
    report("tokenizing text", total, total)
    _check_length(counts["train"]["tokens"], config)
    for name in skipped.undecodable:
        _log.warning("left out of the corpus, not UTF-8: %s", name)
    checksums = {name: sha256(directory / name) for name in FILES}
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "config": content_fields(config),
        "tokenizer": tokenizer.roles,
        "source": {"description": source.description, "fingerprint": source.fingerprint},
        # One name for all of it: two corpora with the same value hold the same tokens, whatever they came from.
        "content_sha256": hashlib.sha256("".join(checksums.values()).encode()).hexdigest(),
        "counts": counts,
        "skipped": dataclasses.asdict(skipped),
        "files": {
            name: {"bytes": (directory / name).stat().st_size, "sha256": checksum}
            for name, checksum in checksums.items()
        },
    }
    write_json_atomic(directory / META, meta)


def _read_sample(files: Sequence[SourceFile], max_bytes: int, report: Progress) -> Iterator[str]:
    """Texts from the beginning of `files` (a random order, so a fair sample) until `max_bytes` are passed."""
    total = min(max_bytes, sum(file.size for file in files))
    done = 0
    skipped = Skipped()
    for document in read_documents(files, skipped, set()):
        yield document.text
        done += document.size
        report("learning the vocabulary", min(done, total), total)
        if done >= max_bytes:
            return
    if done == 0:
        raise InputError(f"no file of data.source is UTF-8 text, {skipped.undecodable[0]} among them")
    report("learning the vocabulary", total, total)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups documents into lists of about `_CHUNK_BYTES`."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.size
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _check_vacant(directory: Path) -> None:
    """Refuses a directory that is used for something else: a corpus would overwrite a model's tokenizer.json."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; give a directory for the corpus")
    if directory.is_dir():
        strangers = sorted(p.name for p in directory.iterdir() if p.name not in FILES and not p.name.startswith("."))
        if strangers:
            raise InputError(f"{directory} holds {strangers[0]!r} and no corpus; give a new or an empty directory")


def _check_same(corpus: Corpus, config: DataConfig, tokenizer: Tokenizer | None) -> None:
    """Refuses a corpus that was built with other settings or another tokenizer, or from text that has changed since."""
    built = corpus.meta["config"]
    for name in _CONTENT_FIELDS:
        old, new = built.get(name), getattr(config, name)
        if old != new:
            raise InputError(f"{corpus.directory} was built with data.{name}={old!r}, not {new!r}; {REMEDY}")
    if tokenizer is not None and not tokenizer.equals(corpus.tokenizer):
        raise InputError(f"{corpus.directory} was built with the tokenizer of another model; {REMEDY}")
    # A corpus outlives the Python it was taken from, and is also read on machines where the text is not; but text of
    # the user's own that is there and different is a mistake.
    if config.source == PYTHON_STDLIB:
        return
    try:
        source = find_source(config.source)
    except InputError:
        return
    if source.fingerprint != corpus.meta["source"]["fingerprint"]:
        raise InputError(f"files in {config.source} changed since {corpus.directory} was built from them; {REMEDY}")


def _check_length(train_tokens: int, config: DataConfig) -> None:
    """Refuses rows that are longer than the training text."""
    if count_windows(train_tokens, config.sequence_length) == 0:
        raise InputError(
            f"data.sequence_length={config.sequence_length} does not fit: the text gives {train_tokens} training "
            f"tokens; at most {train_tokens - 1} is valid, or give more text"
        )
