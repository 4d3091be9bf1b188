"""The gated feed-forward block in plain jax.numpy: the meaning of the kernel.

Dimensions: D embed, F ffn.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
}


def gated_mlp_reference(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, *, activation: str) -> jax.Array:
    """(..., D) in x's dtype; arguments as in api.py, already validated."""
    multiply = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    gate, up, down = (w.astype(x.dtype) for w in (gate, up, down))
    hidden = ACTIVATIONS[activation](multiply(x, gate)) * multiply(x, up)
    return multiply(hidden.astype(x.dtype), down).astype(x.dtype)
