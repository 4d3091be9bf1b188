"""Products of activations rounded to int8 with integers, on a GPU: Pallas Triton, on its tensor cores for integers.

Triton multiplies int8 by int8 into int32 on them: mma.sync m16n8k32, on an H100 wgmma k32 where there are 64 rows, as
its PTX says. Sums of integers end with every group of a scale, so that a block of the contraction lies in one group;
groups that blocks do not divide end in a block that is partly masked. Codes of few bits are decoded by their position,
and not by words as in gpu_product.py, whose order would spread a group over eight products: a word is loaded again for
each of its codes, from the first cache.

What this can bring is for prefill with a scale a column, or groups of hundreds: these tensor cores are twice as fast as
those for bfloat16. Against that, they want a column's positions side by side, and Triton turns the weight's blocks for
them byte by byte, through the shared memory; and every group costs a conversion, two multiplications and an addition
for each result, with groups of 32 an eighth of an operation a term. Decoding reads the same bytes of the weight.
Nothing of it was measured: no GPU was there.

Where rows are few, the contraction is split over programs as in gpu_product.py: by groups, whose float32 sums are added
after them, or, if there is one, by blocks, into int32 parts, so that its sum is exact in any case.

Dimensions: R rows, D contraction, F output, G groups of g positions that share a scale.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hsai_kernels.block_product import multiply_integers
from hsai_kernels.gpu_product import BLOCKS_A_SPLIT, PROGRAMS, ProductTile, fit_product_tile
from hsai_kernels.interpret import is_interpreting_gpu
from hsai_kernels.ops.quantized_matmul.rounded import Levels, widen_scale
from hsai_kernels.triton_blocks import index_matrix, load_elements, load_matrix

SMALLEST_DEPTH = 32
"""Positions that one integer instruction of the tensor cores multiplies."""

TILES: Mapping[str, ProductTile] = {
    "int8, a scale a column": ProductTile(rows=128, columns=128, units=64, warps=8, stages=3),
    "int8": ProductTile(rows=64, columns=128, units=64, warps=8, stages=3),
    "words": ProductTile(rows=64, columns=64, units=64),
}
"""By what values are; a unit is a position. Chosen as those in gpu_product.py: nothing spills from registers."""


def multiply_on_gpu(
    kernel: str,
    levels: Levels | None,
    tile: ProductTile | None,
    codes: jax.Array,
    step: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """The kernel that `rounded.multiply_rounded` wants, after `kernel` (its name for tiles), `levels` and `tile` (for
    tests; None for its own)."""
    (rows, contraction), (groups, columns) = codes.shape, scale.shape
    group = contraction // groups
    if tile is None:
        one = values.dtype == jnp.int8 and groups == 1
        own = TILES["words" if values.dtype == jnp.uint32 else "int8, a scale a column" if one else "int8"]
        sizes = (rows, contraction, columns)
        tile = fit_product_tile(kernel, own, dtype, sizes, groups, max(SMALLEST_DEPTH, group))
    blocks = pl.cdiv(group, tile.units)
    grid = (pl.cdiv(columns, tile.columns), pl.cdiv(rows, tile.rows))
    pieces = blocks if groups == 1 else groups
    splits = 1
    if grid[1] == 1:
        splits = max(1, min(pieces, pl.cdiv(groups * blocks, BLOCKS_A_SPLIT), PROGRAMS // grid[0]))
    a_split = pl.cdiv(pieces, splits)
    splits = pl.cdiv(pieces, a_split)
    # A sum of integers that several programs share is scaled after them.
    shared = splits > 1 and groups == 1
    scales = () if shared else (step, scale)
    part = dtype if splits == 1 else jnp.int32 if shared else jnp.float32
    out = pl.pallas_call(
        functools.partial(_multiply_kernel, levels, tile, group, a_split),
        grid=(*grid, splits),
        out_shape=jax.ShapeDtypeStruct((splits, rows, columns), part),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * contraction * columns,
            transcendentals=0,
            bytes_accessed=sum(array.nbytes for array in (codes, values, *scales)) + rows * columns * dtype.itemsize,
        ),
        interpret=is_interpreting_gpu(),
        name="multiply_rounded",
    )(codes, values, scales)
    if splits == 1:
        return out[0]
    total = jnp.sum(out, axis=0)
    return (total.astype(jnp.float32) * step * widen_scale(levels, scale) if shared else total).astype(dtype)


def _multiply_kernel(
    levels: Levels | None,
    tile: ProductTile,
    size: int,
    a_split: int,
    codes_ref: jax.Array,
    values_ref: jax.Array,
    scale_refs: tuple[jax.Array, ...],
    out_ref: jax.Array,
) -> None:
    """One block of rows and columns, over one split of the groups of `size` positions, `a_split` of them; or, without
    scales, of the blocks of the only group. Programs (column blocks, row blocks, splits)."""
    (rows, contraction), columns = codes_ref.shape, out_ref.shape[2]
    groups, blocks = contraction // size, pl.cdiv(size, tile.units)
    split = pl.program_id(2)
    column = pl.program_id(0) * tile.columns + jnp.arange(tile.columns, dtype=jnp.int32)
    row = pl.program_id(1) * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    ragged = size % tile.units != 0 or columns % tile.columns != 0

    def add_block(group: jax.Array | int, block: jax.Array | int, total: jax.Array) -> jax.Array:
        place = block * tile.units + jnp.arange(tile.units, dtype=jnp.int32)
        position = group * size + place
        inside = (row < rows)[:, None] & (place < size)[None, :]
        real = (place < size)[:, None] & (column < columns)[None, :] if ragged else None
        x = load_matrix(codes_ref, row, position, inside)
        return total + multiply_integers(x, _load_levels(levels, values_ref, position, column, real))

    def add_blocks(group: jax.Array | int, start: jax.Array | int, stop: jax.Array | int) -> jax.Array:
        zeros = jnp.zeros((tile.rows, tile.columns), jnp.int32)
        if blocks == 1:
            return add_block(group, 0, zeros)
        return jax.lax.fori_loop(start, stop, functools.partial(add_block, group), zeros)

    def add_group(group: jax.Array, total: jax.Array) -> jax.Array:
        step_ref, scale_ref = scale_refs
        step = plgpu.load(step_ref.at[row, group], mask=row < rows, other=0)
        scale = widen_scale(levels, plgpu.load(scale_ref.at[group, column], mask=column < columns, other=0))
        return total + add_blocks(group, 0, blocks).astype(jnp.float32) * step[:, None] * scale[None, :]

    start, stop = split * a_split, jnp.minimum((split + 1) * a_split, groups if scale_refs else blocks)
    if scale_refs:
        total = jax.lax.fori_loop(start, stop, add_group, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    else:
        total = add_blocks(0, start, stop)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    plgpu.store(out_ref.at[(split, *index_matrix(row, column))], total.astype(out_ref.dtype), mask=inside)


def _load_levels(
    levels: Levels | None, ref: jax.Array, position: jax.Array, column: jax.Array, real: jax.Array | None
) -> jax.Array:
    """int8 (k, f): the weight's integers at positions (k,) of columns (f,). What is not `real` (k, f) may be any: the
    activations are zero there, or the column is not stored."""
    if levels is None:
        return load_matrix(ref, position, column, real)
    codes = load_elements(ref, levels.bits, position, column, real)
    return ((2 * codes if levels.doubled else codes) - levels.zero).astype(jnp.int8)
