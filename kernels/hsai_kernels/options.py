"""Options that are numbers, refused before a kernel sees them: kernels compute in float32, and count in int32."""

from collections.abc import Container
from typing import TypeGuard

import numpy as np

SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
LARGEST_COUNT = 2**31 - 1


def check_softcap(softcap: float | None) -> None:
    """Raises ValueError unless there is no cap, or one by which float32 scores can be divided."""
    if softcap is not None and not SMALLEST <= softcap <= LARGEST:
        raise ValueError(f"softcap={softcap} must be positive and finite in float32, or None")


def check_normal(name: str, value: float) -> None:
    """Raises ValueError unless the value is positive, and neither zero, subnormal nor infinite in float32."""
    if not SMALLEST <= value <= LARGEST:
        raise ValueError(f"{name}={value} must be from {SMALLEST:g} to {LARGEST:g}: positive and normal in float32")


def check_factor(name: str, value: float | None) -> None:
    """Raises ValueError unless there is no factor, or a finite one."""
    if value is not None and not abs(value) <= LARGEST:
        raise ValueError(f"{name}={value} must be finite in float32, or None")


def check_count(name: str, value: int | None) -> None:
    """Raises ValueError unless there is no count, or a whole one, of at least 1."""
    if value is not None and not (_is_int(value) and 1 <= value <= LARGEST_COUNT):
        raise ValueError(f"{name}={value!r} must be an int from 1 to {LARGEST_COUNT}, or None")


def is_int_of(value: object, valid: Container[int]) -> bool:
    """Whether the value is one of `valid`, and an int: 2.0 and True equal one, and fail when the program is built."""
    return _is_int(value) and value in valid


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
