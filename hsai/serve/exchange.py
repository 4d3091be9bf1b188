"""One request between the event loop and the service's thread.

What the service says while nobody listens waits, and is then taken as one event: a client that is slow to read holds no
more than its own answer, and holds up nobody.
"""

import asyncio
import itertools
import threading
from collections.abc import Sequence

from hsai.infer.request import Event, Request
from hsai.infer.service import OnEvent, Service, Ticket


class Gone(Exception):
    """The client went away."""


class Exchange:
    """Made in the event loop; `submit` in any thread, all else in the loop. `leave` at the end, whatever happened."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._pending: list[Event] = []
        self._gone = False
        self._left = False
        self._lock = threading.Lock()
        self._ticket: Ticket | None = None

    def submit(self, service: Service, request: Request, on_last: OnEvent) -> None:
        """Hands the request to the service; `on_last` sees the last event, in the service's thread.

        Raises: as `Service.submit`.
        """

        def take(event: Event) -> None:
            if event.finish_reason is not None:
                on_last(event)
            with self._lock:
                if not self._left:  # the loop may be gone otherwise
                    self._loop.call_soon_threadsafe(self._put, event)

        ticket = service.submit(request, on_event=take)
        with self._lock:
            self._ticket = ticket
            if self._left:
                ticket.cancel()

    def leave(self) -> None:
        """Ends the request if it has not ended."""
        with self._lock:
            self._left = True
            if self._ticket is not None:
                self._ticket.cancel()

    def lose(self) -> None:
        """The client went away: whoever waits for events is told."""
        self._gone = True
        self._changed.set()

    async def next(self) -> Event:
        """What was said since the last call; waits until there is something.

        Raises:
          Gone: the client is not there any more.
        """
        await self._changed.wait()
        self._changed.clear()
        if self._gone:
            raise Gone
        events, self._pending = self._pending, []
        return join(events)

    async def whole(self) -> Event:
        """All that is said, as one event; waits until it has ended. Raises as `next`."""
        events = [await self.next()]
        while events[-1].finish_reason is None:
            events.append(await self.next())
        return join(events)

    def _put(self, event: Event) -> None:
        self._pending.append(event)
        self._changed.set()


def join(events: Sequence[Event]) -> Event:
    """One event that says what several say, one after the other."""
    return Event(
        text="".join(event.text for event in events),
        tokens=tuple(itertools.chain.from_iterable(event.tokens for event in events)),
        logprobs=tuple(itertools.chain.from_iterable(event.logprobs for event in events)),
        finish_reason=events[-1].finish_reason,
        usage=events[-1].usage,
    )
