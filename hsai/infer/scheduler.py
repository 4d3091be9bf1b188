"""Which requests are answered when: prompts are read in chunks, between blocks of tokens for all rows that have theirs.

Requests begin in the order in which they came, as soon as there is a row for them and the pages of their prompt; none
overtakes another, so that none waits for ever. In each turn of the loop (`Scheduler.turn`)

- rows whose request was cancelled are dropped, and waiting requests taken up;
- prompts are read for about as long as `PATIENCE`, a chunk of each in turn: those who wait for their next token do not
  wait for the end of somebody's long prompt, nor a short prompt for a long one before it;
- then every row that has read its prompt writes a block of tokens, of about `PATIENCE` as well, so that text streams.

When pages run short, the row that came last gives up its own and goes back to the head of the queue (preemption by
recomputation). Its tokens are kept, and most of its pages will still be found by their names. The oldest row never has
to, and one row's longest context fits by construction: so there is always progress.

Plain Python in one thread; what runs on the device is a `hsai.infer.runtime.Runtime`.
"""

import collections
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hsai.errors import InputError
from hsai.infer.choose import Extras, Kind
from hsai.infer.pages import PagePool, name_pages
from hsai.infer.programs import MOST_STEPS, Made, Vocabulary
from hsai.infer.request import FINISH_REASONS, FinishReason
from hsai.infer.row import Row
from hsai.infer.runtime import Runtime, make_extras, make_rows, make_table, plan_buckets
from hsai.infer.speculator import DraftPages, Speculator

logger = logging.getLogger(__name__)

PATIENCE = 0.1
"""Seconds that reading, and a block, may take where others wait."""

KINDS: tuple[Kind, ...] = ("greedy", "drawn", "full")
"""From what a program has the least in, to the most."""


class Unprepared(Exception):
    """A row has ended as "failed", as its programs could not be made; nobody else has lost anything."""


class Scheduler:
    """Rows on one device.

    Attributes:
      pool: of the pages.
      running: rows that have begun, oldest first.
      waiting: rows that have not, or that were set back; another thread may append to it.
      finished: how many ended, by the reason.
      counts: of prompt_tokens, cached_tokens, new_tokens, drafted_tokens, accepted_tokens and preempted, as
        `hsai.infer.service.Stats` has them.
    """

    def __init__(
        self,
        runtime: Runtime,
        vocabulary: Vocabulary,
        *,
        rows: int,
        tokens: int | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        """With an empty cache.

        Args:
          runtime: the model.
          vocabulary: of its tokenizer.
          rows: requests that are answered at a time.
          tokens: how many the cache holds, of all rows together; by default what `rows` of 1,024 need, or one of the
            longest context.
          speculator: drafts for blocks of all kinds but the full one.
        Raises:
          InputError: rows beyond what the runtime has programs for; fewer tokens than one context has.
        """
        most = runtime.batches[-1]
        if not 1 <= rows <= most:
            raise InputError(f"rows={rows} must be between 1 and {most}")
        tokens = max(runtime.slots, min(1024, runtime.slots) * rows) if tokens is None else tokens
        if tokens < runtime.slots:
            raise InputError(f"a cache of {tokens} tokens does not hold the context of {runtime.slots}")
        # A runtime of one row has one page, as long as the context.
        self.pool = PagePool(max(runtime.width, tokens // runtime.page) if most > 1 else 1)
        self.running: list[Row] = []
        self.waiting: collections.deque[Row] = collections.deque()
        # Another thread may read them: no key is ever new.
        self.finished: dict[FinishReason, int] = dict.fromkeys(FINISH_REASONS, 0)
        counted = ("prompt_tokens", "cached_tokens", "new_tokens", "drafted_tokens", "accepted_tokens", "preempted")
        self.counts = dict.fromkeys(counted, 0)
        self._runtime, self._vocabulary, self._rows = runtime, vocabulary, rows
        self._pages = runtime.make_pages(self.pool.count)
        self._drafts = None if speculator is None else DraftPages(speculator, runtime, self.pool.count)
        self._reading: collections.deque[Row] = collections.deque()
        self._read_seconds: dict[int, float] = {}
        self._step_seconds: dict[tuple[int, Kind], float] = {}

    @property
    def idle(self) -> bool:
        """Whether nobody is there."""
        return not self.running and not self.waiting

    def turn(self) -> None:
        """One turn of the loop; does nothing if nobody is there.

        Raises:
          Unprepared: as it says; the next turn goes on.
          BaseException: whatever a runtime raises; `fail` ends those that run.
        """
        for row in (*self.running, *self.waiting):
            if row.is_cancelled():
                row.finish("cancelled")
                self._leave(row)
        self._take_up()
        self._read()
        self._write()

    def fail(self) -> None:
        """Ends all rows that run, when a defect left them without their cache. Each is told, whatever comes of the
        others."""
        for row in list(self.running):
            if not row.told:
                try:
                    row.finish(row.finished or "failed")
                except BaseException:
                    logger.exception("a request could not be ended")
                    row.finished = "failed"
            self._leave(row)

    def _leave(self, row: Row) -> None:
        """Forgets a row that has finished."""
        assert row.finished is not None
        self.finished[row.finished] += 1
        if row in self.running:
            self._set_down(row)
        else:
            self.waiting.remove(row)

    def _set_down(self, row: Row) -> None:
        """Takes a running row's pages away."""
        self.running.remove(row)
        if row in self._reading:
            self._reading.remove(row)
        self.pool.give(row.pages)
        row.pages, row.read, row.followed, row.named = [], 0, 0, 0

    def _take_up(self) -> None:
        """Begins waiting rows, in order, as long as there are pages for them, and one more for each of the others."""
        size = self._runtime.page
        # Who leaves is dropped by the next turn, and has nothing compiled for it.
        while self.waiting and len(self.running) < self._rows and not self.waiting[0].is_cancelled():
            row = self.waiting[0]
            row.names = name_pages(row.tokens, size, row.names)
            # The last token is read by the block that makes the next, even where its page is there.
            found = self.pool.find(row.names[: (len(row.tokens) - 1) // size])
            missing = -(-len(row.tokens) // size) - len(found)
            own = self.pool.take(missing) if missing + len(self.running) <= self.pool.available else None
            if own is None:
                self.pool.give(found)
                return
            self.waiting.popleft()
            row.pages, row.named = found + own, len(found)
            row.read = row.followed = len(found) * size
            # Before anything may fail: a row that is in no list would never be ended.
            self.running.append(row)
            try:
                self._prepare(row)
            except BaseException as error:  # the panics of libraries in Rust are no Exception
                row.finish("failed")
                self._leave(row)
                raise Unprepared from error
            if row.begin():
                row.cached = row.read
                self.counts["prompt_tokens"] += len(row.tokens)
                self.counts["cached_tokens"] += row.cached
            if row.unread:
                self._reading.append(row)

    def _prepare(self, row: Row) -> None:
        """Compiles what the row needs if it is alone, before its clock starts."""
        for bucket in plan_buckets(row.unread, self._runtime.buckets):
            self._runtime.prepare_read(bucket, self._pages)
        if self._drafts is not None:
            self._drafts.prepare_read(row.unread)
        self._prepare_write(1, row.kind)

    def _prepare_write(self, batch: int, kind: Kind) -> None:
        """Compiles what a block needs."""
        if kind == "full" or self._drafts is None:
            self._runtime.prepare_write(batch, kind, self._vocabulary, self._pages)
        else:
            self._drafts.prepare_write(batch, kind, self._vocabulary, self._pages)

    def _read(self) -> None:
        """Reads prompts, a chunk of each in turn, until patience is at its end: others may have come, or left."""
        begun = time.perf_counter()
        while self._reading:
            row = self._reading.popleft()
            self._read_chunk(row, self._choose_chunk(row.unread, len(self._reading) + 1 < len(self.running)))
            if row.unread:
                self._reading.append(row)
            if time.perf_counter() - begun > PATIENCE:
                return

    def _choose_chunk(self, unread: int, somebody_writes: bool) -> int:
        """The bucket for the next chunk; where somebody waits for it, one that takes no longer than patience."""
        buckets = self._runtime.buckets
        if somebody_writes:
            rates = [seconds / bucket for bucket, seconds in self._read_seconds.items()]
            quick = [bucket for bucket in buckets if rates and bucket * max(rates) <= PATIENCE]
            buckets = tuple(quick) or buckets[:1]
        return next(plan_buckets(unread, buckets))

    def _read_chunk(self, row: Row, bucket: int) -> None:
        count = min(bucket, row.unread)
        self._runtime.prepare_read(bucket, self._pages)
        begun = time.perf_counter()
        tokens = np.asarray(row.tokens[row.read : row.read + count], np.int32)
        table = make_table([row.pages], 1, self._runtime.width, self.pool.count)
        self._pages = jax.block_until_ready(self._runtime.read(tokens, row.read, table, self._pages))
        _learn(self._read_seconds, bucket, time.perf_counter() - begun)
        row.read += count
        self._name(row)

    def _name(self, row: Row) -> None:
        """Names the row's pages that have become full; a draft model has read them first, as it must have where others
        find them."""
        size = self._runtime.page
        if self._drafts is not None:
            self._drafts.follow(row, row.read // size * size)
        row.names = name_pages(row.tokens[: row.read], size, row.names)
        for index in range(row.named, row.read // size):
            self.pool.name(row.pages[index], row.names[index])
        row.named = row.read // size

    def _write(self) -> None:
        """A block of tokens of every row that has read its prompt."""
        rows = [row for row in self.running if row.unread == 0]
        if not rows:
            return
        kind = max((row.kind for row in rows), key=KINDS.index)
        batch = next(size for size in self._runtime.batches if size >= len(rows))
        steps = self._plan_steps(rows, batch, kind)
        wanted = steps if kind == "full" or self._drafts is None else steps * (1 + self._drafts.most)
        most = self._find_pages(rows, wanted)
        made = self._make(rows, batch, kind, steps if most == wanted else 1, most)
        for index, row in enumerate(rows):
            before = row.new
            row.take(index, made)
            self.counts["new_tokens"] += row.new - before
            row.read = len(row.tokens) - 1
            if made.drafts is not None:
                row.followed = max(0, row.read - 1)  # the last draft that was accepted may not have been read
            self._name(row)
            if row.finished is not None:
                self._leave(row)

    def _make(self, rows: Sequence[Row], batch: int, kind: Kind, steps: int, most: int) -> Made:
        """A block of so many steps, in which a row makes at most `most` tokens; what a step takes is learnt."""
        given = [
            (row.tokens[-1], row.read, min(most, row.most), row.pages, row.request.sampling, row.new) for row in rows
        ]
        arrays = make_rows(given, batch, self._runtime.width, self.pool.count)
        self._prepare_write(batch, kind)
        if kind == "full" or self._drafts is None:
            extras = self._make_extras(rows, batch) if kind == "full" else None
            begun = time.perf_counter()
            made, self._pages = self._runtime.write(arrays, extras, steps, kind, self._vocabulary, self._pages)
        else:
            arrays = self._drafts.show(arrays, rows)
            begun = time.perf_counter()
            made, self._pages = self._drafts.write(arrays, steps, kind, self._vocabulary, self._pages)
            assert made.drafts is not None
            for name, tokens in zip(("drafted_tokens", "accepted_tokens"), made.drafts, strict=True):
                self.counts[name] += int(tokens.sum())
        _learn(self._step_seconds, (batch, kind), (time.perf_counter() - begun) / made.steps)
        return made

    def _make_extras(self, rows: Sequence[Row], batch: int) -> Extras:
        """What a block of the full kind reads besides."""
        extras = make_extras(batch, self._vocabulary.size)
        for index, row in enumerate(rows):
            row.fill_extras(index, extras)
        return extras

    def _plan_steps(self, rows: Sequence[Row], batch: int, kind: Kind) -> int:
        """How many steps the block is to have: 1 where somebody waits for the first token, or for a mask."""
        known = self._step_seconds.get((batch, kind))
        if known is None or any(row.new == 0 or row.follower is not None for row in rows):
            return 1
        return max(1, min(MOST_STEPS, int(PATIENCE / known), max(row.most for row in rows)))

    def _find_pages(self, rows: list[Row], most: int) -> int:
        """Gives the rows pages for so many tokens each, or else for one, which is returned; rows may be set back."""
        size = self._runtime.page

        def count_missing(row: Row) -> int:
            return max(0, -(-(row.read + min(most, row.most)) // size) - len(row.pages))

        while sum(map(count_missing, rows)) > self.pool.available:
            if most > 1:
                most = 1
                continue
            youngest = self.running[-1]
            if youngest in rows:
                rows.remove(youngest)
            self._set_down(youngest)
            self.waiting.appendleft(youngest)
            self.counts["preempted"] += 1
        for row in rows:
            pages = self.pool.take(count_missing(row))
            assert pages is not None, "they were counted"
            row.pages += pages
        return most


def _learn(known: dict[Any, float], key: Any, seconds: float) -> None:
    """What something takes: half of it as it was now."""
    known[key] = (known.get(key, seconds) + seconds) / 2
