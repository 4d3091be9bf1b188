"""Calls of the native library's FFI targets by hand, past all that the API checks."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hsai_kernels import native

INVALID = "INVALID_ARGUMENT.*hsai_kernels"
"""What an error of the library's own says."""


def call(
    target: str, operands: Sequence[Any], shape: tuple[int, ...], dtype: Any = jnp.float32, **attributes: Any
) -> jax.Array:
    """The result, once it is there."""
    native.load_library()
    run = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, dtype))
    return jax.block_until_ready(run(*operands, **attributes))


def check_missing(
    target: str, operands: Sequence[Any], shape: tuple[int, ...], attributes: Mapping[str, Any], before: int = 0
) -> None:
    """Fails unless this call is served, and is an error without any one of its operands or attributes.

    `before`: operands in front of the arrays of a weight, for targets that take any number of weights.
    """
    assert call(target, operands, shape, **attributes).shape == shape
    count = len(operands)
    messages = (
        f"arguments: expected {count} but got {count - 1}",
        f"{INVALID}: {count - 1 - before} arrays for 1 results: a weight has {count - before}",
        f"{INVALID}: operands are matrices",  # where the arrays of a layer's weight take the place of x
    )
    for i in range(count):
        with pytest.raises(jax.errors.JaxRuntimeError, match="|".join(messages)):
            call(target, [*operands[:i], *operands[i + 1 :]], shape, **attributes)
    count = len(attributes)
    for missing in attributes:
        others = {name: value for name, value in attributes.items() if name != missing}
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"attributes: expected {count} but got {count - 1}"):
            call(target, operands, shape, **others)
