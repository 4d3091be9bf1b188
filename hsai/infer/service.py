"""The engine for many at a time: requests come from any thread, wait in a bounded queue, and are answered by events.

One thread does all the work: it is started when a request comes, and ends when none is left, so that nothing needs to
be closed and no computation outlives its caller. A signal such as Ctrl-C never reaches it: it raises in the main
thread, which cancels its ticket.
"""

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from hsai.allocator import return_freed_memory
from hsai.errors import InputError
from hsai.infer.constraint import Guide
from hsai.infer.programs import Vocabulary
from hsai.infer.request import Event, FinishReason, Request, check_prompt
from hsai.infer.row import Row
from hsai.infer.scheduler import Scheduler, Unprepared

if TYPE_CHECKING:
    from hsai.infer.engine import Engine

logger = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]


class Busy(Exception):
    """The queue is full: the request was not taken, and may be tried again in about `retry_after` seconds."""

    def __init__(self, queued: int, retry_after: float) -> None:
        super().__init__(f"{queued} requests are waiting, as many as may")
        self.retry_after = retry_after


class Closed(Exception):
    """The service takes no more requests: it is draining, or drained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """A service at one moment, and what it did since it began."""

    queued: int
    """Requests that wait."""

    running: int
    """Requests that are being answered."""

    pages_total: int
    """Pages of the cache."""

    pages_used: int
    """Pages that running requests hold."""

    pages_reusable: int
    """Pages that hold prompts of earlier requests, to be given up when they are needed; the rest is empty."""

    prompt_tokens: int
    """Tokens of prompts, those that were found in the cache included."""

    cached_tokens: int
    """Tokens of prompts that were found in the cache."""

    new_tokens: int
    """Tokens made."""

    drafted_tokens: int
    """Tokens that speculation drafted."""

    accepted_tokens: int
    """Those of them that the model made too."""

    finished: dict[FinishReason, int]
    """Requests that ended, by the reason."""

    rejected: int
    """Requests that found the queue full."""

    preempted: int
    """How often a running request had to give its pages to an older one and wait again."""


class Ticket:
    """A request that was taken: iterate over its events, from any thread but the service's; the last has a reason."""

    def __init__(self, request: Request, on_event: OnEvent | None) -> None:
        self.request = request
        self._cancelled = False
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._take: OnEvent = on_event or self._events.put

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            yield event
            if event.finish_reason is not None:
                return

    def cancel(self) -> None:
        """Ends the request as soon as the step that runs is done; its last event says so. Takes no lock: a signal
        handler may call it."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def give(self, event: Event) -> None:
        """For the service: hands on an event. Who cannot take it is a defect of theirs, and gets no more."""
        try:
            self._take(event)
        except BaseException:
            logger.exception("an event could not be delivered")
            self._cancelled = True


class Service:
    """Answers requests on one device."""

    def __init__(self, engine: "Engine", *, rows: int = 8, tokens: int | None = None, queue: int = 64) -> None:
        """Takes requests for `engine`, with a cache of its own.

        Args:
          engine: the model.
          rows: requests that are answered at a time; others wait.
          tokens: how many the cache holds, of all rows together; by default what `rows` of 1,024 need, or one of the
            longest context.
          queue: requests that may wait.
        Raises:
          InputError: a number out of range.
        """
        if queue < 1:
            raise InputError(f"queue={queue} must be at least 1")
        # Not the engine itself, which has a service: in a circle, weights would outlive whoever holds them.
        self._runtime, self._tokenizer = runtime, tokenizer = engine.runtime, engine.tokenizer
        vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.stops)
        speculator = engine.speculator
        self._make_scheduler = lambda: Scheduler(runtime, vocabulary, rows=rows, tokens=tokens, speculator=speculator)
        self._scheduler = self._make_scheduler()
        self._guide = Guide(tokenizer)
        self._queue = queue
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._abandoned = False
        self._failed = False
        self._rejected = 0
        self._interval = 1.0

    @property
    def healthy(self) -> bool:
        """Whether requests can be answered: since the last defect tokens were made."""
        return not self._failed

    def submit(self, request: Request, *, on_event: OnEvent | None = None) -> Ticket:
        """Takes a request; returns at once.

        Args:
          request: what is asked.
          on_event: called with each event, in the service's thread, and must not block: an asyncio server passes
            `lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)`. By default the ticket is iterated.
        Raises:
          InputError: the request does not suit the model.
          Busy: the queue is full.
          Closed: no more requests are taken.
        """
        self.check_room()
        check_prompt(request.tokens, self._tokenizer, self._runtime.slots)
        follower = None if request.constraint is None else self._guide.follow(request.constraint)
        ticket = Ticket(request, on_event)
        row = Row(
            request,
            self._tokenizer,
            slots=self._runtime.slots,
            follower=follower,
            give=ticket.give,
            is_cancelled=lambda: ticket.cancelled or self._abandoned,
        )
        with self._changed:
            self._check_room()
            self._scheduler.waiting.append(row)
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="hsai-service")
                try:
                    thread.start()
                except BaseException:  # there may be no more threads; whoever comes next tries again
                    self._scheduler.waiting.remove(row)
                    raise
                self._thread = thread
        return ticket

    def check_room(self) -> None:
        """Whether a request would be taken now: what it takes to make one need not be done for one that would not.

        One that would not counts as rejected.

        Raises:
          Busy: the queue is full.
          Closed: no more requests are taken.
        """
        with self._changed:
            self._check_room()

    def _check_room(self) -> None:
        if self._closed:
            raise Closed("the service is closing")
        queued = len(self._scheduler.waiting)
        if queued >= self._queue:
            self._rejected += 1
            raise Busy(queued, min(max(self._interval, 1.0), 60.0))

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests, and waits until those that it has are answered.

        Args:
          timeout: seconds, after which the rest is cancelled; None waits for all.
        Returns: whether all were answered in time.
        """
        with self._changed:
            self._closed = True
            done = self._changed.wait_for(lambda: self._thread is None, timeout)
            if not done:
                self._abandoned = True
                self._changed.wait_for(lambda: self._thread is None)
        return done

    def stats(self) -> Stats:
        """A snapshot, from any thread."""
        with self._changed:
            scheduler = self._scheduler
            pool = scheduler.pool
            return Stats(
                queued=len(scheduler.waiting),
                running=len(scheduler.running),
                pages_total=pool.count,
                pages_used=pool.held,
                pages_reusable=pool.kept,
                finished=dict(scheduler.finished),
                rejected=self._rejected,
                **scheduler.counts,
            )

    def _work(self) -> None:
        """Turns the scheduler until nobody is there."""
        ended, since = sum(self._scheduler.finished.values()), time.perf_counter()
        while True:
            with self._changed:
                if self._scheduler.idle:
                    self._thread = None
                    self._changed.notify_all()
                    return
            made = self._scheduler.counts["new_tokens"]
            try:
                self._scheduler.turn()
                if self._scheduler.counts["new_tokens"] > made:
                    self._failed = False
            except Unprepared:
                logger.exception("a request ends, as its programs cannot be made")
                self._failed = True
            except BaseException:  # the panics of libraries in Rust are no Exception
                logger.exception("the engine failed")
                self._start_again()
            return_freed_memory()
            total = sum(self._scheduler.finished.values())
            if total > ended:
                now = time.perf_counter()
                self._interval = (self._interval + (now - since) / (total - ended)) / 2
                ended, since = total, now

    def _start_again(self) -> None:
        """After a defect: ends all that run, whose cache may be gone, and goes on with those that wait."""
        self._failed = True
        broken = self._scheduler
        broken.fail()
        with self._changed:
            try:
                self._scheduler = self._make_scheduler()
                self._scheduler.waiting.extend(broken.waiting)
                broken.waiting.clear()
            except BaseException:
                logger.exception("the engine cannot start again")
                self._scheduler = broken
                self._closed = True
                while broken.waiting:
                    broken.waiting.popleft().finish("failed")
            self._scheduler.finished = broken.finished
            self._scheduler.counts = broken.counts
