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
    """Fails unless the kernel's gradient to each of the float32 `operands` is the oracle's, which is how it changes.

    `pull` gives that of float64 operands and weights of the results, with the magnitudes of its terms.
    """
    rng = np.random.default_rng(7)
    exact = [np.asarray(a, np.float64) for a in operands]
    weights = rng.standard_normal(oracle(*exact).shape)
    gradients = jax.grad(lambda *a: jnp.sum(kernel(*a) * weights), tuple(range(len(operands))))(*operands)
    pulled = pull(*exact, weights)
    for gradient, operand, (value, magnitude) in zip(gradients, operands, pulled, strict=True):
        assert gradient.dtype == operand.dtype
        assert_close(gradient, value, magnitude, "float32")
    step = 1e-5
    for index, (value, magnitude) in enumerate(pulled):
        direction = rng.standard_normal(exact[index].shape)
        high, low = (
            np.sum(oracle(*exact[:index], exact[index] + sign * step * direction, *exact[index + 1 :]) * weights)
            for sign in (1.0, -1.0)
        )
        # A central difference of float64 is off by about step**2 of the terms.
        assert abs(np.sum(value * direction) - (high - low) / (2 * step)) <= step**2 * np.sum(
            magnitude * np.abs(direction)
        )
