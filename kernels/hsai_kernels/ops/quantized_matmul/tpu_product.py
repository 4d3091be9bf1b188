"""The product that quantized_matmul and sparse_matmul share on a TPU: packed weights are rebuilt by blocks in VMEM.

What crosses HBM are the packed bytes, once for each block of rows; the matrix unit sees dense blocks, of x's dtype as a
dense model would have them. No packed array is ever padded or rearranged in HBM. Instead, x is:

A packed word holds consecutive elements of a column, and rebuilding them in order would interleave rows. But the order
of a contraction is free. So block by block, x (U * J columns) is brought into the order (J, U), and the weight is built
as J planes: plane j holds the rows j, j + J, ... of the block, which lie at the same bits of their words. A plane is a
strided load, a shift and a mask. J grows to the group of a scale where that is small: then row u of every plane has row
u of the scales.

Mosaic has strided loads only for 32-bit elements in arrays of 128 columns: so blocks are taken 128 columns at a time,
copied (packed, and so cheap) to scratch of that shape, and 8-bit and 16-bit elements are widened on the way.

A contraction that blocks do not divide ends in rows that lie outside the packed array, and are anything. x is zero
there, and so are scales; float values are masked.

Dimensions: R rows, D contraction, F output, g contraction positions that share a scale, P elements a period of the
packing, J planes a block, U rows a plane.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hsai_kernels.block_product import multiply
from hsai_kernels.mosaic import LANES, MEMORY_LIMIT, round_rows
from hsai_kernels.tuning import Sides, choose_tile, name_product_shape

SUBLANES = 8
"""Rows of a tile of 32-bit elements."""
LARGEST_BLOCK: Sides = {"rows": 512, "columns": 512, "contraction": 1024}
"""A weight block of float32 is 2 MiB, and building it needs a few of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How a weight is packed; hashable, so that jit tells programs apart."""

    period: int
    """P: dense rows after which the packing repeats; planes are a multiple of it."""
    load_planes: Callable[[int, list[Any]], list[jax.Array]]
    """(J, references to the packed arrays' blocks, 32 bits an element) -> J planes, float32 (U, 128), without scale."""
    rows: tuple[tuple[int, int], ...]
    """Rows of each packed array, as a fraction of dense rows: (numerator, denominator)."""
    floating: bool = False
    """Whether what lies outside an array may be NaN."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The blocks of a product."""

    rows: int
    columns: int
    planes: int
    """J."""
    contraction: int
    """U * J."""
    group: int
    """Dense rows that share a scale: all of the padded contraction, if there is one scale a column."""


def plan_product(
    packing: Packing, rows: int, contraction: int, columns: int, group: int | None, largest: Sides = LARGEST_BLOCK
) -> Plan:
    """The blocks of a product, of at most `largest` sides; `group` is None without scales.

    Raises NotImplementedError for groups that no block holds whole.
    """
    single = group is None or group >= contraction
    period, planes = packing.period, packing.period
    step = LANES
    if not single:
        assert group is not None
        if group % (period * SUBLANES):
            planes = math.lcm(period, group)
        step = math.lcm(LANES, group)
    step = math.lcm(step, planes * SUBLANES)
    deepest = 4 * LARGEST_BLOCK["contraction"]
    if step > deepest:
        raise NotImplementedError(f"has scale groups that divide blocks of up to {deepest} positions, not of {group}")
    count = pl.cdiv(contraction, max(largest["contraction"], step))
    depth = pl.cdiv(pl.cdiv(contraction, count), step) * step
    row_blocks = pl.cdiv(rows, largest["rows"])
    return Plan(
        rows=round_rows(pl.cdiv(rows, row_blocks)),
        columns=min(pl.cdiv(columns, LANES) * LANES, largest["columns"]),
        planes=planes,
        contraction=depth,
        group=count * depth if single else group or 0,
    )


def multiply_packed(
    kernel: str, packing: Packing, x: jax.Array, packed: tuple[jax.Array, ...], scale: jax.Array | None
) -> jax.Array:
    """(..., F) of x's dtype = x (..., D) @ the weight that `packed` (arrays (rows, F)) and scale (D/g, F) mean.

    `kernel` names the API and the weight's format, for tiles. Sums are float32. Raises NotImplementedError for what it
    does not support.
    """
    *lead, contraction = x.shape
    rows, columns = math.prod(lead), packed[0].shape[1]
    if 0 in (rows, contraction, columns):
        raise NotImplementedError(f"multiplies arrays that are not empty, not x {x.shape} by {packed[0].shape}")
    group = None if scale is None else contraction // scale.shape[0]
    sides = choose_tile(
        kernel,
        dtype=x.dtype,
        shape=name_product_shape(rows, contraction, None if scale is None else scale.shape[0]),
        own=LARGEST_BLOCK,
        fit=lambda sides: dataclasses.asdict(plan_product(packing, rows, contraction, columns, group, sides)),
    )
    plan = Plan(**sides)
    ordered = _order_contraction(plan, x.reshape(rows, contraction))
    grid = (ordered.shape[0] // plan.rows, pl.cdiv(columns, plan.columns), ordered.shape[1] // plan.contraction)

    operands, specs = [ordered], [pl.BlockSpec((plan.rows, plan.contraction), lambda r, f, d: (r, d))]
    scratch = [pltpu.VMEM((plan.rows, plan.columns), jnp.float32)]
    for array, (numerator, denominator) in zip(packed, packing.rows, strict=True):
        depth = plan.contraction * numerator // denominator
        operands.append(array)
        specs.append(pl.BlockSpec((depth, plan.columns), lambda r, f, d: (d, f)))
        scratch.append(pltpu.VMEM((depth, LANES), jnp.float32 if array.dtype.itemsize < 4 else array.dtype))
    if scale is not None:
        blocks = _split_scale(plan, scale, grid[2])
        shared = grid[2] // blocks.shape[0]
        operands.append(blocks)
        specs.append(pl.BlockSpec((1, blocks.shape[1], plan.columns), lambda r, f, d: (d // shared, 0, f)))
        scratch.append(pltpu.VMEM((blocks.shape[1], LANES), jnp.float32))

    out = pl.pallas_call(
        functools.partial(_multiply_block, packing, plan, contraction, scale is not None),
        grid=grid,
        in_specs=specs,
        out_specs=pl.BlockSpec((plan.rows, plan.columns), lambda r, f, d: (r, f)),
        out_shape=jax.ShapeDtypeStruct((ordered.shape[0], columns), x.dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * ordered.size * columns,
            transcendentals=0,
            bytes_accessed=grid[1] * ordered.nbytes
            + grid[0] * sum(array.nbytes for array in operands[1:])
            + ordered.shape[0] * columns * x.dtype.itemsize,
        ),
        name=kernel.split()[0],
    )(*operands)
    return out[:rows].reshape(*lead, columns)


def _order_contraction(plan: Plan, x: jax.Array) -> jax.Array:
    """(R, D) -> (R', D'): padded with zeros to whole blocks, and each block's U * J columns in the order (J, U)."""
    rows, contraction = x.shape
    x = jnp.pad(x, ((0, -rows % plan.rows), (0, -contraction % plan.contraction)))
    if plan.planes == 1:
        return x
    split = x.reshape(x.shape[0], -1, plan.contraction // plan.planes, plan.planes)
    return split.swapaxes(2, 3).reshape(x.shape)


def _split_scale(plan: Plan, scale: jax.Array, blocks: int) -> jax.Array:
    """float32 (blocks or fewer, scales a block, F), with scales of zero behind the contraction."""
    wanted = blocks * plan.contraction // plan.group
    padded = jnp.pad(scale.astype(jnp.float32), ((0, wanted - scale.shape[0]), (0, 0)))
    return padded.reshape(-1, max(1, plan.contraction // plan.group), scale.shape[1])


def _multiply_block(packing: Packing, plan: Plan, contraction: int, scaled: bool, x: Any, *references: Any) -> None:
    """x (rows, U * J) by one block of the weight; references: packed, scale (1, scales, columns), out, scratch."""
    count = len(packing.rows)
    packed, rest = references[:count], references[count:]
    scale, rest = (rest[0], rest[1:]) if scaled else (None, rest)
    out, total, *copies = rest
    depth, planes = pl.program_id(2), plan.planes

    @pl.when(depth == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, jnp.float32)

    for start in range(0, plan.columns, LANES):
        lanes = slice(start, start + LANES)
        for array, copy in zip(packed, copies, strict=False):
            part = array[:, lanes]
            copy[...] = part if part.dtype.itemsize == 4 else part.astype(copy.dtype)
        built = packing.load_planes(planes, copies[:count])
        if packing.floating and contraction % plan.contraction:
            row = jax.lax.broadcasted_iota(jnp.int32, built[0].shape, 0) * planes + depth * plan.contraction
            built = [jnp.where(row + j < contraction, plane, 0.0) for j, plane in enumerate(built)]
        if scale is not None:
            copies[count][...] = scale[0, :, lanes]
            built = [_scale_plane(plan, j, plane, copies[count]) for j, plane in enumerate(built)]
        weight = built[0] if planes == 1 else jnp.concatenate(built, axis=0)
        total[:, lanes] += multiply(x[...], weight.astype(x.dtype))

    @pl.when(depth == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _scale_plane(plan: Plan, j: int, plane: jax.Array, scale: Any) -> jax.Array:
    """Plane j (U, 128) times the scales (scales, 128) of its rows j, j + J, ... of the block."""
    count = scale.shape[0]
    if count == 1:
        return plane * scale[...]
    if plan.planes % plan.group == 0:
        return plane * load_strided(scale, plan.planes // plan.group)[j // plan.group]
    size = plan.group // plan.planes
    parts = [plane[i * size : (i + 1) * size] * scale[i : i + 1] for i in range(count)]
    return jnp.concatenate(parts, axis=0)


def load_strided(reference: Any, stride: int) -> list[jax.Array]:
    """(rows / stride, columns) for each of the first `stride` rows: it and every stride-th after it."""
    if stride == 1:
        return [reference[...]]
    rows = reference.shape[0] // stride
    return [reference[pl.ds(start, rows, stride=stride), :] for start in range(stride)]
