"""Rotary positions: what attention relies on, and what a configuration may say."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsai.errors import InputError
from hsai.models import RopeConfig, RopeScaling
from hsai.models.rope import frequencies, make_rotation, rotate


def turn(head: np.ndarray, position: int) -> np.ndarray:
    """One head at one position."""
    rotation = make_rotation(jnp.full((1, 1), position), RopeConfig(), len(head))
    return np.asarray(rotate(jnp.asarray(head)[None, None, None], rotation))[0, 0, 0]


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_scores_depend_on_the_distance_alone(query: int, key: int, shift: int) -> None:
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((2, 8)).astype(np.float32)
    near, far = turn(a, query) @ turn(b, key), turn(a, query + shift) @ turn(b, key + shift)
    assert abs(near - far) < 1e-3  # angles of up to 1,000 radians in float32
    assert np.isclose(np.linalg.norm(turn(a, query)), np.linalg.norm(a), rtol=1e-5)


def test_position_zero_and_dtype_are_kept() -> None:
    x = jnp.arange(16.0, dtype=jnp.bfloat16).reshape(1, 2, 1, 8)
    y = rotate(x, make_rotation(jnp.array([[0, 1]]), RopeConfig(), 8))
    assert y.dtype == jnp.bfloat16
    assert jnp.array_equal(y[:, 0], x[:, 0]) and not jnp.array_equal(y[:, 1], x[:, 1])


def test_frequencies_are_a_geometric_series_from_one() -> None:
    np.testing.assert_allclose(frequencies(RopeConfig(theta=16.0), 8), [1, 0.5, 0.25, 0.125], rtol=1e-6)
    scaling = RopeScaling(kind="linear", factor=2.0)
    np.testing.assert_allclose(
        frequencies(RopeConfig(theta=16.0, scaling=scaling), 8), [0.5, 0.25, 0.125, 0.0625], rtol=1e-6
    )


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="theta=1.0 must exceed 1"):
        RopeConfig(theta=1.0)
    with pytest.raises(InputError, match="factor=0.5 must be at least 1"):
        RopeScaling(kind="linear", factor=0.5)
    with pytest.raises(InputError, match=r"high_freq_factor=1.0 must exceed low_freq_factor=1.0"):
        RopeScaling(kind="llama3", factor=2.0, high_freq_factor=1.0)
