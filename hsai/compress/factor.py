"""The factor that error feedback runs on: U, upper triangular, with U^T U = (H + damping)^-1.

H = X^T X is what calibration gathers. Of it only the damped inverse matters, and of that only its Cholesky factor:
row i of U says how the rows behind i make up for an error in row i (2210.17323, section 3.3). It is got without ever
forming the inverse: with H = R R^T for an upper triangular R (a Cholesky factor read from the far end), U = R^-1.
"""

import jax
import jax.numpy as jnp

MOST_DAMPING = 10.0
"""Beyond this share of the mean of H's diagonal, feedback is as good as none, and something is wrong with H."""

DEAD = 1e-12
"""What stands on the diagonal for a position that calibration never excited, as a share of the mean of the others."""


def factorize(gram: jax.Array, damping: float) -> tuple[jax.Array, float]:
    """U (D, D) float32 of H = gram (D, D), and the damping that it took.

    Positions that calibration never excited (a zero on the diagonal) get next to nothing in its place: they neither
    give nor take corrections, are the first to be pruned, and leave the choice of scales to the others. Where none was
    excited, all are alike.

    Args:
      gram: X^T X, symmetric, float32.
      damping: share of the mean of the diagonal that is added to it; raised tenfold until a factor exists.
    Raises:
      FloatingPointError: gram is not finite, damping is above MOST_DAMPING, or none up to there gives a factor.
    """
    if not bool(jnp.all(jnp.isfinite(gram))):
        raise FloatingPointError("the Gram matrix of the activations is not finite")
    if damping > MOST_DAMPING:
        raise FloatingPointError(f"a damping of {damping:g} times the Gram matrix's mean is above {MOST_DAMPING:g}")
    share = damping
    while True:
        upper = _factorize(gram, jnp.float32(share))
        if bool(jnp.all(jnp.isfinite(upper))):
            return upper, share
        if 10.0 * share > MOST_DAMPING:
            raise FloatingPointError(
                f"the Gram matrix has no Cholesky factor with a damping of {share:g} times its mean"
            )
        share *= 10.0


@jax.jit
def _factorize(gram: jax.Array, share: jax.Array) -> jax.Array:
    diagonal = jnp.diagonal(gram)
    alive = diagonal > 0
    mean = jnp.where(jnp.any(alive), jnp.sum(diagonal) / jnp.maximum(jnp.sum(alive), 1), 1.0)
    # A matrix of order one: its factor neither overflows nor underflows, and U's scale cancels out of the feedback.
    damped = gram / mean + jnp.diag(jnp.where(alive, share, jnp.where(jnp.any(alive), DEAD, 1.0)))
    reversed_lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    upper = reversed_lower[::-1, ::-1]
    identity = jnp.eye(gram.shape[0], dtype=jnp.float32)
    inverse: jax.Array = jax.scipy.linalg.solve_triangular(upper, identity, lower=False)
    return inverse
