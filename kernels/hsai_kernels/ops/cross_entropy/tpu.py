"""TPU backend of cross_entropy (Pallas, Mosaic): no block of logits, and of no gradient of them, leaves fast memory.

Forward: for each block of tokens, all blocks of the vocabulary pass by under a running maximum and sum (online softmax:
Milakov and Gimelshein, 1805.02867); 2TDV flops, and w is read once a block of tokens.

Backward, in one pass: for each block of the vocabulary, all blocks of tokens pass by. Logits are made again and turned
into their gradient once, and serve both products: that of w stays in fast memory until it is complete, that of x is
fetched from HBM, added to and sent back by copies which the other products hide. 6TDV flops; a step moves 10 bytes for
each of CD elements in bfloat16 and makes 6CDE flops, so that E = 512 gives 307 flops a byte (v5e feeds its matrix units
from 240 on, v5p from 166, v6e only from 560).

Float32 is multiplied exactly: six passes of a matrix unit, so that smaller blocks feed it, and room for the operands'
parts (mosaic.py), so that they have to be smaller.

Against the chunked backend the flops are the same (4 products). What is saved is its traffic: it writes or reads about
24 bytes a logit, for 8D flops.

Dimensions: T tokens, D embed, V vocabulary, C tokens and E vocabulary a block.
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
from hsai_kernels.mosaic import FAST_MEMORY, LANES, MEMORY_LIMIT, choose_sides, fits, pad_rows, round_rows
from hsai_kernels.ops.cross_entropy.vocabulary import Split, add_parts, find_own, join_parts

Blocks = tuple[int, int]
"""C and E."""
FORWARD_BLOCKS: tuple[Blocks, ...] = ((1024, 512), (512, 512), (256, 512), (256, 256), (128, 128))
BACKWARD_BLOCKS: tuple[Blocks, ...] = ((512, 512), (256, 512), (256, 256), (128, 256), (128, 128), (64, 128))
"""The first that fits is used: forward many tokens save traffic, backward many words."""
SUM_EMBED = 2048
Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is fixed when the program is traced."""

    softcap: float | None
    z_loss: float
    forward: Blocks
    backward: Blocks
    split: Split


def cross_entropy_tpu(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None,
    z_loss: float,
    chunk: int | None,
    split: Split = (),
) -> jax.Array:
    """float32 (..., T); arguments as in api.py, already validated, targets in [0, V). `chunk` means nothing here.

    Raises NotImplementedError for what it does not support.
    """
    del chunk
    check_platform("tpu")
    forward, backward = (
        choose_sides(f"cross_entropy {name}", x, {"tokens": tokens, "words": words})
        for name, (tokens, words) in zip(
            ("forward", "backward"), choose_blocks(x.shape[-1], x.dtype.itemsize), strict=True
        )
    )
    blocks = {"forward": forward, "backward": backward}
    return lose_in_blocks(x, w, targets, softcap=softcap, z_loss=z_loss, split=split, **blocks)


def cross_entropy_sum_tpu(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    softcap: float | None,
    z_loss: float,
    chunk: int | None,
    split: Split = (),
) -> jax.Array:
    """float32 scalar: the losses, weighted and summed. Raises NotImplementedError for what it does not support.

    The chunked sum makes 3 products where this makes 4. Its traffic of about 24 bytes a logit outweighs the 2D flops of
    the fourth for D up to 2000 (v5p) to 6700 (v6e), by the chips' data sheets.
    """
    if x.shape[-1] > SUM_EMBED:
        raise NotImplementedError(
            f"sums for embeddings (D) of up to {SUM_EMBED}, where it saves time, not {x.shape[-1]}"
        )
    losses = cross_entropy_tpu(x, w, targets, softcap=softcap, z_loss=z_loss, chunk=chunk, split=split)
    return jnp.sum(weights * losses)


def choose_blocks(embed: int, itemsize: int) -> tuple[Blocks, Blocks]:
    """Blocks of the forward and the backward pass for activations of `itemsize` bytes.

    Raises NotImplementedError if none fits.
    """
    if embed == 0 or embed % LANES:
        raise NotImplementedError(f"has embeddings (D) that are multiples of {LANES}, not {embed}")
    # x and w are twice there, for the pipeline; so is the gradient of w, with the product that is added to it; that of
    # x is there once, with its product. About five values a logit.
    # Backward each is an operand twice, once of them transposed.
    fitting = [
        [
            (tokens, words)
            for tokens, words in blocks
            if fits(
                embed * (tokens * (2 * itemsize + for_x) + words * (2 * itemsize + for_w)) + 20 * tokens * words,
                embed * (tokens + words) * times,
                itemsize,
            )
        ]
        for blocks, for_x, for_w, times in ((FORWARD_BLOCKS, 0, 0, 1), (BACKWARD_BLOCKS, 8, 12, 2))
    ]
    if not all(fitting):
        raise NotImplementedError(
            f"has embeddings (D) whose blocks fit {FAST_MEMORY >> 20} MiB, not {embed} for {itemsize}-byte activations"
        )
    return fitting[0][0], fitting[1][0]


def lose_in_blocks(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None,
    z_loss: float,
    split: Split = (),
    forward: Blocks,
    backward: Blocks,
) -> jax.Array:
    """`cross_entropy_tpu` with blocks of a given size: multiples of 16 tokens, and of 128 words."""
    *lead, embed = x.shape
    rows, vocab = math.prod(lead), w.shape[1]
    if rows == 0:
        return jnp.zeros(targets.shape, jnp.float32)

    def shrink(blocks: Blocks) -> Blocks:
        return min(blocks[0], round_rows(rows)), min(blocks[1], vocab)

    options = Options(softcap=softcap, z_loss=z_loss, forward=shrink(forward), backward=shrink(backward), split=split)
    return _compute(options, x.reshape(rows, embed), w, targets.reshape(rows)).reshape(lead)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compute(options: Options, x: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
    return _forward(options, x, w, targets)[0]


def _forward(options: Options, x: jax.Array, w: jax.Array, targets: jax.Array) -> tuple[jax.Array, Saved]:
    """The loss of each token, and what the backward pass needs."""
    tokens, words = options.forward
    padded, rounded, vocab = pad_rows(x, tokens), w.astype(x.dtype), w.shape[1]
    own = find_own(targets, vocab, options.split)
    length, embed = padded.shape
    grid = (length // tokens, pl.cdiv(vocab, words))
    column = pl.BlockSpec((tokens, 1), lambda t, v: (t, 0))
    result = jax.ShapeDtypeStruct((length, 1), jnp.float32)
    picked, log_sum = pl.pallas_call(
        functools.partial(_read_vocabulary, options, vocab),
        grid=grid,
        in_specs=[
            pl.BlockSpec((tokens, embed), lambda t, v: (t, 0)),
            pl.BlockSpec((embed, words), lambda t, v: (0, v)),
            column,
        ],
        out_specs=[column, column],
        out_shape=[result, result],
        scratch_shapes=[pltpu.VMEM((tokens, 1), jnp.float32)] * 3,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MEMORY_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * length * embed * vocab,
            transcendentals=length * vocab * (1 if options.softcap is None else 2),
            bytes_accessed=padded.nbytes + grid[0] * rounded.nbytes + 12 * length,
        ),
        name="cross_entropy_forward",
    )(padded, rounded, pad_rows(own[:, None], tokens))
    log_sum, picked = join_parts(log_sum[: x.shape[0], 0], picked[: x.shape[0], 0], options.split)
    loss = log_sum - picked + options.z_loss * jnp.square(log_sum)
    return loss, (x, w, own, log_sum)


def _read_vocabulary(
    options: Options,
    vocab: int,
    x: Any,
    w: Any,
    targets: Any,
    target_logits: Any,
    log_sum: Any,
    largest: Any,
    total: Any,
    picked: Any,
) -> None:
    """One block of tokens x (C, D) by one of words w (D, E); columns (C, 1) of targets and results."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        picked[...] = jnp.zeros_like(picked)

    logits, columns = _make_logits(options, x[...], w[...], pl.program_id(1))
    picked[...] += jnp.sum(jnp.where(columns == targets[...], logits, 0.0), axis=1, keepdims=True)
    if vocab % w.shape[1]:
        logits = jnp.where(columns < vocab, logits, -jnp.inf)
    higher = jnp.maximum(largest[...], jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.sum(jnp.exp(logits - higher), axis=1, keepdims=True)
    total[...] = total[...] * jnp.exp(largest[...] - higher) + weights
    largest[...] = higher

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        log_sum[...] = largest[...] + jnp.log(total[...])
        target_logits[...] = picked[...]


def _backward(options: Options, saved: Saved, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, targets, log_sum = saved
    tokens, words = options.backward
    padded, rounded, vocab = pad_rows(x, tokens), w.astype(x.dtype), w.shape[1]
    length, embed = padded.shape
    grid = (pl.cdiv(vocab, words), length // tokens)
    column = pl.BlockSpec((tokens, 1), lambda v, t: (t, 0))
    panel = pl.BlockSpec((embed, words), lambda v, t: (0, v))
    d_x, d_w = pl.pallas_call(
        functools.partial(_read_tokens, options, vocab),
        grid=grid,
        in_specs=[
            pl.BlockSpec((tokens, embed), lambda v, t: (t, 0)),
            panel,
            column,
            column,
            column,
        ],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY), panel],
        out_shape=[jax.ShapeDtypeStruct(padded.shape, jnp.float32), jax.ShapeDtypeStruct(w.shape, jnp.float32)],
        scratch_shapes=[
            pltpu.VMEM((tokens, embed), jnp.float32),
            pltpu.SemaphoreType.DMA,
            pltpu.SemaphoreType.DMA,
        ],
        # Steps follow one another: each adds to what an earlier one has left in HBM.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=MEMORY_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * length * embed * vocab,
            transcendentals=length * vocab * (1 if options.softcap is None else 2),
            bytes_accessed=grid[0] * length * embed * (x.dtype.itemsize + 8) + rounded.nbytes + 4 * embed * vocab,
        ),
        name="cross_entropy_backward",
    )(padded, rounded, *(pad_rows(column[:, None], tokens) for column in (targets, log_sum, grad)))
    return add_parts(d_x[: x.shape[0]], options.split).astype(x.dtype), d_w.astype(w.dtype), None


def _read_tokens(
    options: Options,
    vocab: int,
    x: Any,
    w: Any,
    targets: Any,
    log_sum: Any,
    grad: Any,
    d_x: Any,
    d_w: Any,
    block: Any,
    fetching: Any,
    sending: Any,
) -> None:
    """One block of words w (D, E) by one of tokens x (C, D): d_w (D, E) stays, d_x (T, D) is in HBM."""
    v, t = pl.program_id(0), pl.program_id(1)
    tokens = x.shape[0]
    place = d_x.at[pl.ds(pl.multiple_of(t * tokens, tokens), tokens)]
    fetch, send = pltpu.make_async_copy(place, block, fetching), pltpu.make_async_copy(block, place, sending)
    last = (v == pl.num_programs(0) - 1) & (t == pl.num_programs(1) - 1)

    logits, columns = _make_logits(options, x[...], w[...], v)
    chances = jnp.exp(logits - log_sum[...])
    # d loss / d log_sum is one, and what z_loss adds.
    d_logits = chances * (grad[...] * (1.0 + 2.0 * options.z_loss * log_sum[...]))
    d_logits -= jnp.where(columns == targets[...], grad[...], 0.0)
    if options.softcap is not None:
        d_logits *= 1.0 - jnp.square(logits / options.softcap)
    weights = w[...]
    if vocab % w.shape[1]:
        # What lies behind the last word is anything, NaN included.
        d_logits = jnp.where(columns < vocab, d_logits, 0.0)
        weights = jnp.where(columns[:1] < vocab, weights, jnp.zeros_like(weights))
    d_logits = d_logits.astype(x.dtype)

    # The block of the step before is on its way until here, and this one's until it is added to: products hide both.
    @pl.when((v > 0) | (t > 0))
    def _() -> None:
        send.wait()

    @pl.when(v > 0)
    def _() -> None:
        fetch.start()

    part = multiply(x[...], d_logits, (0, 0))

    @pl.when(t == 0)
    def _() -> None:
        d_w[...] = part

    @pl.when(t > 0)
    def _() -> None:
        d_w[...] += part

    part = multiply(d_logits, weights, (1, 1))

    @pl.when(v == 0)
    def _() -> None:
        block[...] = part

    @pl.when(v > 0)
    def _() -> None:
        fetch.wait()
        block[...] += part

    send.start()

    @pl.when(last)
    def _() -> None:
        send.wait()


_compute.defvjp(_forward, _backward)


def _make_logits(options: Options, x: jax.Array, w: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 (C, E), and int32 (C, E): which word of the vocabulary each is, beyond V in a ragged last block."""
    logits = multiply(x, w)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + v * w.shape[1]
    return logits, columns
