"""Options that no kernel takes: for each, the change of a call's arguments and what the ValueError says."""

import math

Refusal = tuple[dict[str, float], str]


def list_wrong_counts(name: str) -> list[Refusal]:
    """For an option that counts from 1, in int32."""
    values = (0, -1, 2.5, 3.0, True, 2**31)
    return [({name: value}, f"{name}={value} must be an int from 1 to 2147483647, or None") for value in values]


def list_wrong_caps(name: str) -> list[Refusal]:
    """For an option that scores are divided by and multiplied with; float32 has 1e-46 as 0, and 10**39 as infinity."""
    values = (0.0, -1.0, 1e-46, 10**39, math.inf, math.nan)
    return [({name: value}, f"{name}={value} must be positive and finite in float32, or None") for value in values]


def list_wrong_factors(name: str) -> list[Refusal]:
    """For an option that scores are multiplied with."""
    values = (10**39, math.inf, -math.inf, math.nan)
    return [({name: value}, f"{name}={value} must be finite in float32, or None") for value in values]
