"""Gradients of a kernel against those of its float64 oracle, and these against its finite differences."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tests.kernels.tolerances import assert_close


def check_slopes(
    kernel: Callable[..., jax.Array],
    oracle: Callable[..., np.ndarray],
    pull: Callable[..., list[tuple[np.ndarray, np.ndarray]]],
    operands: Sequence[jax.Array],
) -> None:
    """`check_gradients` of a kernel's, for weights of its results that are drawn.

    `pull` gives the gradients of float64 operands and weights of the results, with the magnitudes of their terms.
    """
    shape = oracle(*(np.asarray(a, np.float64) for a in operands)).shape
    weights = np.random.default_rng(7).standard_normal(shape)
    gradients = jax.grad(lambda *a: jnp.sum(kernel(*a) * weights), tuple(range(len(operands))))(*operands)
    check_gradients(gradients, oracle, pull, operands, weights)


def check_gradients(
    gradients: Sequence[jax.Array],
    oracle: Callable[..., np.ndarray],
    pull: Callable[..., list[tuple[np.ndarray, np.ndarray]]],
    operands: Sequence[jax.Array],
    weights: np.ndarray,
) -> None:
    """Fails unless `gradients` of the results times `weights`, to each of the float32 `operands`, are the oracle's.

    And unless these are how the oracle changes. `pull` as in `check_slopes`.
    """
    exact = [np.asarray(a, np.float64) for a in operands]
    pulled = pull(*exact, weights)
    for gradient, operand, (value, magnitude) in zip(gradients, operands, pulled, strict=True):
        assert gradient.dtype == operand.dtype
        assert_close(gradient, value, magnitude, "float32")
    rng, step = np.random.default_rng(8), 1e-5
    for index, (value, magnitude) in enumerate(pulled):
        direction = rng.standard_normal(value.shape)
        moved = [[a + sign * step * direction if i == index else a for i, a in enumerate(exact)] for sign in (1, -1)]
        high, low = (np.sum(oracle(*m) * weights) for m in moved)
        # A central difference of float64 is off by about step**2 of the terms.
        terms = np.sum(magnitude * np.abs(direction))
        assert abs(np.sum(value * direction) - (high - low) / (2 * step)) <= step**2 * terms
