"""The product with a V:N:M weight on a TPU: activations are chosen in VMEM, and multiplied by an N:4 weight.

V columns take the same 4 of every m positions. So what they take of a block of x is selected once for all of them that
are among 128 columns, the width of the matrix unit, and the weight that it meets has 4 D / m rows: N:4, rebuilt by
tpu_product.py. Nothing is gathered, which neither XLA nor Mosaic do fast: x comes as m planes of groups in lanes (plane
k holds position k of every group), and the i-th that was chosen of a group is in one of planes i to m - 4 + i, by a
number in the group's lane. So it takes m - 4 selections, of two rows of bfloat16 at a time. XLA makes these numbers of
the choices, 4 bytes for each group and block, and brings x into order; both are small against the weight.

Two other ways were weighed. To rebuild all D rows takes 3 operations or more for each element of the dense weight, to
select it of the 4 that are kept, where choosing takes half of one (64:2:8, 16 rows of bfloat16). And to multiply x by
a matrix of ones and zeros costs the matrix unit as much as 512 / m dense columns for each block, which takes 128
positions to their 512 / m: of 64:2:8, as much as the dense product.

Bytes of 64:2:8, for each element of the dense weight: 0.56 in bfloat16 (dense 2), 0.22 in int4 with groups of 64 (dense
0.53), and 1/128 for the numbers above. Decoding of up to 16 rows is bound by operations all the same: of a block of
2048 x 512, libtpu 0.0.42 schedules 4,170 vector operations in 1,330 bundles for a v5e in bfloat16, and 4,860 in 1,410
in int4 (`LIBTPU_INIT_ARGS=--xla_jf_dump_to=FOLDER` has it write them; nothing was measured). At 870 bytes of HBM a
bundle that is the time of 1.1 and 1.2 bytes an element, of 2:16 with V = 128 of 0.6: so against dense bfloat16 at most
1.8, 1.7 and 3.4 times faster, and of int4 memory is what is won for certain.

Many rows are bound by the matrix unit. It is given the rows of every block that is among 128 columns, 128 / V times R,
over 4 D / m positions: for V = 128 and more that is 4 / m of the dense operations, a half of them for 2:8; for V = 64
as many as dense for 2:8, a half for 2:16; for V = 16 four times as many for 2:8. What columns have of other blocks'
choices is dropped.

Dimensions: R rows, D contraction, F output, V columns of a block that choose together, G groups of m positions a block
of the contraction, J planes of the N:4 weight, H blocks of columns that are among 128 columns.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hsai_kernels.block_product import multiply
from hsai_kernels.mosaic import LANES, TILE_ROWS
from hsai_kernels.ops.quantized_matmul.tpu_product import (
    COMPILER_PARAMS,
    Packing,
    Plan,
    bring_weight,
    build_weight,
    plan_product,
)
from hsai_kernels.ops.sparse_matmul.choices import CHOSEN, find_places, take_group
from hsai_kernels.tuning import Sides, choose_tile, name_product_shape

LARGEST_BLOCK: Sides = {"rows": 512, "columns": 512, "contraction": 1024}
"""The contraction is that of the N:4 weight."""
MOST_ACTIVATIONS = 2**21
"""Elements of a block of x, which has m / 4 positions for each of the contraction: 8 MiB of float32."""
MOST_CHOSEN = 2**21
"""Elements that all blocks of 128 columns choose together: 8 MiB of float32."""
ROWS_AT_ONCE = 64
"""Rows of x whose chosen planes are held in registers: 4 of 4 registers each in bfloat16, of 8 in float32."""
UNROLLED = 4
"""Steps of choosing that are laid out one after the other: a loop parts what the compiler would overlap."""


def plan_chosen(
    packing: Packing, m: int, held: int, rows: int, size: int, columns: int, group: int | None, largest: Sides
) -> Plan:
    """The blocks of a product with an N:4 weight of `size` rows; `group` of them share a scale, None without.

    `held` is H. Raises NotImplementedError for groups that no block holds whole.
    """
    plan = functools.partial(plan_product, packing, rows, size, columns, group, step=CHOSEN * LANES, span=m // CHOSEN)
    depth = plan(largest=largest).contraction
    most = min(largest["rows"], MOST_ACTIVATIONS * CHOSEN // (m * depth), MOST_CHOSEN // (held * depth))
    return plan(largest={**largest, "rows": max(TILE_ROWS, most // TILE_ROWS * TILE_ROWS)})


def multiply_chosen(
    kernel: str,
    packing: Packing,
    m: int,
    x: jax.Array,
    packed: tuple[jax.Array, ...],
    scale: jax.Array | None,
    choices: jax.Array,
) -> jax.Array:
    """(..., F) of x's dtype = x (..., D) @ the V:N:M weight of these arrays.

    Args:
      kernel: names the API and the weight's format, for tiles.
      packing: of the N:4 weight (4 D / m, F) that is left where choices are made.
      packed, scale, choices: as in api.py.

    Raises NotImplementedError for what it does not support.
    """
    *lead, contraction = x.shape
    rows, columns, size = math.prod(lead), packed[0].shape[1], contraction * CHOSEN // m
    if 0 in (rows, contraction, columns):
        raise NotImplementedError(f"multiplies arrays that are not empty, not x {x.shape} by {packed[0].shape}")
    width = columns // choices.shape[1]
    first, last = (np.minimum(np.arange(0, columns, LANES) + at, columns - 1) // width for at in (0, LANES - 1))
    held = int(np.max(last - first)) + 1
    groups = None if scale is None else scale.shape[0]
    plan_sides = functools.partial(
        plan_chosen, packing, m, held, rows, size, columns, None if groups is None else size // groups
    )
    sides = choose_tile(
        kernel,
        dtype=x.dtype,
        shape=name_product_shape(rows, contraction, groups),
        own=LARGEST_BLOCK,
        fit=lambda sides: dataclasses.asdict(plan_sides(sides)),
    )
    plan = Plan(**sides)
    ordered = _order_planes(plan, m, x.reshape(rows, contraction))
    deep = plan.contraction * m // CHOSEN
    grid = (ordered.shape[0] // plan.rows, pl.cdiv(columns, plan.columns), ordered.shape[1] // deep)
    tiles = plan.columns // LANES
    places = _order_places(plan, m, choices, np.pad(first, (0, grid[1] * tiles - len(first)), "edge"), held)
    weight = bring_weight(packing, plan, packed, scale, grid[2])
    out = pl.pallas_call(
        functools.partial(_multiply_block, packing, plan, m, width, size, len(weight.operands)),
        grid=grid,
        in_specs=[
            pl.BlockSpec((plan.rows, deep), lambda r, f, d: (r, d)),
            pl.BlockSpec((tiles, held, 1, deep // m), lambda r, f, d: (f, 0, 0, d)),
            *weight.specs,
        ],
        out_specs=pl.BlockSpec((plan.rows, plan.columns), lambda r, f, d: (r, f)),
        out_shape=jax.ShapeDtypeStruct((ordered.shape[0], columns), x.dtype),
        scratch_shapes=[
            pltpu.VMEM((plan.rows, plan.columns), jnp.float32),
            pltpu.VMEM((held * plan.rows, plan.contraction), x.dtype),
            *weight.scratch,
        ],
        compiler_params=COMPILER_PARAMS,
        cost_estimate=pl.CostEstimate(
            flops=2 * held * ordered.shape[0] * grid[2] * plan.contraction * columns,
            transcendentals=0,
            bytes_accessed=grid[1] * ordered.nbytes
            + grid[0] * sum(array.nbytes for array in (places, *weight.operands))
            + ordered.shape[0] * columns * x.dtype.itemsize,
        ),
        name=kernel.split()[0],
    )(ordered, places, *weight.operands)
    return out[:rows].reshape(*lead, columns)


def _order_groups(plan: Plan, groups: jax.Array, m: int) -> jax.Array:
    """(rows, D) -> (rows, blocks, m, G): positions of padded blocks as m planes, and in each the groups as the weight's
    planes have them: all first groups of J rows of the weight, all second ones, and so on."""
    rows, size = groups.shape
    deep = plan.contraction * m // CHOSEN
    padded = jnp.pad(groups, ((0, 0), (0, -size % deep)))
    split = padded.reshape(rows, -1, plan.contraction // plan.planes, plan.planes // CHOSEN, m)
    return split.transpose(0, 1, 4, 3, 2).reshape(rows, -1, m, deep // m)


def _order_planes(plan: Plan, m: int, x: jax.Array) -> jax.Array:
    """(R, D) -> (R', D'): padded with zeros to whole blocks, and each block as m planes of its groups."""
    padded = jnp.pad(x, ((0, -x.shape[0] % plan.rows), (0, 0)))
    return _order_groups(plan, padded, m).reshape(padded.shape[0], -1)


def _order_places(plan: Plan, m: int, choices: jax.Array, first: np.ndarray, held: int) -> jax.Array:
    """uint32 (tiles of 128 columns, H, 1, blocks * G): a byte for each of the 4 places that a block chose of a group.

    `first` has the first block that meets each tile; the H from there on are a tile's, the last again where there are
    no more.
    """
    words, count = choices.shape
    starts = jnp.arange(0, 32, m)
    bits = take_group(choices[:, None, :], starts[:, None], m).reshape(words * 32 // m, count)
    places = (place.astype(jnp.uint32) << 8 * i for i, place in enumerate(find_places(bits, m)))
    packed = functools.reduce(jnp.bitwise_or, places)
    # Rows of one: the kernel takes any of them where only whole tiles of rows can be asked for.
    ordered = _order_groups(plan, packed.T, 1).reshape(count, 1, -1)
    return ordered[np.minimum(first[:, None] + np.arange(held), count - 1)]


def _multiply_block(
    packing: Packing, plan: Plan, m: int, width: int, size: int, count: int, x: Any, places: Any, *references: Any
) -> None:
    """x (rows, m * G) by one block of the weight; references: `count` of the weight's, out, scratch."""
    weight, (out, total, chosen, *copies) = references[:count], references[count:]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, jnp.float32)

    height = plan.contraction // plan.planes
    # Groups of J rows whose planes are whole lanes of x: a product each, for which the registers suffice.
    taken = math.lcm(height, LANES) // height
    for tile in range(plan.columns // LANES):
        lanes = slice(tile * LANES, (tile + 1) * LANES)
        # First, so that no part of the weight has to outlive its loop in registers.
        _choose(m, taken * height, x, places.at[tile], chosen)
        planes = build_weight(packing, plan, size, weight, copies, lanes)
        product = jnp.zeros((chosen.shape[0], LANES), jnp.float32)
        for part in range(0, plan.planes // CHOSEN, taken):
            # Row 4 a + i of J is the i-th chosen of the a-th group: here all first ones, all second ones, and so on.
            built = [planes[CHOSEN * a + i] for i in range(CHOSEN) for a in range(part, part + taken)]
            deep = slice(part * CHOSEN * height, (part + taken) * CHOSEN * height)
            product += multiply(chosen[:, deep], jnp.concatenate(built, axis=0).astype(x.dtype))
        total[:, lanes] += _pick(plan, width, pl.program_id(1) * plan.columns + tile * LANES, product)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _choose(m: int, part: int, x: Any, places: Any, chosen: Any) -> None:
    """Writes to `chosen` (H * rows, 4 * G) what each of H blocks chose of x (rows, m * G), by `places` (H, 1, G).

    The first ones of `part` groups, the second, third and fourth ones, then those of the next groups.
    """
    (rows, _), (held, _, groups) = x.shape, places.shape
    size = math.gcd(rows, ROWS_AT_ONCE)
    steps = rows // size

    def choose(step: jax.Array, _: None) -> None:
        block, at = jax.lax.div(step, jnp.int32(steps)), jax.lax.rem(step, jnp.int32(steps))
        source, target = (pl.ds(pl.multiple_of(first * size, size), size) for first in (at, step))
        for lane in range(0, groups, LANES):
            word = jax.lax.bitcast_convert_type(places[block, :, pl.ds(lane, LANES)], jnp.int32)
            wide = jnp.broadcast_to(word, (size * x.dtype.itemsize // 4, LANES))
            place = [_take_byte(wide, i) for i in range(CHOSEN)]
            best: list[Any] = []
            for k in range(m):
                # Two rows of bfloat16 are one of 32 bits: they are chosen together.
                plane = x[source, pl.ds(k * groups + lane, LANES)]
                plane = pltpu.bitcast(plane, jnp.int32) if plane.dtype.itemsize < 4 else plane
                for i in range(max(0, k - m + CHOSEN), min(k, CHOSEN)):
                    best[i] = jnp.where(place[i] == k, plane, best[i])
                if k < CHOSEN:
                    best.append(plane)
            for i, plane in enumerate(best):
                plane = pltpu.bitcast(plane, chosen.dtype) if chosen.dtype.itemsize < 4 else plane
                chosen[target, pl.ds(lane // part * part * CHOSEN + i * part + lane % part, LANES)] = plane

    jax.lax.fori_loop(0, held * steps, choose, None, unroll=held * steps <= UNROLLED)


def _take_byte(word: jax.Array, byte: int) -> jax.Array:
    return jax.lax.shift_right_logical(word, jnp.full_like(word, 8 * byte)) & 255


def _pick(plan: Plan, width: int, column: jax.Array, product: jax.Array) -> jax.Array:
    """(rows, 128) of (H * rows, 128): of each column, from `column` on, the rows that its block chose."""
    first = jax.lax.div(column, jnp.int32(width))
    lane = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, LANES), 1)
    picked = product[: plan.rows]
    for block in range(1, product.shape[0] // plan.rows):
        begin = (first + block) * width - column
        picked = jnp.where(lane >= begin, product[block * plan.rows : (block + 1) * plan.rows], picked)
    return picked
