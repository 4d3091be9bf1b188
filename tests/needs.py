"""What a test needs that a machine may lack: without it the test is skipped, and where HSAI_NO_SKIPS is set, as in CI,
it fails. CI installs all of it, and must not be green because an installation did nothing.
"""

import importlib
import importlib.util
import os
from typing import Any

import pytest

NO_SKIPS = "HSAI_NO_SKIPS"


def needs(present: bool, reason: str) -> pytest.MarkDecorator:
    """The mark of tests that need something.

    Args:
      present: whether it is here.
      reason: what is missing, and what brings it.
    Raises:
      pytest.fail.Exception: it is missing, and must not be: the module that asks cannot be collected.
    """
    if not present and os.environ.get(NO_SKIPS):
        pytest.fail(f"{reason} ({NO_SKIPS} is set)", pytrace=False)
    return pytest.mark.skipif(not present, reason=reason)


def require(present: bool, reason: str) -> None:
    """The same inside of a test, of what only running it shows: skips the test, or fails it."""
    if needs(present, reason).args[0]:
        pytest.skip(reason)


def bring(name: str) -> Any:
    """A module that only tests import; without it the test is skipped, or fails."""
    require(importlib.util.find_spec(name) is not None, f"no {name}: pip install -e '.[dev,interop]'")
    return importlib.import_module(name)
