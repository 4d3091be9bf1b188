"""How far a kernel may be from its float64 oracle: one table for all kernels and backends, never loosened to pass.

Errors are relative to the sum of the magnitudes of a product's terms, which bounds what rounding can do: a float32 sum
of N terms is off by up to about log2(N) to N units of 2**-24 of it, and a bfloat16 result by a rounded weight and a
rounded output, 2**-9 each.
"""

import numpy as np

RELATIVE_ERROR = {"float32": 2.0**-20, "bfloat16": 2.0**-8}
"""By the activations' dtype."""


def assert_close(actual: object, expected: np.ndarray, magnitude: np.ndarray | float, dtype: str) -> None:
    """Fails unless |actual - expected| <= RELATIVE_ERROR[dtype] * magnitude in every element.

    What float32 has no normal number for may be flushed to zero.
    """
    value = np.asarray(actual, np.float64)
    assert value.shape == expected.shape, f"{value.shape} is not {expected.shape}"
    excess = np.abs(value - expected) - RELATIVE_ERROR[dtype] * magnitude
    # Written so that a NaN fails.
    assert np.all(excess <= 2.0**-126), f"off by {np.max(np.abs(value - expected))}, {np.max(excess)} more than allowed"
