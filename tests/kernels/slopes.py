"""Gradients of a kernel against finite differences of its float64 oracle, along random directions."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tests.kernels.tolerances import assert_close


def check_slopes(
    kernel: Callable[..., jax.Array], oracle: Callable[..., np.ndarray], operands: Sequence[jax.Array]
) -> None:
    """Fails unless, for each of the float32 `operands`, the kernel's gradient predicts how its oracle changes."""
    rng = np.random.default_rng(7)
    exact = [np.asarray(a, np.float64) for a in operands]
    weights = rng.standard_normal(oracle(*exact).shape)
    gradients = jax.grad(lambda *a: jnp.sum(kernel(*a) * weights), tuple(range(len(operands))))(*operands)
    step = 1e-5
    for index, gradient in enumerate(gradients):
        assert gradient.dtype == operands[index].dtype
        direction = rng.standard_normal(exact[index].shape)
        high, low = (
            np.sum(oracle(*exact[:index], exact[index] + sign * step * direction, *exact[index + 1 :]) * weights)
            for sign in (1.0, -1.0)
        )
        slope = np.sum(np.asarray(gradient, np.float64) * direction)
        # The oracle's own error is about step**2; the gradient's is float32 rounding over its terms.
        magnitude = np.sum(np.abs(np.asarray(gradient, np.float64) * direction)) + 10.0
        assert_close(slope, np.asarray((high - low) / (2 * step)), magnitude, "float32")
