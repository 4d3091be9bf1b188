"""Products of activations with compressed weights on a GPU: all but how a weight is read, which each format brings.

A format cuts the contraction into units of E consecutive positions that it decodes together: a word of int4 has 8, an
N:4 group has 4, int8 has 1. For a block of units it gives E matrices (units, columns), one for every position; each is
multiplied by the activations of that position, so that nothing is ever interleaved on the chip, which Triton is bad at.
The activations come as (E, R, U) for that: one cheap copy of what is small against the weight, or is used often.

Where blocks of columns choose which E activations of a unit they take (`Chosen`), the activations come as (D, R), and a
program loads those that its block chose: a row of R numbers each, from the second cache.

Weights are read once for every block of rows, packed, and decoded in registers. Where rows are few (decoding) and
columns do not fill the chip, the contraction is split over programs, whose float32 parts are added after them.

Dimensions: D contraction = U units of E positions, F output, R rows, g positions that share a scale, V columns of a
block that choose together.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hsai_kernels.block_product import multiply
from hsai_kernels.interpret import is_interpreting_gpu
from hsai_kernels.triton_blocks import check_block, fit_block, index_matrix, load_matrix, load_transposed
from hsai_kernels.tuning import FEW_ROWS, Sides, choose_tile, name_product_shape

PROGRAMS = 256
"""How many programs fill a GPU of about 100 processors: no more splits than that takes."""

BLOCKS_A_SPLIT = 4
"""Fewer blocks of units than this are not worth a program of their own, and a partial result."""

Reader = Callable[[tuple[jax.Array, ...], jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, ...]]
"""From the weight's arrays, units (u,), columns (f,) and which of their pairs there are, (u, f) or None for all: E
matrices (u, f), numbers without scale. What is not there counts as zero: the activations are zero there."""

Finder = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]
"""From choices, units (u,), which of them there are, (u,), and the number of a block of columns: E positions (u,) of
activations, each among the D for units that there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which activations each block of V columns takes: E of every `span` that a unit of its weight stands for."""

    choices: jax.Array
    """(..., F/V), whatever `find` reads."""
    span: int
    find: Finder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductTile:
    """How a product is cut: rows, columns and contracted units a block, warps a block, and pipeline stages."""

    rows: int
    columns: int
    units: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "units"):
            check_block(name, getattr(self, name))


TILES: Mapping[tuple[str, int], ProductTile] = {
    ("bfloat16", 1): ProductTile(rows=128, columns=128, units=64, warps=8, stages=3),
    ("bfloat16", 4): ProductTile(rows=64, columns=128, units=16, warps=8),
    ("bfloat16", 8): ProductTile(rows=64, columns=64, units=16, warps=4),
    ("float32", 1): ProductTile(rows=32, columns=64, units=32, warps=8),
    ("float32", 4): ProductTile(rows=32, columns=64, units=16, warps=8),
    ("float32", 8): ProductTile(rows=32, columns=64, units=16, warps=8),
}
"""By E and the wider dtype of activations and floating values. Chosen so that on an A100 and an H100 operands fit the
shared memory and nothing spills from registers (tests/kernels/test_aot.py), and not yet by time: no GPU was there."""


def choose_product_tile(
    kernel: str, positions: int, units: int, x: jax.Array, values: jax.Array, columns: int, scale: jax.Array | None
) -> ProductTile:
    """A tile for x (R, D) times `values` (.., F), of whose F `columns` lie side by side; other arguments as below.

    Raises NotImplementedError if the chip's compiler is known to refuse it.
    """
    rows, contraction = x.shape
    groups = None if scale is None else scale.shape[0]
    # Float32 values take a float32's registers, whatever the activations are.
    wider = "float32" if values.dtype == jnp.float32 else x.dtype.name
    own, units = TILES[wider, positions], contraction // positions
    return fit_product_tile(kernel, own, x.dtype, (rows, contraction, columns), groups, units)


def fit_product_tile(
    kernel: str,
    own: ProductTile,
    dtype: jax.typing.DTypeLike,
    sizes: tuple[int, int, int],
    groups: int | None,
    units: int,
) -> ProductTile:
    """A tile for R, D, F = `sizes`, cut to them and to `units`; of `groups` of scales, if any. Raises as above."""
    rows, contraction, columns = sizes
    if rows <= FEW_ROWS:
        # Programs are narrow, so that there are many.
        own = dataclasses.replace(own, columns=64, warps=4)

    def fit(sides: Sides) -> Sides:
        return {
            **sides,
            "rows": fit_block(sides["rows"], rows),
            "columns": fit_block(sides["columns"], columns),
            "units": fit_block(sides["units"], units),
        }

    shape = name_product_shape(rows, contraction, groups)
    return ProductTile(**choose_tile(kernel, dtype=dtype, shape=shape, own=dataclasses.asdict(own), fit=fit))


def multiply_compressed(
    kernel: str,
    read: Reader,
    positions: int,
    x: jax.Array,
    weight: tuple[jax.Array, ...],
    scale: jax.Array | None,
    columns: int,
    tile: ProductTile | None = None,
    chosen: Chosen | None = None,
) -> jax.Array:
    """(R, F) = x (R, D) @ weight in x's dtype, summed in float32.

    Args:
      kernel: name of the API and of the weight's format, for tiles.
      read: how the format reads its `weight`.
      positions: E; divides D, and D/G where there are scales. Of what is chosen, the span of a unit does.
      scale: (G, F) or None.
      columns: F.
      tile: for tests; None for `choose_product_tile`.
      chosen: None where all columns take all activations.
    """
    rows, contraction = x.shape
    units = contraction // (positions if chosen is None else chosen.span)
    width = columns if chosen is None else columns // chosen.choices.shape[-1]
    if tile is None:
        tile = choose_product_tile(kernel, positions, units, x, weight[0], width, scale)
    unit_blocks = pl.cdiv(units, tile.units)
    # No tile has columns of two blocks that choose.
    grid = (columns // width * pl.cdiv(width, tile.columns), pl.cdiv(rows, tile.rows))
    splits = 1
    if grid[1] == 1:
        splits = max(1, min(pl.cdiv(unit_blocks, BLOCKS_A_SPLIT), PROGRAMS // grid[0]))
    find, choices = (None, ()) if chosen is None else (chosen.find, (chosen.choices,))
    ordered = x.reshape(rows, units, positions).transpose(2, 0, 1) if chosen is None else x.T
    operands = (ordered, choices, weight, () if scale is None else (scale,))
    leaves = jax.tree.leaves(operands)
    out = pl.pallas_call(
        functools.partial(_multiply_kernel, read, find, units, width, tile, pl.cdiv(unit_blocks, splits)),
        grid=(*grid, splits),
        out_shape=jax.ShapeDtypeStruct((splits, rows, columns), x.dtype if splits == 1 else jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * units * positions * columns,
            transcendentals=0,
            bytes_accessed=sum(leaf.nbytes for leaf in leaves) + rows * columns * x.dtype.itemsize,
        ),
        interpret=is_interpreting_gpu(),
        name="multiply_compressed",
    )(*operands)
    return out[0] if splits == 1 else jnp.sum(out, axis=0).astype(x.dtype)


def _multiply_kernel(
    read: Reader,
    find: Finder | None,
    units: int,
    width: int,
    tile: ProductTile,
    blocks_a_split: int,
    x_ref: jax.Array,
    choice_refs: tuple[jax.Array, ...],
    weight_refs: tuple[jax.Array, ...],
    scale_refs: tuple[jax.Array, ...],
    out_ref: jax.Array,
) -> None:
    """One block of rows and columns, over one split of the units; programs (column blocks, row blocks, splits)."""
    _, rows, columns = out_ref.shape
    split, tiles = pl.program_id(2), pl.cdiv(width, tile.columns)
    block = jnp.int32(0) if find is None else jax.lax.div(pl.program_id(0), jnp.int32(tiles))
    # Where tiles fill blocks, columns start at a multiple of a tile's, and the compiler sees it.
    first = pl.program_id(0) * tile.columns - block * (tiles * tile.columns - width)
    column = first + jnp.arange(tile.columns, dtype=jnp.int32)
    row = pl.program_id(1) * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    there = column < (block + 1) * width
    ragged = units % tile.units != 0 or width % tile.columns != 0

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        unit = index * tile.units + jnp.arange(tile.units, dtype=jnp.int32)
        inside = (row < rows)[:, None] & (unit < units)[None, :]
        real = (unit < units)[:, None] & there[None, :] if ragged else None
        by_unit, by_block = _load_scales(scale_refs, tile, units, unit, index, column, real)
        places = None if find is None else find(choice_refs[0], unit, unit < units, block)
        part = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        for position, numbers in enumerate(read(weight_refs, unit, column, real)):
            if places is None:
                x = load_matrix(x_ref, row, unit, inside, lead=(position,))
            else:
                x = load_transposed(x_ref, row, places[position], inside)
            if by_unit is not None:
                numbers = numbers * by_unit
            part += multiply(x, numbers.astype(jnp.float32).astype(x.dtype))
        return total + (part if by_block is None else part * by_block)

    upper = jnp.minimum((split + 1) * blocks_a_split, pl.cdiv(units, tile.units))
    start = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = jax.lax.fori_loop(split * blocks_a_split, upper, add, start)
    inside = (row < rows)[:, None] & there[None, :]
    plgpu.store(out_ref.at[(split, *index_matrix(row, column))], total.astype(out_ref.dtype), mask=inside)


def _load_scales(
    scale_refs: tuple[jax.Array, ...],
    tile: ProductTile,
    units: int,
    unit: jax.Array,
    index: jax.Array,
    column: jax.Array,
    real: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Scales of a block, float32: of every unit (u, f), to be multiplied into the weight, or, where all units share
    them, (1, f) for the product. The weight's integers are then exact in bfloat16, and scaled once."""
    if not scale_refs:
        return None, None
    (scale_ref,) = scale_refs
    a_group = units // scale_ref.shape[0]
    if a_group != units and a_group % tile.units:
        return load_matrix(scale_ref, jax.lax.div(unit, jnp.int32(a_group)), column, real).astype(jnp.float32), None
    group = jax.lax.div(index * tile.units, jnp.int32(a_group))
    at = scale_ref.at[group, column]
    scales = plgpu.load(at) if real is None else plgpu.load(at, mask=column < scale_ref.shape[1], other=0)
    return None, scales.astype(jnp.float32)[None, :]
