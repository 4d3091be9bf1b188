"""TPU backend of gated_mlp (Pallas, Mosaic): three products in one pass, hidden activations in fast memory only.

A block of rows stays, with its float32 result, while blocks of the three weights pass by: each makes some of the hidden
activations, which are multiplied at once by their part of `down`. What is saved is their traffic: gate and up written
and read, and their product too, 12RF bytes in bfloat16 (8RF where XLA fuses the activation into one of the products),
where the products themselves move 4RD and the weights, 6DF a block of rows. While decoding (few rows) weights are all:
then one kernel, whose reads never pause between products, is what is won.

Dimensions: R rows, D embed, F ffn, C rows and E hidden activations a block.
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
from hsai_kernels.ops.gated_mlp.reference import ACTIVATIONS, gated_mlp_reference

BLOCKS = ((512, 512), (512, 256), (256, 256), (256, 128), (128, 128), (64, 128))
"""C and E: the first that fits is used; many rows save reading weights again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is fixed when the program is traced."""

    activation: str
    rows: int
    hidden: int


def gated_mlp_tpu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, *, activation: str) -> jax.Array:
    """(..., D) in x's dtype; arguments as in api.py, already validated.

    Raises NotImplementedError for what it does not support.
    """
    check_platform("tpu")
    rows, hidden = choose_blocks(x.shape[-1], x.dtype.itemsize)
    blocks = choose_sides("gated_mlp", x, {"rows": rows, "hidden": hidden})
    return multiply_in_blocks(x, gate, up, down, activation=activation, blocks=blocks)


def choose_blocks(embed: int, itemsize: int) -> tuple[int, int]:
    """C and E for activations of `itemsize` bytes; NotImplementedError if none fits."""
    if embed == 0 or embed % LANES:
        raise NotImplementedError(f"has embeddings (D) that are multiples of {LANES}, not {embed}")
    for rows, hidden in BLOCKS:
        # x and the result twice, its sum and what is added to it; three weights twice; about three values a hidden one.
        used = embed * (rows * (4 * itemsize + 8) + hidden * 6 * itemsize) + 12 * rows * hidden
        # One product after the other: the parts of x and of one weight.
        if fits(used, embed * (rows + hidden), itemsize):
            return rows, hidden
    raise NotImplementedError(
        f"has embeddings (D) whose blocks fit {FAST_MEMORY >> 20} MiB, not {embed} of {itemsize} bytes"
    )


def multiply_in_blocks(
    x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, *, activation: str, blocks: tuple[int, int]
) -> jax.Array:
    """`gated_mlp_tpu` with blocks of a given size: C a multiple of 16, E of 128."""
    *lead, embed = x.shape
    rows, ffn = math.prod(lead), gate.shape[1]
    if rows == 0 or ffn == 0:
        return jnp.zeros(x.shape, x.dtype)
    options = Options(activation=activation, rows=min(blocks[0], round_rows(rows)), hidden=min(blocks[1], ffn))
    reference = functools.partial(gated_mlp_reference, activation=activation)
    compute = differentiate_as(reference, functools.partial(_compute, options))
    return compute(x.reshape(rows, embed), gate, up, down).reshape(x.shape)


def _compute(options: Options, x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    padded, ffn = pad_rows(x, options.rows), gate.shape[1]
    rows, embed = padded.shape
    block = pl.BlockSpec((options.rows, embed), lambda r, f: (r, 0))
    into = pl.BlockSpec((embed, options.hidden), lambda r, f: (0, f))
    weights = [w.astype(x.dtype) for w in (gate, up, down)]
    out = pl.pallas_call(
        functools.partial(_multiply, options, ffn),
        grid=(rows // options.rows, pl.cdiv(ffn, options.hidden)),
        in_specs=[block, into, into, pl.BlockSpec((options.hidden, embed), lambda r, f: (f, 0))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(padded.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((options.rows, embed), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MEMORY_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * rows * embed * ffn,
            transcendentals=rows * ffn,
            bytes_accessed=2 * padded.nbytes + rows // options.rows * sum(w.nbytes for w in weights),
        ),
        name="gated_mlp",
    )(padded, *weights)
    return out[: x.shape[0]]


def _multiply(options: Options, ffn: int, x: Any, gate: Any, up: Any, down: Any, out: Any, total: Any) -> None:
    """One block of rows x (C, D) by blocks of weights: gate and up (D, E), down (E, D)."""
    hidden = ACTIVATIONS[options.activation](multiply(x[...], gate[...])) * multiply(x[...], up[...])
    last = down[...]
    if ffn % options.hidden:
        # What lies behind F is anything, NaN included.
        start = pl.program_id(1) * options.hidden
        hidden = jnp.where(jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 1) + start < ffn, hidden, 0.0)
        real = jax.lax.broadcasted_iota(jnp.int32, last.shape, 0) + start < ffn
        last = jnp.where(real, last, jnp.zeros_like(last))
    product = multiply(hidden.astype(x.dtype), last)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        total[...] = product

    @pl.when(pl.program_id(1) > 0)
    def _() -> None:
        total[...] += product

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)
