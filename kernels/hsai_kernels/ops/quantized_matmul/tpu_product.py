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
from collections.abc import Callable, Sequence
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
COMPILER_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY_LIMIT
)
"""Of a grid of blocks of rows, columns and the contraction."""


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
    packing: Packing,
    rows: int,
    contraction: int,
    columns: int,
    group: int | None,
    largest: Sides = LARGEST_BLOCK,
    step: int = LANES,
    span: int = 1,
) -> Plan:
    """The blocks of a product, of at most `largest` sides; `group` is None without scales.

    `step` divides a block's contraction, of whose rows each is one of `span` positions. Raises NotImplementedError for
    groups that no block holds whole.
    """
    single = group is None or group >= contraction
    period, planes = packing.period, packing.period
    if not single:
        assert group is not None
        if group % (period * SUBLANES):
            planes = math.lcm(period, group)
        step = math.lcm(step, group)
    step = math.lcm(step, planes * SUBLANES)
    deepest = 4 * LARGEST_BLOCK["contraction"]
    if step > deepest:
        group = 0 if group is None else group
        raise NotImplementedError(
            f"has scale groups that divide blocks of up to {deepest * span} positions, not of {group * span}"
        )
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

    weight = bring_weight(packing, plan, packed, scale, grid[2])
    out = pl.pallas_call(
        functools.partial(_multiply_block, packing, plan, contraction, len(weight.operands)),
        grid=grid,
        in_specs=[pl.BlockSpec((plan.rows, plan.contraction), lambda r, f, d: (r, d)), *weight.specs],
        out_specs=pl.BlockSpec((plan.rows, plan.columns), lambda r, f, d: (r, f)),
        out_shape=jax.ShapeDtypeStruct((ordered.shape[0], columns), x.dtype),
        scratch_shapes=[pltpu.VMEM((plan.rows, plan.columns), jnp.float32), *weight.scratch],
        compiler_params=COMPILER_PARAMS,
        cost_estimate=pl.CostEstimate(
            flops=2 * ordered.size * columns,
            transcendentals=0,
            bytes_accessed=grid[1] * ordered.nbytes
            + grid[0] * sum(array.nbytes for array in weight.operands)
            + ordered.shape[0] * columns * x.dtype.itemsize,
        ),
        name=kernel.split()[0],
    )(ordered, *weight.operands)
    return out[:rows].reshape(*lead, columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """What a kernel over (row blocks, column blocks, blocks of the contraction) takes of a packed weight."""

    operands: list[jax.Array]
    """The packed arrays and, if there are any, the scales."""
    specs: list[pl.BlockSpec]
    scratch: list[Any]
    """Of each operand 128 columns, 32 bits an element."""


def bring_weight(
    packing: Packing, plan: Plan, packed: tuple[jax.Array, ...], scale: jax.Array | None, blocks: int
) -> Weight:
    """The operands that `build_weight` reads, of a contraction of so many blocks."""
    weight = Weight(operands=[], specs=[], scratch=[])
    for array, (numerator, denominator) in zip(packed, packing.rows, strict=True):
        depth = plan.contraction * numerator // denominator
        weight.operands.append(array)
        weight.specs.append(pl.BlockSpec((depth, plan.columns), lambda r, f, d: (d, f)))
        weight.scratch.append(pltpu.VMEM((depth, LANES), jnp.float32 if array.dtype.itemsize < 4 else array.dtype))
    if scale is not None:
        parts = _split_scale(plan, scale, blocks)
        shared = blocks // parts.shape[0]
        weight.operands.append(parts)
        weight.specs.append(pl.BlockSpec((1, parts.shape[1], plan.columns), lambda r, f, d: (d // shared, 0, f)))
        weight.scratch.append(pltpu.VMEM((parts.shape[1], LANES), jnp.float32))
    return weight


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


def _multiply_block(packing: Packing, plan: Plan, contraction: int, count: int, x: Any, *references: Any) -> None:
    """x (rows, U * J) by one block of the weight; references: `count` of the weight's, out, scratch."""
    weight, (out, total, *copies) = references[:count], references[count:]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, jnp.float32)

    for start in range(0, plan.columns, LANES):
        lanes = slice(start, start + LANES)
        planes = build_weight(packing, plan, contraction, weight, copies, lanes)
        built = planes[0] if plan.planes == 1 else jnp.concatenate(planes, axis=0)
        total[:, lanes] += multiply(x[...], built.astype(x.dtype))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def build_weight(
    packing: Packing, plan: Plan, contraction: int, weight: Sequence[Any], copies: Sequence[Any], lanes: slice
) -> list[jax.Array]:
    """The J planes, float32 (U, 128), of 128 columns of the program's block, scaled; `copies` are its scratch.

    `contraction` is D. What floating arrays hold behind it counts as zero.
    """
    count, planes = len(packing.rows), plan.planes
    for array, copy in zip(weight[:count], copies, strict=False):
        part = array[:, lanes]
        copy[...] = part if part.dtype.itemsize == 4 else part.astype(copy.dtype)
    built = packing.load_planes(planes, list(copies[:count]))
    if packing.floating and contraction % plan.contraction:
        row = jax.lax.broadcasted_iota(jnp.int32, built[0].shape, 0) * planes + pl.program_id(2) * plan.contraction
        built = [jnp.where(row + j < contraction, plane, 0.0) for j, plane in enumerate(built)]
    for scale, copy in zip(weight[count:], copies[count:], strict=True):
        copy[...] = scale[0, :, lanes]
        built = [_scale_plane(plan, j, plane, copy) for j, plane in enumerate(built)]
    return built


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
