"""Rotary position embedding in plain jax.numpy: the meaning of the kernel.

Dimensions: T tokens, N heads, H head dim.
"""

import jax
import jax.numpy as jnp


def rope_reference(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """(..., T, N, H) in x's dtype; arguments as in api.py, already validated."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
