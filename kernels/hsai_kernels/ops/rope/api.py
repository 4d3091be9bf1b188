"""`rope`: rotary position embedding of queries or keys, by angles that were turned into cosines and sines before.

There is no backend but the reference, on purpose: it is element by element, and XLA fuses it into the product before it
or the layout change behind it on every platform, so that a kernel of its own would add a read and a write of x.

Dimensions: T tokens, N heads, H head dim.
"""

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import run_kernel
from hsai_kernels.ops.rope.reference import rope_reference

BACKENDS = {"reference": rope_reference}


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Rotates element pairs (i, i + H/2) of each head by its token's angles (RoFormer, 2104.09864, eq. 34).

    Linear in x; its gradient is the rotation back. Rotating by `cos, -sin` undoes it.

    Args:
      x: (..., T, N, H), floating, H even.
      cos, sin: float32 (..., T, 1, H/2), of each token's angle with each pair.
      implementation: "reference", or None.

    Returns:
      (..., T, N, H) in x's dtype, computed in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    if x.ndim < 3 or x.shape[-1] % 2:
        raise ValueError(f"rope needs x (..., T, N, H) of an even H, got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"rope needs floating x, got {x.dtype}")
    wanted = (*x.shape[:-2], 1, x.shape[-1] // 2)
    for name, array in (("cos", cos), ("sin", sin)):
        if array.shape != wanted or array.dtype != jnp.float32:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, must be float32 {wanted}")
    return run_kernel("rope", BACKENDS, implementation, x, cos, sin)
