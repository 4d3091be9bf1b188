"""The factor of a Gram matrix: what it is, how it is damped, and what has none."""

import jax.numpy as jnp
import numpy as np
import pytest

from hsai.compress.factor import factorize
from tests.compress.problems import draw


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    _, gram, _ = draw(0, 48, 1)
    upper, share = factorize(jnp.asarray(gram), 0.01)
    assert share == 0.01
    mean = np.trace(gram.astype(np.float64)) / 48
    wanted = np.linalg.inv(gram.astype(np.float64) / mean + 0.01 * np.eye(48))
    upper = np.asarray(upper, np.float64)
    assert np.allclose(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


def test_damping_rises_until_there_is_a_factor() -> None:
    """A matrix that is not positive: no activations give it, but rounding in float32 does."""
    gram = np.eye(16, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = 1.05
    upper, share = factorize(jnp.asarray(gram), 0.001)
    assert share == pytest.approx(0.1) and bool(jnp.all(jnp.isfinite(upper)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gram_matrix_that_is_not_finite_is_refused(value: float) -> None:
    gram = np.eye(4, dtype=np.float32)
    gram[1, 2] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        factorize(jnp.asarray(gram), 0.01)


def test_a_matrix_without_a_factor_is_refused_with_the_last_damping_that_was_tried() -> None:
    gram = np.eye(4, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = 1e6
    for damping, message in ((0.01, "a damping of 10 times"), (0.03, "a damping of 3 times"), (2.0, "of 2 times")):
        with pytest.raises(FloatingPointError, match=f"no Cholesky factor with .*{message} its mean"):
            factorize(jnp.asarray(gram), damping)
    with pytest.raises(FloatingPointError, match="a damping of 20 times the Gram matrix's mean is above 10"):
        factorize(jnp.eye(4), 20.0)
