"""Products of activations rounded to int8 with integers, on a TPU: Pallas, Mosaic, on its matrix unit for integers.

v5e, v5p and v6e multiply int8 by int8 into int32, twice as many a second as bfloat16. For a 7x, whose matrix unit has
no integers, Mosaic takes both sides as bfloat16 and converts a float32 sum: exact below 2**24, and so no product here
adds more than 1024 terms before its sum becomes an integer (128 * 127 * 1024 is less).

Sums of integers end with every group of a scale. A group of whole pieces (128 positions, of 3 bits 256) has products of
its own; with one scale a column, the int32 sums of all blocks are scaled at the end. Smaller groups, or ragged ones,
would leave most of the matrix unit's depth idle, and cut tiles. There a product is over a span of U whole groups
instead, and has every row of activations U times, each with zeros but in one group: the unit passes as often, and the
weight's side stays whole.

Words of codes become integers four at a time: a shift and a mask leave one in each byte of a word, three operations on
words take the code of zero off all four, and the bytes of words (W, F) are, as they lie in registers, the rows (4 W, F)
of int8. That is a little over one operation an element. Those rows are not in order: the activations are brought into
theirs instead, a piece at a time, so that groups of whole pieces and spans stay what they are.

What libtpu 0.0.42 schedules for a v5e, counted and not measured: for 512 rows, 1024 positions and 512 columns about
2,900 bundles, of which the matrix unit needs 2,048, whether int8 or int4, with a scale a column or groups of 128; the
kernels of bfloat16 take 4,000 for int8 and 4,700 for int4. With groups of 32, 128 rows take as many: 2.4 times more
than bfloat16. Of int4 with groups of 32, 8 rows take 500, and 900 with bfloat16.

Dimensions: R rows, D contraction, F output, G groups of g positions that share a scale, U groups a span, W words, or of
3 bits triples of words, each of T times 4 codes, a piece.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hsai_kernels.block_product import multiply_integers
from hsai_kernels.mosaic import LANES, MEMORY_LIMIT
from hsai_kernels.ops.quantized_matmul.rounded import Levels, widen_scale
from hsai_kernels.ops.quantized_matmul.tpu_product import LARGEST_BLOCK, SUBLANES, load_strided
from hsai_kernels.packing import count_elements, unfold_triple
from hsai_kernels.tuning import Sides, choose_tile, name_product_shape

DEEPEST = 1024
"""Terms that a product may add as float32."""
INT8_ROWS = 32
"""Of a tile of int8."""
MOST_GROUPS = 16
"""U: more copies of the activations than this are no block of rows any more."""
EVERY_BYTE = 0x01010101
"""Times a number below 256: it in each byte of a word."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedPlan:
    """The blocks of a product."""

    rows: int
    columns: int
    contraction: int
    span: int
    """Positions of a product: of one group, or of U of them."""
    group: int
    """Positions that share a scale: all of the padded contraction, if there is one scale a column."""

    @property
    def copies(self) -> int:
        """U."""
        return max(1, self.span // self.group)


def find_piece(bits: int) -> int:
    """Positions that are put in order together: they fill tiles of the activations, their words tiles of 32 bits."""
    return LANES if bits == 8 else math.lcm(LANES, count_elements(bits) * SUBLANES)


def plan_rounded(
    bits: int, rows: int, contraction: int, columns: int, groups: int, largest: Sides = LARGEST_BLOCK
) -> RoundedPlan:
    """The blocks of a product, of at most `largest` sides.

    Raises NotImplementedError for groups that no block holds whole, or whose spans hold too many.
    """
    piece, group = find_piece(bits), contraction // groups
    deepest = 4 * LARGEST_BLOCK["contraction"]
    step = piece if groups == 1 else math.lcm(piece, group)
    if step > deepest:
        raise NotImplementedError(f"has scale groups that divide blocks of up to {deepest} positions, not of {group}")
    count = pl.cdiv(contraction, max(largest["contraction"], step))
    depth = pl.cdiv(pl.cdiv(contraction, count), step) * step
    span = depth if groups == 1 else step
    copies = 1 if groups == 1 else span // group
    if copies > MOST_GROUPS:
        raise NotImplementedError(f"has up to {MOST_GROUPS} scale groups in {span} positions, not groups of {group}")
    row_blocks = pl.cdiv(rows, max(INT8_ROWS, largest["rows"] // copies))
    # Where one block has all rows, it need not end with a tile.
    multiple = SUBLANES if row_blocks == 1 else INT8_ROWS
    return RoundedPlan(
        rows=pl.cdiv(pl.cdiv(rows, row_blocks), multiple) * multiple,
        columns=min(pl.cdiv(columns, LANES) * LANES, largest["columns"]),
        contraction=depth,
        span=span,
        group=count * depth if groups == 1 else group,
    )


def multiply_on_tpu(
    kernel: str,
    levels: Levels | None,
    codes: jax.Array,
    step: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """The kernel that `rounded.multiply_rounded` wants, after `kernel` (its name for tiles) and `levels`.

    Raises NotImplementedError for what it does not support.
    """
    (rows, contraction), (groups, columns) = codes.shape, scale.shape
    bits = 8 if levels is None else levels.bits
    sides = choose_tile(
        kernel,
        dtype=dtype,
        shape=name_product_shape(rows, contraction, groups),
        own=LARGEST_BLOCK,
        fit=lambda sides: dataclasses.asdict(plan_rounded(bits, rows, contraction, columns, groups, sides)),
    )
    plan = RoundedPlan(**sides)
    padding = (0, -rows % plan.rows), (0, -contraction % plan.contraction)
    ordered = _order_pieces(bits, jnp.pad(codes, padding))
    grid = (ordered.shape[0] // plan.rows, pl.cdiv(columns, plan.columns), ordered.shape[1] // plan.contraction)
    steps = _split_groups(plan, jnp.pad(step, ((0, ordered.shape[0] - rows), (0, 0))).T, grid[2]).swapaxes(1, 2)
    scales = _split_groups(plan, widen_scale(levels, scale), grid[2])
    shared = grid[2] // scales.shape[0]
    operands: list[jax.Array] = [ordered, steps, values, scales]
    specs = [
        pl.BlockSpec((plan.rows, plan.contraction), lambda r, f, d: (r, d)),
        pl.BlockSpec((1, plan.rows, steps.shape[2]), lambda r, f, d: (d // shared, r, 0)),
        pl.BlockSpec((_count_rows(bits, plan.contraction), plan.columns), lambda r, f, d: (d, f)),
        pl.BlockSpec((1, scales.shape[1], plan.columns), lambda r, f, d: (d // shared, 0, f)),
    ]
    if plan.copies > 1:
        operands.append(_order_pieces(bits, jnp.arange(plan.span, dtype=jnp.int32)[None, :]) // plan.group)
        specs.append(pl.BlockSpec((1, plan.span), lambda r, f, d: (0, 0)))
    scratch = [pltpu.VMEM((plan.rows, plan.columns), jnp.int32 if groups == 1 else jnp.float32)]
    if bits == 3:
        scratch.append(pltpu.VMEM((_count_rows(bits, find_piece(bits)), LANES), values.dtype))
    out = pl.pallas_call(
        functools.partial(_multiply_block, levels, plan, groups == 1),
        grid=grid,
        in_specs=specs,
        out_specs=pl.BlockSpec((plan.rows, plan.columns), lambda r, f, d: (r, f)),
        out_shape=jax.ShapeDtypeStruct((ordered.shape[0], columns), dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * ordered.size * columns,
            transcendentals=0,
            bytes_accessed=grid[1] * (ordered.nbytes + steps.nbytes)
            + grid[0] * (values.nbytes + scales.nbytes)
            + ordered.shape[0] * columns * dtype.itemsize,
        ),
        name="quantized_matmul",
    )(*operands)
    return out[:rows]


def _count_rows(bits: int, positions: int) -> int:
    """Rows of values that hold so many positions."""
    return positions if bits == 8 else positions * bits // 32


def _order_pieces(bits: int, array: jax.Array) -> jax.Array:
    """(n, D) of whole pieces -> (n, D): each piece's W * T * 4 columns in the order (T, W, 4) of `_load_span`."""
    if bits == 8:
        return array
    elements = count_elements(bits)
    split = array.reshape(array.shape[0], -1, find_piece(bits) // elements, elements // 4, 4)
    return split.swapaxes(2, 3).reshape(array.shape)


def _split_groups(plan: RoundedPlan, by_group: jax.Array, blocks: int) -> jax.Array:
    """(blocks or 1, groups a block, n) of (G, n), with zeros behind the contraction."""
    wanted = blocks * plan.contraction // plan.group
    padded = jnp.pad(by_group, ((0, wanted - by_group.shape[0]), (0, 0)))
    return padded.reshape(-1, max(1, plan.contraction // plan.group), by_group.shape[1])


def _multiply_block(levels: Levels | None, plan: RoundedPlan, single: bool, *references: Any) -> None:
    """x (rows, contraction) by one block of the weight; references: as `operands` above, out, scratch."""
    x, step, values, scale, *rest = references
    places = rest.pop(0) if plan.copies > 1 else None
    out, total, *scratch = rest
    depth = pl.program_id(2)

    @pl.when(depth == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)

    for start in range(0, plan.contraction, plan.span):
        rows = x[:, start : start + plan.span]
        if places is not None:
            wide, at = rows.astype(jnp.int32), places[...]
            alone = [jnp.where(at == group, wide, 0) for group in range(plan.copies)]
            rows = jnp.concatenate(alone, axis=0).astype(jnp.int8)
        weight = _load_span(levels, plan, start, values, scratch)
        cuts = range(0, plan.span, DEEPEST)
        parts = [multiply_integers(rows[:, cut : cut + DEEPEST], weight[cut : cut + DEEPEST]) for cut in cuts]
        product = functools.reduce(jnp.add, parts)
        if single:
            total[...] += product
            continue
        for copy in range(plan.copies):
            group = start // plan.group + copy
            part = product[copy * plan.rows : (copy + 1) * plan.rows].astype(jnp.float32)
            total[...] += part * step[0, :, group : group + 1] * scale[0, group : group + 1, :]

    @pl.when(depth == pl.num_programs(2) - 1)
    def _() -> None:
        result = total[...].astype(jnp.float32) * step[0] * scale[0] if single else total[...]
        out[...] = result.astype(out.dtype)


def _load_span(levels: Levels | None, plan: RoundedPlan, start: int, values: Any, scratch: list[Any]) -> jax.Array:
    """int8 (span, columns): the integers of a block from position `start` on, each piece in the order (T, W, 4)."""
    if levels is None:
        return values[start : start + plan.span, :]
    piece, parts = find_piece(levels.bits), []
    for first in range(start, start + plan.span, piece):
        rows = slice(_count_rows(levels.bits, first), _count_rows(levels.bits, first + piece))
        words = _load_triples(values, rows, *scratch) if levels.bits == 3 else [values[rows, :]]
        for word, shift in itertools.product(words, range(0, 8, 4 if levels.bits == 3 else levels.bits)):
            codes = (word >> jnp.uint32(shift)) & jnp.uint32((2**levels.bits - 1) * EVERY_BYTE)
            parts.append(pltpu.bitcast(_take_levels(levels, codes), jnp.int8))
    return jnp.concatenate(parts, axis=0)


def _load_triples(values: Any, rows: slice, scratch: Any) -> list[jax.Array]:
    """Words of 4 bits (W, columns), of 8 consecutive codes each, from three rows for every four."""
    lanes = []
    for lane in range(0, values.shape[1], LANES):
        scratch[...] = values[rows, lane : lane + LANES]
        lanes.append(unfold_triple(*load_strided(scratch, 3)))
    return [jnp.concatenate(words, axis=1) for words in zip(*lanes, strict=True)]


def _take_levels(levels: Levels, codes: jax.Array) -> jax.Array:
    """uint32: the integer of each of a word's four bytes, as int8 has it, from a code in each."""
    if levels.doubled:
        codes = codes << jnp.uint32(1)
    if levels.zero == 0:
        return codes
    # The highest bit of each byte, which no code has, lends: so that none borrows from the next.
    signs = jnp.uint32(128 * EVERY_BYTE)
    return ((codes | signs) - jnp.uint32(levels.zero * EVERY_BYTE)) ^ signs
