"""Calibration, block by block: what each weight of a block is multiplied by, and what the block hands to the next.

Only the residual stream of the calibration tokens is kept, in the host's memory; on the devices are one block and one
batch. A block is first observed with its dense weights, then solved, and the next block reads what the solved one
gives, so that it can make up for the errors before it.

N sequences, B of them in a batch, T tokens each, D embed.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from hsai.errors import InputError
from hsai.formats import take_layer, to_dense
from hsai.formats.observed import Notes, Observed, sum_squares
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer
from hsai.models.layers import is_matrix
from hsai.models.transformer import Block

Grams = Mapping[str, jax.Array]
"""X^T X (D, D) float32 of the input of each of a block's matrices, by the weight's name within the block."""


def stream_blocks(
    model: Transformer,
    tokens: np.ndarray,
    *,
    batch: int,
    solve: Callable[[int, Block, Grams], Block],
    recall: Callable[[int, Block], Block | None] | None = None,
    finish: Callable[[jax.Array], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Calls `solve` with each block in turn, on what the blocks that it returned before make of `tokens`.

    Args:
      model: with dense weights.
      tokens: int32 (N, T) in [0, V).
      batch: B, sequences at a time.
      solve: (number of the layer, block with dense weights, grams) -> the block that the next one follows.
      recall: (number, block with dense weights) -> what `solve` returned for it in an earlier run, or None.
      finish: called last with X^T X (D, D) float32 of what the head is multiplied by.
      progress: called with ("calibrating", layers done, layers in all).
    Raises:
      InputError: activations are not finite, naming the layer.
    """
    config = model.config
    count, length = tokens.shape
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    starts = range(0, count, batch)
    embed = jax.jit(model.embed_tokens)
    hidden = np.empty((count, length, config.embed), jnp.dtype(config.dtype))
    for start in starts:
        hidden[start : start + batch] = embed(jnp.asarray(tokens[start : start + batch]))

    @jax.jit
    def observe(block: Block, layer: jax.Array, x: jax.Array) -> list[jax.Array]:
        notes = Notes()
        weights = {
            name: Observed(param.get_value(), name, notes)
            for name, param in named_weights(block).items()
            if is_matrix(param)
        }
        _apply(model, replace_weights(block, weights), layer, x, positions)
        owner.update(notes.owner)
        return notes.grams

    @functools.partial(jax.jit, donate_argnums=2)
    def forward(block: Block, layer: jax.Array, x: jax.Array) -> jax.Array:
        return _apply(model, block, layer, x, positions)

    owner: dict[str, int] = {}
    for layer in range(config.layers):
        block = take_block(model, layer)
        number = jnp.int32(layer)
        solved = None if recall is None else recall(layer, block)
        if solved is None:
            sums: list[jax.Array] = []
            for start in starts:
                found = observe(block, number, jnp.asarray(hidden[start : start + batch]))
                sums = found if not sums else [a + b for a, b in zip(sums, found, strict=True)]
            grams = {name: sums[index] for name, index in owner.items()}
            for name, gram in grams.items():
                if not bool(jnp.all(jnp.isfinite(gram))):
                    raise InputError(f"layer {layer}: what {name} is multiplied by is NaN or infinite in calibration")
            solved = solve(layer, block, grams)
        if layer + 1 < config.layers or finish is not None:
            for start in starts:
                hidden[start : start + batch] = forward(solved, number, jnp.asarray(hidden[start : start + batch]))
        if progress is not None:
            progress("calibrating", layer + 1, config.layers)
    if finish is not None:
        measure = jax.jit(lambda x: sum_squares(model.final_norm(x)))
        finish(sum((measure(jnp.asarray(hidden[start : start + batch])) for start in starts), start=jnp.float32(0)))


def take_block(model: Transformer, layer: int) -> Block:
    """The weights of one layer, dense."""
    block: Block = take_layer(model.layers, layer)
    return replace_weights(block, {name: to_dense(param.get_value()) for name, param in named_weights(block).items()})


def _apply(model: Transformer, block: Block, layer: jax.Array, x: jax.Array, positions: jax.Array) -> jax.Array:
    rows = jnp.broadcast_to(positions, x.shape[:2])
    return model.apply_block(block, layer, x, rows, model.make_rotations(rows))[0]
