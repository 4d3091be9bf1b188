"""HTTP/1.1 with deadlines: a client that dawdles is dropped, before its request as while its answer is sent.

uvicorn waits for ever for the head of a request, and for a client to read. Bodies have their deadline in `body.py`.
"""

import asyncio
import contextlib
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hsai.serve.errors import ApiError
from hsai.serve.respond import ErrorResponse

CONNECTIONS = 512
"""At a time; further ones are dropped at once. Each may hold a body, an answer, and 64 KiB of a head."""


class PatientProtocol(H11Protocol):
    """A connection.

    Attributes:
      head_seconds: in which the head of a request must have come whole.
      stall_seconds: for which a client may read nothing of what is sent.
      connections_at_most: how many there may be.
    """

    head_seconds = 20.0
    stall_seconds = 30.0
    connections_at_most = CONNECTIONS

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock."""
        super().connection_made(transport)
        if len(self.connections) > self.connections_at_most:
            transport.abort()
            return
        # Whatever the system does not take at once pauses the writer, and starts the clock; nothing piles up here.
        transport.set_write_buffer_limits(high=0)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks."""
        super().connection_lost(exc)
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Something came."""
        super().data_received(data)
        self._watch_head()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP; whoever got an answer already, and lingers (`linger.py`), gets no other."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()
            return
        if self.cycle is not None:  # who answers it says nothing any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        message = f"this is not valid HTTP/1.1: {' '.join(msg.split())}"
        error = ApiError(400, message, code="invalid_http")
        response = ErrorResponse(error)
        head = h11.Response(status_code=400, headers=response.raw_headers, reason=b"Bad Request")
        with contextlib.suppress(h11.LocalProtocolError):  # an answer to HEAD has no body; or one was whole already
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read everything."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def _watch_head(self) -> None:
        """While no request is being answered, one must come whole; what else comes does not move the deadline."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)
