"""Arrays that nobody has written yet."""

import jax
import jax.numpy as jnp

from hsai_kernels import native
from hsai_kernels.dispatch import BackendMissing, list_candidates


def allocate(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of that shape and dtype whose numbers may be anything; to be called while a program is traced.

    On a CPU it costs neither time nor memory before it is written, page by page: a cache that has room for a long
    context holds what is in it. Elsewhere, and without the native library, it is zeros.
    """
    try:
        if list_candidates()[0] == "cpu":
            native.load_library()
            array: jax.Array = jax.ffi.ffi_call(native.ALLOCATE, shape, has_side_effect=True)()
            return array
    except BackendMissing:
        pass
    return jnp.zeros(shape.shape, shape.dtype)
