"""A body as JSON: UTF-8, finite numbers, and no deeper than anything that is meant."""

import json
import math
from typing import Any, NoReturn

from hsai.serve.errors import ApiError

LONGEST_INTEGER = 400
"""Digits: beyond float64."""

DEEPEST = 128
"""Levels of nesting; a JSON schema, the deepest thing in a request, takes about two a level of what it describes."""


def read_object(body: bytes) -> dict[str, Any]:
    """The object that `body` is.

    Raises:
      ApiError: the body is empty, no UTF-8, no JSON, no object, nested too deeply, or has a number beyond float64.
    """
    if not body:
        raise _refuse("is empty")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refuse(f"is not UTF-8: byte 0x{body[error.start]:02x} at {error.start}") from None
    try:
        content = json.loads(text, parse_float=_read_float, parse_int=_read_int, parse_constant=_refuse_constant)
    except RecursionError:
        raise _refuse(f"is nested too deeply; at most {DEEPEST} levels are valid") from None
    except json.JSONDecodeError as error:
        raise _refuse(f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # a number, or what stands for one
        raise _refuse(f"has a number that cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise _refuse(f"is JSON, but no object: it begins with {text.lstrip()[:1]!r}")
    _check_depth(content)
    return content


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEEPEST):
        items = (item for part in level for item in (part.values() if isinstance(part, dict) else part))
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise _refuse(f"is nested too deeply; at most {DEEPEST} levels are valid")


def _read_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is beyond float64")
    return value


def _read_int(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _refuse(fault: str) -> ApiError:
    return ApiError(400, f"the body {fault}; valid is a JSON object in UTF-8", code="invalid_json")
