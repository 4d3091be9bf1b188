"""llama.cpp as an engine: prompts, and tokens of many sequences at a time, through its C interface.

As its own llama-batched-bench does: no text, no sampling and no server, so that what is measured is the model.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from bench.processes import Apart
from bench.timing import Runner
from hsai.machine import count_cores

Work = Literal["read", "write"]

WAITING = {"OMP_WAIT_POLICY": "active"}
"""Its threads wait for one another, many times a token: fastest by spinning, as nobody else wants their cores."""

TOKENS = 500
"""Ids that are read are below: every vocabulary has them."""


def make_llama(kind: str, path: Path, streams: int = 1, *, work: Work, read: int, written: int) -> Runner:
    """Reads `read` tokens; or writes `written` of each stream behind so many, all of which are given.

    Args:
      kind: of its file, for the runner's name.
      path: of the file; it is read when the runner first runs, in a process of its own.
      streams: sequences at a time.
      work, read, written: see above.
    """
    build = functools.partial(_build, path, streams, work, read, written)
    return Runner(name=f"llama.cpp {kind}", build=lambda: Apart(build, WAITING), times=1 if work == "read" else written)


def _build(path: Path, streams: int, work: Work, read: int, written: int) -> Callable[[], object]:
    slots = read if work == "read" else read + written
    llama = LlamaContext(path, slots=streams * slots, sequences=streams)
    tokens = np.random.default_rng(0).integers(0, TOKENS, max(read, streams)).tolist()
    if work == "read":
        return lambda: llama.read(tokens[:read])
    for sequence in range(streams):
        llama.read(tokens[:read], sequence=sequence)

    def write() -> None:
        llama.forget(read)
        for position in range(read, read + written):
            llama.write(tokens[:streams], position)

    return write


class LlamaContext:
    """A GGUF file, loaded, with a cache for several sequences; on all cores of this process."""

    def __init__(self, path: Path, *, slots: int, sequences: int = 1, chunk: int = 512) -> None:
        """Loads the file.

        Args:
          path: of the file.
          slots: tokens that the cache holds, of all sequences together.
          sequences: how many there are.
          chunk: tokens that go through the model at a time.
        """
        import llama_cpp

        self._library: Any = llama_cpp
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = slots, chunk, chunk, sequences
        params.n_threads = params.n_threads_batch = count_cores()
        params.kv_unified = False  # each sequence looks at its own cache, as llama-batched-bench has it
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self._chunk = chunk
        self._batch = llama_cpp.llama_batch_init(chunk, 0, 1)

    def read(self, tokens: Sequence[int], *, sequence: int = 0, start: int = 0) -> None:
        """Reads a prompt into a sequence, and makes the logits of its last token.

        Args:
          tokens: of the prompt.
          sequence: whose it is.
          start: where it begins; what stands there and behind is forgotten.
        """
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_seq_rm(memory, sequence, start, -1)
        for begin in range(0, len(tokens), self._chunk):
            part = tokens[begin : begin + self._chunk]
            last = begin + len(part) == len(tokens)
            self._decode(
                [(token, start + begin + i, sequence, last and i + 1 == len(part)) for i, token in enumerate(part)]
            )

    def write(self, tokens: Sequence[int], position: int) -> None:
        """Reads a token of each sequence, of all at once, at one position, and makes the logits of each."""
        self._decode([(token, position, sequence, True) for sequence, token in enumerate(tokens)])

    def forget(self, position: int) -> None:
        """All sequences end before `position`."""
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_seq_rm(memory, -1, position, -1)

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wanted
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama.cpp could not read {len(entries)} tokens: status {status}")
        self.logits()  # waits for them

    def logits(self) -> Any:
        """A pointer to the float32 logits of the tokens that were read last, as many as asked for them."""
        return self._library.llama_get_logits(self._context)

    def close(self) -> None:
        """Gives the memory back."""
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
