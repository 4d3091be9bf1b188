"""Takes the body of a request, as long as it is of a kind, size and speed that are served."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from hsai.serve.errors import ApiError
from hsai.serve.exchange import Gone
from hsai.serve.served import Limits


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The whole body.

    Raises:
      ApiError: it is not said to be JSON, is too long, or does not come in time.
      Gone: the client went away.
    """
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"Content-Type is {kind[:100]!a}; valid is application/json", code="unsupported_media_type")
    if (coding := headers.get("content-encoding", "identity")) != "identity":
        raise ApiError(415, f"Content-Encoding is {coding[:100]!a}; valid is none", code="unsupported_media_type")
    if int(headers.get("content-length", "0")) > limits.body_bytes:  # digits: it would be no HTTP otherwise
        raise _refuse_size(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:
                    raise _refuse_size(limits)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        fault = f"the body has not come whole after {limits.body_seconds:g} seconds"
        raise ApiError(408, fault, code="timeout") from None


def _refuse_size(limits: Limits) -> ApiError:
    return ApiError(413, f"the body is too long; at most {limits.body_bytes} bytes are valid", code="request_too_large")
