"""A vocabulary that is split over devices inside of jax.shard_map: whose word a target is, and sums over all words.

With `split`, the mesh axes it is split over, empty, one device has all of it, and nothing here does anything.

Dimensions: T tokens, D embed, V vocabulary of a device.
"""

import jax
import jax.numpy as jnp

ELSEWHERE = -2
"""A target that is another device's: no column of any backend has this number."""

Split = tuple[str, ...]


def count_parts(split: Split) -> int:
    """Over how many devices the vocabulary is split."""
    return jax.lax.axis_size(split) if split else 1


def find_own(targets: jax.Array, vocab: int, split: Split) -> jax.Array:
    """int32 (..., T): targets as columns of this device's part of `vocab` words, or ELSEWHERE."""
    if not split:
        return targets
    own = targets - jax.lax.axis_index(split) * vocab
    return jnp.where((own >= 0) & (own < vocab), own, ELSEWHERE)


def join_parts(log_sum: jax.Array, picked: jax.Array, split: Split) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the sum over all words, from those of each part, and the logit of the target, from its owner's.

    float32 (..., T) each; `picked` is zero for a target that is elsewhere.
    """
    if not split:
        return log_sum, picked
    largest = jax.lax.pmax(log_sum, split)
    total, picked = jax.lax.psum((jnp.exp(log_sum - largest), picked), split)
    return largest + jnp.log(total), picked


def add_parts(gradient: jax.Array, split: Split) -> jax.Array:
    """float32: the gradient of x over all words, from that over each part."""
    return jax.lax.psum(gradient, split) if split else gradient


def collect_vocabulary(w: jax.Array, split: Split) -> jax.Array:
    """(D, V) -> (D, V * devices): all words; differentiable in this device's own, which are all that it answers for."""
    if not split:
        return w
    everything = jax.lax.all_gather(jax.lax.stop_gradient(w), split, axis=1, tiled=True)
    return jax.lax.dynamic_update_slice_in_dim(everything, w, jax.lax.axis_index(split) * w.shape[1], axis=1)
