"""Reads the fields of a JSON object strictly: each by its name, type and range; what nobody asked for is refused.

Null is as good as absent, as in OpenAI's API.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from hsai.configuration import suggest
from hsai.serve.errors import ApiError, refuse


class Fields:
    """The fields of one object; `finish` once all that is known was read."""

    def __init__(self, content: Any, where: str = "") -> None:
        """Begins to read.

        Args:
          content: the object.
          where: its path in the body, such as `messages[0]`; empty for the body itself.
        Raises:
          ApiError: the content is no object.
        """
        self._where = where
        if not isinstance(content, Mapping):
            raise refuse(where, f"{where} must be an object, and is {show(content)}", code="invalid_type")
        self._content = content
        self._known: list[str] = []

    def path(self, name: str) -> str:
        """The name of a field, as an error tells it."""
        return f"{self._where}.{name}" if self._where else name

    def take(self, name: str) -> Any:
        """The value as it is; None if it is absent."""
        self._known.append(name)
        return self._content.get(name)

    def flag(self, name: str) -> bool:
        """A boolean; False if it is absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self._mistyped(name, "a boolean")
        return bool(value)

    def integer(self, name: str, low: int, high: int | None = None) -> int | None:
        """An integer from `low` to `high`, both valid."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._mistyped(name, "an integer")
        if value < low or (high is not None and value > high):
            valid = f"at least {low}" if high is None else f"between {low} and {high}"
            raise refuse(self.path(name), f"{self.path(name)}={show(value)} must be {valid}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number from `low` to `high`, both valid."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._mistyped(name, "a number")
        if not low <= value <= high:
            raise refuse(self.path(name), f"{self.path(name)}={show(value)} must be between {low:g} and {high:g}")
        return float(value)

    def text(self, name: str) -> str | None:
        """A string that has a form in UTF-8."""
        value = self.take(name)
        return None if value is None else check_text(value, self.path(name))

    def pairs(self, name: str) -> None:
        """An object of strings, which have no meaning here."""
        value = self.take(name)
        if value is not None and not (isinstance(value, dict) and all(isinstance(v, str) for v in value.values())):
            raise self._mistyped(name, "an object of strings")

    def choice(self, name: str, valid: Collection[str]) -> str:
        """One of some strings; it must be there."""
        value = self.take(name)
        if value not in [*valid]:
            raise refuse(self.path(name), f"{self.path(name)}={show(value)}; valid: {', '.join(valid)}")
        assert isinstance(value, str)
        return value

    def demand(self, value: Any, name: str) -> Any:
        """`value`, which was read of the field `name`, and must not be absent."""
        if value is None:
            raise refuse(self.path(name), f"{self.path(name)} is missing", code="missing_required_parameter")
        return value

    def only(self, name: str, neutral: Collection[Any], why: str) -> None:
        """A field that has no other meaning here than none: absent, or one of `neutral`."""
        value = self.take(name)
        same = (item for item in neutral if item == value and isinstance(item, bool) == isinstance(value, bool))
        if value is not None and not any(True for _ in same):
            valid = " or ".join(["null", *map(show, neutral)])
            message = f"{self.path(name)}={show(value)}: {why}; valid is {valid}"
            raise refuse(self.path(name), message, code="unsupported_value")

    def finish(self) -> None:
        """Refuses what was not read."""
        for name in self._content:
            if name not in self._known:
                path = self.path(name[:100])
                message = f"unknown field {show(path)}; {suggest(name[:100], self._known)}"
                raise refuse(path, message, code="unknown_parameter")

    def _mistyped(self, name: str, kind: str) -> ApiError:
        message = f"{self.path(name)} must be {kind}, and is {show(self._content[name])}"
        return refuse(self.path(name), message, code="invalid_type")


def check_text(value: Any, path: str) -> str:
    """`value`, a string that has a form in UTF-8."""
    if not isinstance(value, str):
        raise refuse(path, f"{path} must be a string, and is {show(value)}", code="invalid_type")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        fault = f"has the lone surrogate \\u{ord(value[error.start]):04x} at {error.start}"
        raise refuse(path, f"{path} {fault}, which is no character") from None
    return value


def show(value: Any) -> str:
    """A value as JSON in ASCII, cut where it is long."""
    text = json.dumps(value if not isinstance(value, str) else value[:61])
    return text if len(text) <= 60 else f"{text[:57]}..."
