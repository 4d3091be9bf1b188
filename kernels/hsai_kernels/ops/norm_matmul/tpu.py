"""TPU backend of norm_matmul (Pallas, Mosaic): rows are normalized in fast memory, and multiplied there.

A block of rows is read once and stays while all blocks of the weight pass by. What is saved is one write and one read
of the normalized rows, in bfloat16 4RD of 6RD + 2RF bytes: 57% where F is D / 2 (keys and values of a grouped model),
29% where F is 4D. The price is that the weight is read for each block of rows, 2DF bytes where 4CD are saved: of many
blocks that is more from F = 2C on, 1024 for most D. But such reads have C operations a byte beside them, and are hidden
where these take longer (on a v5e from 240 on), while nothing hides the reads and writes of a normalization by itself.
All of this is counted and not measured.

Dimensions: R rows, D contraction, F outputs, C rows and E outputs a block.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hsai_kernels.block_product import multiply
from hsai_kernels.dispatch import check_platform
from hsai_kernels.gradients import differentiate_as
from hsai_kernels.mosaic import FAST_MEMORY, LANES, MEMORY_LIMIT, choose_sides, fits, pad_rows, round_rows
from hsai_kernels.ops.norm_matmul.reference import norm_matmul_reference, normalize

BLOCKS = ((512, 512), (256, 512), (256, 256), (128, 128))
"""C and E: the first that fits is used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is fixed when the program is traced."""

    eps: float
    rows: int
    columns: int


def norm_matmul_tpu(x: jax.Array, gain: jax.Array, w: jax.Array, *, eps: float) -> jax.Array:
    """(..., F) in x's dtype; arguments as in api.py, already validated.

    Raises NotImplementedError for what it does not support.
    """
    check_platform("tpu")
    rows, columns = choose_blocks(x.shape[-1], x.dtype.itemsize)
    blocks = choose_sides("norm_matmul", x, {"rows": rows, "columns": columns})
    return multiply_in_blocks(x, gain, w, eps=eps, blocks=blocks)


def choose_blocks(contraction: int, itemsize: int) -> tuple[int, int]:
    """C and E for activations of `itemsize` bytes; NotImplementedError if none fits."""
    if contraction == 0 or contraction % LANES:
        raise NotImplementedError(f"has contractions (D) that are multiples of {LANES}, not {contraction}")
    for rows, columns in BLOCKS:
        # x twice, its float32 form and its normalized one; the weight twice; the result twice and once in float32.
        used = contraction * (rows * (3 * itemsize + 4) + columns * 2 * itemsize) + rows * columns * (2 * itemsize + 4)
        if fits(used, contraction * (rows + columns), itemsize):
            return rows, columns
    raise NotImplementedError(
        f"has contractions (D) whose blocks fit {FAST_MEMORY >> 20} MiB, not {contraction} of {itemsize} bytes"
    )


def multiply_in_blocks(
    x: jax.Array, gain: jax.Array, w: jax.Array, *, eps: float, blocks: tuple[int, int]
) -> jax.Array:
    """`norm_matmul_tpu` with blocks of a given size: C a multiple of 16, E of 128."""
    *lead, contraction = x.shape
    rows, columns = math.prod(lead), w.shape[1]
    if rows == 0 or columns == 0:
        return jnp.zeros((*lead, columns), x.dtype)
    options = Options(eps=eps, rows=min(blocks[0], round_rows(rows)), columns=min(blocks[1], columns))
    compute = differentiate_as(functools.partial(norm_matmul_reference, eps=eps), functools.partial(_compute, options))
    return compute(x.reshape(rows, contraction), gain, w).reshape(*lead, columns)


def _compute(options: Options, x: jax.Array, gain: jax.Array, w: jax.Array) -> jax.Array:
    padded, rounded, columns = pad_rows(x, options.rows), w.astype(x.dtype), w.shape[1]
    rows, contraction = padded.shape
    out = pl.pallas_call(
        functools.partial(_multiply, options.eps),
        grid=(rows // options.rows, pl.cdiv(columns, options.columns)),
        in_specs=[
            pl.BlockSpec((options.rows, contraction), lambda r, f: (r, 0)),
            pl.BlockSpec((1, contraction), lambda r, f: (0, 0)),
            pl.BlockSpec((contraction, options.columns), lambda r, f: (0, f)),
        ],
        out_specs=pl.BlockSpec((options.rows, options.columns), lambda r, f: (r, f)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        scratch_shapes=[pltpu.VMEM((options.rows, contraction), x.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MEMORY_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * contraction * columns + 4 * rows * contraction,
            transcendentals=rows,
            bytes_accessed=padded.nbytes + rows // options.rows * rounded.nbytes + rows * columns * x.dtype.itemsize,
        ),
        name="norm_matmul",
    )(padded, gain.astype(jnp.float32)[None], rounded)
    return out[: x.shape[0]]


def _multiply(eps: float, x: Any, gain: Any, w: Any, out: Any, normalized: Any) -> None:
    """One block of rows x (C, D) by one of the weight w (D, E); what lies behind F goes nowhere."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        normalized[...] = normalize(x[...], gain[...], eps=eps)

    out[...] = multiply(normalized[...], w[...]).astype(out.dtype)
