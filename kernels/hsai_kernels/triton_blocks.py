"""What the Triton kernels have in common: sizes of blocks, loads that are masked, products that are exact.

Triton's blocks are powers of two, at least 16 on every side of a product; its loads and stores check no bounds. So each
kernel masks what lies outside of its arrays, and takes no mask where, statically, nothing can.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

SMALLEST_BLOCK = 16
"""What a side of a Triton product must have."""


def fit_block(size: int, needed: int) -> int:
    """`size`, or the next power of two that holds all of `needed`."""
    return min(size, max(SMALLEST_BLOCK, pl.next_power_of_2(needed)))


def check_block(name: str, size: int) -> None:
    """Raises ValueError unless a product can have a side of `size`."""
    if size < SMALLEST_BLOCK or size & (size - 1):
        raise ValueError(f"{name}={size} is no block of Triton: valid are powers of two from {SMALLEST_BLOCK}")


def index_matrix(rows: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column of each element (r, c), from rows (r,) and columns (c,): as refs want them, of one shape."""
    shape = (rows.shape[0], columns.shape[0])
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None, :], shape)


def load_matrix(
    ref: jax.Array, rows: jax.Array, columns: jax.Array, real: jax.Array | None, *, lead: tuple[int, ...] = ()
) -> jax.Array:
    """(r, c) of a matrix, at `lead` of a stack of them; zeros where `real` (r, c) is False. None: all are there."""
    at = ref.at[(*lead, *index_matrix(rows, columns))]
    return plgpu.load(at) if real is None else plgpu.load(at, mask=real, other=0)
