"""Refusals in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` under an HTTP status."""

import json
import math
from collections.abc import Mapping
from typing import Any

from hsai.errors import InputError

NO_RETRY = {"x-should-retry": "false"}
"""By which OpenAI's clients know that the same request would fail again; by the status alone they would try."""


class ApiError(Exception):
    """A request that is not answered as it was meant."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Says what is wrong.

        Args:
          status: of HTTP.
          message: one line: the offending value, and what would be valid.
          kind: OpenAI's type of the error.
          param: the field, such as `messages[0].role`.
          code: OpenAI's word for it, where there is one.
          headers: beside the object.
        """
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refuse(param: str, message: str, *, code: str | None = "invalid_value") -> ApiError:
    """The field `param` cannot be used."""
    return ApiError(400, message, param=param, code=code)


def refuse_input(error: InputError, *, param: str | None = None) -> ApiError:
    """What a room below refused."""
    return ApiError(400, str(error), param=param, code="invalid_value")


def refuse_length(tokens: int, context: int, *, param: str) -> ApiError:
    """The prompt is longer than the context."""
    message = f"the prompt has {tokens} tokens, and the model's context holds {context}"
    return refuse(param, message, code="context_length_exceeded")


def refuse_model(asked: str, name: str) -> ApiError:
    """Another model is served than was asked for."""
    message = f"the model {json.dumps(asked[:100])} is not served; valid is {json.dumps(name)}"
    return ApiError(404, message, param="model", code="model_not_found")


def refuse_busy(fault: str, retry_after: float) -> ApiError:
    """The queue is full."""
    return ApiError(
        429,
        f"{fault}; try again later",
        kind="rate_limit_error",
        code="queue_full",
        headers={"retry-after": str(max(1, math.ceil(retry_after)))},
    )


def refuse_closing() -> ApiError:
    """The server ends."""
    return ApiError(
        503, "the server is shutting down", kind="server_error", code="shutting_down", headers={"retry-after": "5"}
    )


def refuse_constraint() -> ApiError:
    """What a text must follow is too large for its parser, which showed only in the middle of the text."""
    message = (
        "response_format: its parser gave up in the middle of the text, as the schema allows too much; simplify it"
    )
    return ApiError(400, message, param="response_format", code="schema_too_large")


def refuse_time(seconds: float) -> ApiError:
    """The answer took too long."""
    message = f"the answer was not ready after {seconds:g} seconds, the longest a request may take"
    return ApiError(504, message, kind="server_error", code="timeout", headers=NO_RETRY)


def confess() -> ApiError:
    """A defect of ours, which stands in the log; nothing of it is told."""
    return ApiError(500, "the server failed; its log says how", kind="server_error", code="internal_error")
