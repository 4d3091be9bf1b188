"""What the TPU kernels (Pallas, Mosaic) share: the sizes of a chip that blocks are cut to, and rows of whole tiles.

Dimensions: R rows.
"""

import jax
import jax.numpy as jnp

from hsai_kernels.tuning import choose_tile

LANES = 128
"""Elements of a tile's last dimension."""

TILE_ROWS = 16
"""Rows of a bfloat16 tile, and of two float32 ones."""

FAST_MEMORY = 48 * 2**20
"""Bytes of VMEM that blocks may fill; 7x, which has least of the chips since v5e, has 64 MiB."""

MEMORY_LIMIT = 60 * 2**20
"""What the compiler may use, with its own temporaries."""


SPLIT_BYTES = 8
"""Beside each element of an operand of an exact float32 product: the bfloat16 parts that the compiler multiplies, which
it may keep in fast memory. As libtpu 0.0.42 reports of v5p where they do not fit; often it needs less."""

SPLIT_MEMORY = 56 * 2**20
"""Bytes that blocks and such parts together may fill."""


def fits(held: int, split: int, itemsize: int) -> bool:
    """Whether fast memory has room for blocks of `held` bytes; `split` elements of them are operands of products, which
    are float32 if `itemsize` is 4."""
    return held <= FAST_MEMORY and (itemsize < 4 or held + SPLIT_BYTES * split <= SPLIT_MEMORY)


def round_rows(rows: int) -> int:
    """`rows` up to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


def pad_rows(x: jax.Array, block: int) -> jax.Array:
    """(R, F) with rows of zeros behind it, up to whole blocks."""
    return jnp.pad(x, ((0, -x.shape[0] % block), (0, 0)))


def choose_sides(kernel: str, x: jax.Array, own: dict[str, int]) -> tuple[int, int]:
    """The two sides of a block of a kernel over x (..., D), whose blocks hold all of D: tuned ones, or its `own`.

    Raises NotImplementedError if the chip's compiler is known to refuse them.
    """
    first, second = choose_tile(kernel, dtype=x.dtype, shape=f"D {x.shape[-1]}", own=own).values()
    return first, second
