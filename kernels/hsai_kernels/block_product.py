"""The product of two blocks inside of a kernel, on any accelerator: float32, and exact to it, or of integers."""

import jax
import jax.numpy as jnp


def multiply(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """float32 product over an axis of each. Float32 operands are not rounded, to bfloat16 (TPU) or TF32 (GPU)."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def multiply_integers(a: jax.Array, b: jax.Array) -> jax.Array:
    """int32 (m, n) = a (m, k) @ b (k, n) of int8: exact, if the accelerator adds integers (tpu_rounded.py)."""
    axes = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.int32)
