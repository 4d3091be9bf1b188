"""How far a kernel may be from its float64 oracle: one table for all kernels and backends, never loosened to pass.

Errors are relative to the sum of the magnitudes of a product's terms, which bounds what rounding can do: a float32 sum
of N terms is off by up to about log2(N) to N units of 2**-24 of it, and a bfloat16 result by rounded weights and a
rounded output. Of weights a relative error is between 2**-9 and 2**-8 at most, and not all have it the same way; the
output is off by half its own unit, which just above a power of two is 2**-8 of it. Where the terms hardly cancel, that
alone can be as much as the table has, so that it is then granted beside 2**-9 for the weights.
"""

import numpy as np

RELATIVE_ERROR = {"float32": 2.0**-20, "bfloat16": 2.0**-8}
"""By the activations' dtype."""


def assert_close(actual: object, expected: np.ndarray, magnitude: np.ndarray | float, dtype: str) -> None:
    """Fails unless |actual - expected| <= RELATIVE_ERROR[dtype] * magnitude in every element, or for bfloat16, where
    that is more, half a unit of the expected result and 2**-9 * magnitude.

    What float32 has no normal number for may be flushed to zero.
    """
    value = np.asarray(actual, np.float64)
    assert value.shape == expected.shape, f"{value.shape} is not {expected.shape}"
    allowed = RELATIVE_ERROR[dtype] * magnitude
    if dtype == "bfloat16":
        half_unit = np.where(expected == 0, 0.0, np.exp2(np.frexp(expected)[1] - 9.0))  # of 8 bits of precision
        allowed = np.maximum(allowed, half_unit + 2.0**-9 * magnitude)
    excess = np.abs(value - expected) - allowed
    # Written so that a NaN fails.
    assert np.all(excess <= 2.0**-126), f"off by {np.max(np.abs(value - expected))}, {np.max(excess)} more than allowed"
