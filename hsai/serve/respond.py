"""Responses: objects, errors, and streams of server-sent events."""

import json
from collections.abc import Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Send

from hsai.serve.errors import ApiError

_STREAM_HEADERS = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
"""The last one keeps nginx from gathering events."""


class ObjectResponse(Response):
    """JSON, in ASCII: what came from outside may not even be Unicode."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of an object."""
        return write_json(content)


class ErrorResponse(ObjectResponse):
    """A refusal. The connection ends with it: what is left of the request is of no use (see `linger.py`)."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body, error.status, error.headers | {"connection": "close"})


def write_json(content: Any) -> bytes:
    """Without blanks, on one line."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


class EventStream:
    """Server-sent events, each an object; `[DONE]` is the last.

    Attributes:
      begun: whether its head was sent, after which there is no other response.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def begin(self, objects: Iterable[Any]) -> None:
        """Sends the head and the first events."""
        self.begun = True
        headers = [(name.encode(), value.encode()) for name, value in _STREAM_HEADERS.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self.say(objects)

    async def say(self, objects: Iterable[Any]) -> None:
        """Sends events."""
        if data := _write_events(objects):
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def remark(self, comment: str) -> None:
        """Sends what no client reads."""
        await self._send({"type": "http.response.body", "body": f": {comment}\n\n".encode(), "more_body": True})

    async def end(self, objects: Iterable[Any]) -> None:
        """Sends the last events."""
        data = _write_events(objects) + b"data: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def fail(self, error: ApiError) -> None:
        """Ends with an error, and without `[DONE]`: clients know by that that the text is not whole."""
        await self._send({"type": "http.response.body", "body": _write_events([error.body]), "more_body": False})


def _write_events(objects: Iterable[Any]) -> bytes:
    return b"".join(b"data: " + write_json(content) + b"\n\n" for content in objects)
