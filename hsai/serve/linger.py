"""Answers that come before the request is whole reach the client all the same.

Who refuses a request by its head, or in the middle of its body, closes the connection; and what then still comes makes
the system reset it, and the client's system throw away the answer that it has not read yet. So the answer is sent, and
what comes is taken and thrown away, until it has ended (RFC 9112, section 9.6).
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Linger:
    """Lets requests end behind an application that may answer early.

    Attributes:
      seconds: for the rest of a request; then the answer ends, whatever comes.
    """

    seconds = 5.0

    def __init__(self, app: ASGIApp) -> None:
        """Takes what `app` leaves of a request."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        ended = False

        async def take() -> Message:
            nonlocal ended
            message = await receive()
            ended = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            if ended or message["type"] != "http.response.body" or message.get("more_body", False):
                await send(message)
                return
            await send({**message, "more_body": True})
            try:
                async with asyncio.timeout(self.seconds):
                    while not ended:
                        await take()
            except (TimeoutError, asyncio.CancelledError):  # long enough, or the server ends
                pass
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, take, answer)
