"""The engine for many at a time: requests come from any thread, wait in a bounded queue, and are answered by events.

One thread does all the work: it is started when a request comes, and ends when none is left, so that nothing needs to
be closed and no computation outlives its caller. A signal such as Ctrl-C never reaches it: it raises in the main
thread, which cancels its ticket.
"""

import collections
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

from hsai.errors import InputError
from hsai.infer.engine import Engine
from hsai.infer.request import Event, FinishReason, Request, Usage

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
        self.submitted = time.perf_counter()
        self._cancelled = False
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._give: OnEvent = on_event or self._events.put

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
        """For the service: hands on an event."""
        self._give(event)


class Service:
    """Answers requests on one device."""

    def __init__(self, engine: Engine, *, queue: int = 64) -> None:
        """Takes requests for `engine`.

        Args:
          engine: which must not be used beside the service.
          queue: requests that may wait.
        """
        if queue < 1:
            raise InputError(f"queue={queue} must be at least 1")
        self.engine = engine
        self._most = queue
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._current: Ticket | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._failed = False
        self._finished: dict[FinishReason, int] = {}
        self._counts = {"prompt_tokens": 0, "new_tokens": 0, "rejected": 0}

    @property
    def healthy(self) -> bool:
        """Whether requests can be answered: no defect has been met."""
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
        self.engine.check_prompt(request.tokens)
        ticket = Ticket(request, on_event)
        with self._changed:
            if self._closed:
                raise Closed("the service is closing")
            if len(self._waiting) >= self._most:
                self._counts["rejected"] += 1
                raise Busy(len(self._waiting), 1.0)
            self._waiting.append(ticket)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hsai-service")
                self._thread.start()
        return ticket

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
                for ticket in (*self._waiting, *([self._current] if self._current else [])):
                    ticket.cancel()
                self._changed.wait_for(lambda: self._thread is None)
        return done

    def stats(self) -> Stats:
        """A snapshot, from any thread."""
        with self._changed:
            return Stats(
                queued=len(self._waiting),
                running=int(self._current is not None),
                pages_total=1,
                pages_used=int(self._current is not None),
                pages_reusable=0,
                cached_tokens=0,
                finished=dict(self._finished),
                preempted=0,
                **self._counts,
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._current = self._thread = None
                    self._changed.notify_all()
                    return
                self._current = ticket = self._waiting.popleft()
            try:
                last = self._answer(ticket)
            except Exception:
                logger.exception("the engine failed")
                last = Event(finish_reason="failed", usage=_no_usage(ticket))
                self._failed = True
            assert last.finish_reason is not None and last.usage is not None
            with self._changed:
                self._finished[last.finish_reason] = self._finished.get(last.finish_reason, 0) + 1
                self._counts["prompt_tokens"] += last.usage.prompt_tokens
                self._counts["new_tokens"] += last.usage.new_tokens
            ticket.give(last)

    def _answer(self, ticket: Ticket) -> Event:
        """Gives the events of a request but the last, which is returned."""
        begun = time.perf_counter()
        request = ticket.request

        class Stop(Exception):
            pass

        def show(text: str) -> None:
            ticket.give(Event(text=text))
            if ticket.cancelled:
                raise Stop

        try:
            if ticket.cancelled:
                raise Stop
            done = self.engine.generate_tokens(
                request.tokens, max_tokens=request.max_tokens, sampling=request.sampling, on_text=show
            )
        except Stop:
            return Event(finish_reason="cancelled", usage=_no_usage(ticket))
        usage = Usage(
            prompt_tokens=done.prompt_tokens,
            cached_tokens=0,
            new_tokens=len(done.tokens),
            steps=done.decode_steps,
            seconds_queued=begun - ticket.submitted,
            seconds_prefill=done.seconds_prefill,
            seconds_decode=done.seconds_decode,
        )
        return Event(tokens=done.tokens, finish_reason=done.finish_reason, usage=usage)


def _no_usage(ticket: Ticket) -> Usage:
    return Usage(
        prompt_tokens=len(ticket.request.tokens),
        cached_tokens=0,
        new_tokens=0,
        steps=0,
        seconds_queued=0.0,
        seconds_prefill=0.0,
        seconds_decode=0.0,
    )
