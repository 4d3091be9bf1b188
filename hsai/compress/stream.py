"""Calibration, block by block: what each weight of a block is multiplied by, and what the block hands to the next.

Only the residual stream of the calibration tokens is kept, in the host's memory, and for who wants to come close to
the dense model a second one, of it; on the devices are the model's weights, one batch, and what one block is solved
with. A block is first observed with its dense weights, then solved, and the next block reads what the solved one gives,
so that it can make up for the errors before it.

On a mesh a batch is split over its sequences, and the Gram matrices over their rows: each device holds its part of what
all of them saw.

N sequences, B of them in a batch, T tokens each, D embed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.calibration import widen_batch
from hsai.errors import InputError
from hsai.formats import take_layer, to_dense
from hsai.formats.observed import Notes, Observed, level_rows, sum_products, sum_squares
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer
from hsai.models.layers import RMSNorm, is_matrix
from hsai.models.transformer import Block
from hsai.sharding import lay_out

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and how much there is in all."""

Grams = Mapping[str, jax.Array]
"""X^T X (D, D) float32 of the input of each of a block's matrices, by the weight's name within the block; of experts
(E, D, D), of the tokens that went to each. Each token's row of X is scaled to the same norm (`level_rows`), but for
`Streams.raw`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streams:
    """What a block reads and shall give, in the host's memory."""

    inputs: np.ndarray
    """(N, T, D), in the model's dtype: what the blocks before it, as they were solved, hand on."""

    targets: np.ndarray | None
    """(N, T, D): what the block gives in the dense model; None where that is not followed."""

    squares: Mapping[str, jax.Array]
    """Of each position the sum of squares of what `Grams` are of, rows as they are: float32 (D,) or (E, D)."""

    raw: Grams | None
    """Of rows as they are; None where these are not summed."""

    counts: Mapping[str, np.ndarray]
    """How many tokens each of `Grams` is a sum over, float32 () or (E,)."""


def stream_blocks(
    model: Transformer,
    tokens: np.ndarray,
    *,
    batch: int,
    solve: Callable[[int, Block, Grams, Streams], Block],
    recall: Callable[[int, Block], Block | None] | None = None,
    finish: Callable[[jax.Array, jax.Array], None] | None = None,
    packed: Transformer | None = None,
    follow_dense: bool = False,
    raw: bool = False,
    progress: Progress | None = None,
) -> None:
    """Calls `solve` with each block in turn, on what the blocks that it returned before make of `tokens`.

    Args:
      model: with dense weights.
      tokens: int32 (N, T) in [0, V).
      batch: sequences at a time; see `widen_batch`.
      solve: (number of the layer, block with dense weights, grams, streams) -> the block that the next one follows.
      recall: (number, block with dense weights) -> what `solve` returned for it in an earlier run, or None.
      finish: called last with X^T X (D, D) float32 of what the head is multiplied by, and with the squares (D,) of it.
      packed: the model whose embedding the first block reads, where that is packed already; None for `model`.
      follow_dense: computes what the dense model gives as well, for `Streams.targets`.
      raw: also has `Streams.raw`.
      progress: called with ("calibrating", layers done, layers in all).
    Raises:
      InputError: activations are not finite, naming the layer.
    """
    config = model.config
    count, length = tokens.shape
    batch = widen_batch(batch, count)
    starts = range(0, count, batch)
    embed = jax.jit(lambda model, tokens: model.embed_tokens(tokens))

    def begin(model: Transformer) -> np.ndarray:
        stream = np.empty((count, length, config.embed), jnp.dtype(config.dtype))
        for start in starts:
            stream[start : start + batch] = embed(model, lay_out(tokens[start : start + batch], "batch", "seq"))
        return stream

    hidden = begin(packed or model)
    targets = begin(model) if follow_dense else None

    @jax.jit
    def observe(block: Block, layer: jax.Array, x: jax.Array) -> tuple[list[jax.Array], ...]:
        notes = Notes(raw=raw)
        weights = {
            name: Observed(param.get_value(), name, notes)
            for name, param in named_weights(block).items()
            if is_matrix(param)
        }
        apply_block(model, replace_weights(block, weights), layer, x)
        owner.update(notes.owner)
        return notes.grams, notes.counts, notes.squares, notes.raw

    @functools.partial(jax.jit, donate_argnums=2)
    def forward(block: Block, layer: jax.Array, x: jax.Array) -> jax.Array:
        return apply_block(model, block, layer, x)

    def read(stream: np.ndarray, start: int) -> jax.Array:
        return lay_out(stream[start : start + batch], "batch", "seq", "embed")

    def advance(stream: np.ndarray, block: Block, number: jax.Array) -> None:
        for start in starts:
            stream[start : start + batch] = forward(block, number, read(stream, start))

    @functools.partial(jax.jit, donate_argnums=0)
    def add(sums: Any, more: Any) -> Any:
        return jax.tree.map(jnp.add, sums, more)

    def look(layer: int, block: Block, number: jax.Array) -> tuple[Grams, Streams]:
        # A function of its own, so that no matrix outlives the solving of its block.
        sums = observe(block, number, read(hidden, starts[0]))
        for start in starts[1:]:
            sums = add(sums, observe(block, number, read(hidden, start)))
        for name, index in owner.items():
            if not all(bool(jnp.all(jnp.isfinite(each[index]))) for each in sums if each):
                raise InputError(f"layer {layer}: what {name} is multiplied by is NaN or infinite in calibration")
        grams, counts, squares, unlevel = (
            {name: each[i] for name, i in owner.items()} if each else {} for each in sums
        )
        streams = Streams(
            inputs=hidden,
            targets=targets,
            squares=squares,
            raw=unlevel if raw else None,
            counts={name: np.asarray(count) for name, count in counts.items()},
        )
        return grams, streams

    owner: dict[str, int] = {}
    for layer in range(config.layers):
        block = take_block(model, layer)
        number = jnp.int32(layer)
        if targets is not None:
            advance(targets, block, number)
        solved = None if recall is None else recall(layer, block)
        if solved is None:
            solved = solve(layer, block, *look(layer, block, number))
        if layer + 1 < config.layers or finish is not None:
            advance(hidden, solved, number)
        if progress is not None:
            progress("calibrating", layer + 1, config.layers)
    if finish is not None:

        @jax.jit
        def measure(norm: RMSNorm, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows = norm(x)
            return sum_products(level_rows(rows)), sum_squares(rows)

        last = measure(model.final_norm, read(hidden, starts[0]))
        for start in starts[1:]:
            last = add(last, measure(model.final_norm, read(hidden, start)))
        finish(*last)


def take_block(model: Transformer, layer: int) -> Block:
    """The weights of one layer, dense."""
    block: Block = take_layer(model.layers, layer)
    return replace_weights(block, {name: to_dense(param.get_value()) for name, param in named_weights(block).items()})


def apply_block(model: Transformer, block: Block, layer: jax.Array, x: jax.Array) -> jax.Array:
    """One layer of whole windows: (B, T, D), each from position 0 -> (B, T, D)."""
    rows = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return model.apply_block(block, layer, x, rows, model.make_rotations(rows))[0]
