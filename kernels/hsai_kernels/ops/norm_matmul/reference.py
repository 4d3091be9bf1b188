"""RMS normalization and a projection in plain jax.numpy: the meaning of the kernel.

Dimensions: D contraction, F outputs.
"""

import jax
import jax.numpy as jnp


def norm_matmul_reference(x: jax.Array, gain: jax.Array, w: jax.Array, *, eps: float) -> jax.Array:
    """(..., F) in x's dtype; arguments as in api.py, already validated."""
    y = normalize(x, gain, eps=eps)
    return jnp.matmul(y, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def normalize(x: jax.Array, gain: jax.Array, *, eps: float) -> jax.Array:
    """(..., D) in x's dtype, computed in float32."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * gain.astype(jnp.float32)).astype(x.dtype)
