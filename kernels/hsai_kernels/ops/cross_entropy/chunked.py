"""Linear + cross-entropy in plain jax whose memory is linear in tokens and vocabulary: for training, on every platform.

Logits exist for one block of tokens and of vocabulary at a time, under a running maximum and sum (online softmax:
Milakov and Gimelshein, 1805.02867). The backward pass makes them again from x and w and what the forward pass keeps,
one logarithm a token: 4 products where the reference has 3, and none of its 3 arrays of (T, V).

Where the compiler splits over a mesh the vocabulary stays whole: a block of it might be one device's work while the
others wait. For the same reason leading dimensions stay apart from T, and blocks are cut from T alone.

Dimensions: B leading dimensions, T tokens, D embed, V vocabulary, C tokens and E vocabulary a block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import count_devices
from hsai_kernels.ops.cross_entropy.vocabulary import Split, add_parts, find_own, join_parts
from hsai_kernels.tuning import choose_tile

WIDE = {"preferred_element_type": jnp.float32}
BLOCK_TOKENS = 512
BLOCK_VOCAB = 8192
"""The kernel's own; tuning.py may know better ones for a device."""
Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""x, w, targets, and the logarithm of each token's sum."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is fixed when the program is traced."""

    softcap: float | None
    z_loss: float
    block_tokens: int
    block_vocab: int
    split: Split


def cross_entropy_chunked(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None,
    z_loss: float,
    chunk: int | None,
    split: Split = (),
    block_vocab: int | None = None,
) -> jax.Array:
    """float32 (..., T); arguments as in api.py, already validated, targets in [0, V)."""
    *lead, tokens, embed = x.shape
    if 0 in x.shape:
        return jnp.zeros(targets.shape, jnp.float32)
    vocab = w.shape[1]
    tile = choose_tile(
        "cross_entropy chunked",
        dtype=x.dtype,
        shape=f"D {embed}",
        own={"tokens": BLOCK_TOKENS, "words": BLOCK_VOCAB},
        fit=lambda sides: {"tokens": min(sides["tokens"], tokens), "words": min(sides["words"], vocab)},
    )
    options = Options(
        softcap=softcap,
        z_loss=z_loss,
        block_tokens=min(chunk or tile["tokens"], tokens),
        block_vocab=vocab if count_devices() > 1 else min(block_vocab or tile["words"], vocab),
        split=split,
    )
    loss = _compute(options, x.reshape(-1, tokens, embed), w, targets.reshape(-1, tokens))
    return loss.reshape(*lead, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compute(options: Options, x: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
    return _forward(options, x, w, targets)[0]


def _forward(options: Options, x: jax.Array, w: jax.Array, targets: jax.Array) -> tuple[jax.Array, Saved]:
    """The loss of each token, and what the backward pass needs."""
    rounded = w.astype(x.dtype)

    def read_tokens(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden, targets = block
        targets = find_own(targets, w.shape[1], options.split)

        def add(sums: tuple[jax.Array, jax.Array, jax.Array], start: jax.Array) -> tuple[tuple, None]:
            largest, total, picked = sums
            logits, columns = _make_logits(options, hidden, rounded, start)
            logits = jnp.where(columns >= 0, logits, -jnp.inf)
            chosen = jnp.sum(jnp.where(columns == targets[..., None], logits, 0.0), axis=-1)
            higher = jnp.maximum(largest, jnp.max(logits, axis=-1))
            total = total * jnp.exp(largest - higher) + jnp.sum(jnp.exp(logits - higher[..., None]), axis=-1)
            return (higher, total, picked + chosen), None

        zeros = jnp.zeros(targets.shape, jnp.float32)
        start = (jnp.full(targets.shape, -jnp.inf), zeros, zeros)
        (largest, total, picked), _ = jax.lax.scan(add, start, _list_starts(options, w))
        log_sum, picked = join_parts(largest + jnp.log(total), picked, options.split)
        return None, (log_sum - picked + options.z_loss * jnp.square(log_sum), log_sum)

    _, (loss, log_sum) = jax.lax.scan(
        read_tokens, None, (split_tokens(x, options.block_tokens), split_tokens(targets, options.block_tokens))
    )
    return join_tokens(loss, x), (x, w, targets, log_sum)


def _backward(options: Options, saved: Saved, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, targets, log_sum = saved
    rounded = w.astype(x.dtype)

    def read_tokens(d_w: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, log_sum, grad = block
        targets = find_own(targets, w.shape[1], options.split)
        # d loss / d log_sum is one, and what z_loss adds.
        pull = grad * (1.0 + 2.0 * options.z_loss * log_sum)

        def add(sums: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple, None]:
            d_hidden, d_w = sums
            logits, columns = _make_logits(options, hidden, rounded, start)
            d_logits = jnp.where(columns >= 0, jnp.exp(logits - log_sum[..., None]) * pull[..., None], 0.0)
            d_logits -= jnp.where(columns == targets[..., None], grad[..., None], 0.0)
            if options.softcap is not None:
                d_logits *= 1.0 - jnp.square(logits / options.softcap)
            d_logits = d_logits.astype(x.dtype)
            d_hidden += jnp.einsum("bce,de->bcd", d_logits, _slice(options, rounded, start), **WIDE)
            # (D, E), not (E, D) to be turned: on a CPU that takes a fifth of a training step.
            part = jnp.einsum("bcd,bce->de", hidden, d_logits, **WIDE)
            return (d_hidden, _add_to(options, d_w, part, start)), None

        sums = (jnp.zeros(hidden.shape, jnp.float32), d_w)
        (d_hidden, d_w), _ = jax.lax.scan(add, sums, _list_starts(options, w))
        return d_w, add_parts(d_hidden, options.split).astype(x.dtype)

    blocks = (
        split_tokens(x, options.block_tokens),
        split_tokens(targets, options.block_tokens),
        log_sum,
        split_tokens(grad, options.block_tokens),
    )
    d_w, d_x = jax.lax.scan(read_tokens, jnp.zeros(w.shape, jnp.float32), blocks)
    return join_tokens(d_x, x), d_w.astype(w.dtype), None


_compute.defvjp(_forward, _backward)


def _list_starts(options: Options, w: jax.Array) -> jax.Array:
    """int32 (blocks,): where blocks of vocabulary would start if the last one were allowed to reach beyond V."""
    return jnp.arange(0, w.shape[1], options.block_vocab, dtype=jnp.int32)


def _slice(options: Options, w: jax.Array, start: jax.Array) -> jax.Array:
    """(D, E): the block at `start`; the last one of a V that E does not divide is moved back to end with V."""
    if options.block_vocab == w.shape[1]:
        return w
    return jax.lax.dynamic_slice_in_dim(w, start, options.block_vocab, axis=1)


def _add_to(options: Options, d_w: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """(D, V) with `part` (D, E) added at the block's columns."""
    part += _slice(options, d_w, start)
    if options.block_vocab == d_w.shape[1]:
        return part
    return jax.lax.dynamic_update_slice_in_dim(d_w, part, start, axis=1)


def _make_logits(options: Options, hidden: jax.Array, w: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 (B, C, E), and int32 (E,): which column of w each is, or -1 for one that an earlier block has had."""
    logits = jnp.einsum("bcd,de->bce", hidden, _slice(options, w, start), **WIDE)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    first = jnp.minimum(start, w.shape[1] - options.block_vocab)
    columns = first + jnp.arange(options.block_vocab, dtype=jnp.int32)
    return logits, jnp.where(columns >= start, columns, -1)


def split_tokens(x: jax.Array, block: int) -> jax.Array:
    """(B, T, ...) -> (blocks, B, C, ...), zeros behind T: padded tokens have a gradient of zero, and are cut off."""
    batch, tokens, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -tokens % block), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(x.reshape(batch, -1, block, *rest), 1, 0)


def join_tokens(x: jax.Array, like: jax.Array) -> jax.Array:
    """(blocks, B, C, ...) -> (B, T, ...)."""
    batch, tokens, *_ = like.shape
    return jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :tokens]
