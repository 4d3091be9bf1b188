"""What stands before every request: who may ask, and what every response says and is counted as.

Without a key, whoever reaches the address may ask: programs of this machine. A page of some other site in this
machine's browser must not: it can make the browser send requests here, but not with a JSON body (`app.py` takes no
other), and by rebinding its own name to this address it could even read the answers, but not without that name in Host.
"""

import hmac
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hsai.serve.errors import ApiError
from hsai.serve.metrics import Metrics
from hsai.serve.respond import ErrorResponse

HOSTS = ("127.0.0.1", "localhost")
"""Names of this machine for itself."""

OPEN = ("/", "/health")
"""Paths that need no key: the page, which holds nothing and asks for it, and what a supervisor looks at."""

PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/embeddings")
"""Paths that are counted by name."""


class Gate:
    """Lets requests in to an application."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None) -> None:
        """Stands before `app`; everyone on this machine may come in if `api_key` is None."""
        self._app = app
        self._metrics = metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_response(path, message["status"])
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = uuid.uuid4().hex
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await ErrorResponse(error)(scope, receive, answer)
        else:
            await self._app(scope, receive, answer)

    def _check(self, path: str, headers: Headers) -> None:
        if self._key is None:
            host = headers.get("host", HOSTS[0]).lower()
            if host.rpartition(":")[0] not in HOSTS and host not in HOSTS:
                message = f"without an API key only {' and '.join(HOSTS)} are answered, and the Host is {host[:100]!a}"
                raise ApiError(403, message, code="unknown_host")
            return
        if path in OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # latin-1 is how a header's bytes came in.
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            raise ApiError(
                401,
                "no valid API key; it is sent as Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
