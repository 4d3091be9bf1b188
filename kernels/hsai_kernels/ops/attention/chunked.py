"""Attention whose memory is linear in the length, in plain jax: for training on long rows, on every platform.

Scores exist for one block of queries and keys at a time, under a running maximum and sum (online softmax: Milakov and
Gimelshein, 1805.02867); the backward pass makes them again from what the forward pass keeps, which is its output and
the logarithm of each row's sum (FlashAttention-2: Dao, 2307.08691, algorithms 1 and 2). A block in which no query sees
any key (above the diagonal, beyond the window, in another document) is passed over where one device decides alone.

Dimensions: B batch, T query, S key, N heads, K kv heads, G = N / K, H head dim, C queries and E keys a block.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import count_devices
from hsai_kernels.ops.attention.reference import attention_reference, find_visible, read_cache
from hsai_kernels.tuning import choose_tile

BLOCK_QUERIES = 512
BLOCK_KEYS = 512
"""The kernel's own; tuning.py may know better ones for a device."""
LOWEST = float(jnp.finfo(jnp.float32).min)
Marks = tuple[jax.Array, jax.Array | None]
"""Positions and segments of some queries or keys."""
Sums = tuple[jax.Array, jax.Array, jax.Array]
"""What a block adds to: forward, the largest score, the sum of weights and of weighted values; backward, gradients."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is fixed when the program is traced."""

    window: int | None
    softcap: float | None
    scale: float
    block_queries: int
    block_keys: int


def attention_chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
    block_queries: int | None = None,
    block_keys: int | None = None,
) -> jax.Array:
    """Softmax attention over the visible keys; arguments and shapes as in api.py, already validated.

    Where all scores are no more than those of a block (short rows; decoding, over however long a cache) they are the
    reference's: there is nothing to save, and its backward pass computes nothing twice.
    """
    queries, keys = q.shape[1], k.shape[1]
    tile = choose_tile(
        "attention chunked",
        dtype=q.dtype,
        shape=f"head dim {q.shape[3]}",
        own={"queries": BLOCK_QUERIES, "keys": BLOCK_KEYS},
        fit=lambda sides: {"queries": queries, "keys": keys} if queries * keys <= math.prod(sides.values()) else sides,
    )
    block_queries, block_keys = block_queries or tile["queries"], block_keys or tile["keys"]
    if queries * keys <= block_queries * block_keys:
        at = (q_positions, kv_positions, q_segments, kv_segments)
        return attention_reference(q, k, v, *at, k_scale, v_scale, window=window, softcap=softcap, scale=scale)
    k, v = read_cache(k, k_scale, q.dtype), read_cache(v, v_scale, q.dtype)
    options = Options(window=window, softcap=softcap, scale=scale, block_queries=block_queries, block_keys=block_keys)
    return _attend(options, q, k, v, (q_positions, q_segments), (kv_positions, kv_segments))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, at_q: Marks, at_k: Marks) -> jax.Array:
    return _forward(options, q, k, v, at_q, at_k)[0]


def _forward(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, at_q: Marks, at_k: Marks
) -> tuple[jax.Array, tuple[Any, ...]]:
    """The output, and what the backward pass needs: all arguments, the output, and each row's log of its sum."""
    keys, values, key_marks = _split_keys(options, k), _split_keys(options, v), _split_marks(options.block_keys, at_k)

    def attend_block(block: tuple[jax.Array, Marks]) -> tuple[jax.Array, jax.Array]:
        queries, marks = block

        def add(carry: Sums, other: tuple[Any, ...]) -> tuple[Sums, None]:
            index, keys, values, key_marks = other
            visible = _find_visible(options, index, k.shape[1], marks, key_marks)

            def update() -> Sums:
                largest, total, out = carry
                scores = jnp.where(visible, _score(options, queries, keys), LOWEST)
                higher = jnp.maximum(largest, jnp.max(scores, axis=-1))
                weights = jnp.where(visible, jnp.exp(scores - higher[..., None]), 0.0)
                shrink = jnp.exp(largest - higher)
                product = _multiply("bkgce,bkeh->bkgch", weights.astype(v.dtype), values)
                return higher, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + product

            return _unless_hidden(visible, update, lambda: carry), None

        rows = queries.shape[:-1]
        start = (jnp.full(rows, LOWEST), jnp.zeros(rows), jnp.zeros(queries.shape, jnp.float32))
        (largest, total, out), _ = jax.lax.scan(add, start, (jnp.arange(keys.shape[0]), keys, values, key_marks))
        total = jnp.where(total == 0.0, 1.0, total)
        return (out / total[..., None]).astype(q.dtype), largest + jnp.log(total)

    out, logs = jax.lax.map(attend_block, (_split_queries(options, q, k), _split_marks(options.block_queries, at_q)))
    out = _join_queries(out, q)
    return out, (q, k, v, at_q, at_k, out, logs)


def _backward(options: Options, saved: tuple[Any, ...], grad: jax.Array) -> tuple[Any, ...]:
    q, k, v, at_q, at_k, out, logs = saved
    keys, values, key_marks = _split_keys(options, k), _split_keys(options, v), _split_marks(options.block_keys, at_k)
    # How much each row's weights pull together: sum_s weight * d weight, which is d out . out.
    pull = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    blocks = (
        _split_queries(options, q, k),
        _split_queries(options, grad, k),
        _split_queries(options, pull, k)[..., 0],
        logs,
        _split_marks(options.block_queries, at_q),
    )

    def walk_block(sums: tuple[jax.Array, jax.Array], block: tuple[Any, ...]) -> tuple[Any, jax.Array]:
        queries, grad, pull, logs, marks = block

        def add(d_queries: jax.Array, other: tuple[Any, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            index, keys, values, key_marks, d_keys, d_values = other
            visible = _find_visible(options, index, k.shape[1], marks, key_marks)

            def update() -> Sums:
                scores = _score(options, queries, keys)
                weights = jnp.where(visible, jnp.exp(scores - logs[..., None]), 0.0)
                d_weights = _multiply("bkgch,bkeh->bkgce", grad, values)
                d_scores = weights * (d_weights - pull[..., None]) * options.scale
                if options.softcap is not None:
                    d_scores *= 1.0 - jnp.square(scores / options.softcap)
                d_scores = d_scores.astype(q.dtype)
                return (
                    d_queries + _multiply("bkgce,bkeh->bkgch", d_scores, keys),
                    d_keys + _multiply("bkgce,bkgch->bkeh", d_scores, queries),
                    d_values + _multiply("bkgce,bkgch->bkeh", weights.astype(v.dtype), grad),
                )

            d_queries, d_keys, d_values = _unless_hidden(visible, update, lambda: (d_queries, d_keys, d_values))
            return d_queries, (d_keys, d_values)

        start = jnp.zeros(queries.shape, jnp.float32)
        d_queries, sums = jax.lax.scan(add, start, (jnp.arange(keys.shape[0]), keys, values, key_marks, *sums))
        return sums, d_queries

    start = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32))
    (d_keys, d_values), d_queries = jax.lax.scan(walk_block, start, blocks)
    d_k, d_v = (_join_keys(part, k).astype(k.dtype) for part in (d_keys, d_values))
    return _join_queries(d_queries, q).astype(q.dtype), d_k, d_v, None, None


_attend.defvjp(_forward, _backward)


def _multiply(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _score(options: Options, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """float32 (B, K, G, C, E)."""
    scores = _multiply("bkgch,bkeh->bkgce", queries, keys) * options.scale
    return scores if options.softcap is None else options.softcap * jnp.tanh(scores / options.softcap)


def _find_visible(options: Options, index: jax.Array, keys: int, at_q: Marks, at_k: Marks) -> jax.Array:
    """bool (B, 1, 1, C, E): what the queries of a block see of key block `index`; the last one's padding is no key."""
    visible = find_visible(at_q[0], at_k[0], at_q[1], at_k[1], window=options.window)
    real = index * options.block_keys + jnp.arange(options.block_keys) < keys
    return (visible & real)[:, None, None]


def _unless_hidden(visible: jax.Array, update: Callable[[], Sums], keep: Callable[[], Sums]) -> Sums:
    """`update()` if anything is visible. Split over a mesh always: all devices would have to agree on each block."""
    if count_devices() > 1:
        return update()
    result: Sums = jax.lax.cond(jnp.any(visible), update, keep)
    return result


def _pad(x: jax.Array, block: int) -> jax.Array:
    """Zeros behind axis 1 up to whole blocks. A padded query may see keys: what it gives is cut off, its gradient is
    zero."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)])


def _split_queries(options: Options, x: jax.Array, k: jax.Array) -> jax.Array:
    """(B, T, N, H) -> (blocks, B, K, G, C, H)."""
    batch, _, heads, head_dim = x.shape
    groups = (k.shape[2], heads // k.shape[2])
    x = _pad(x, options.block_queries).reshape(batch, -1, options.block_queries, *groups, head_dim)
    return x.transpose(1, 0, 3, 4, 2, 5)


def _join_queries(x: jax.Array, like: jax.Array) -> jax.Array:
    """(blocks, B, K, G, C, H) -> (B, T, N, H)."""
    batch, length, heads, head_dim = like.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, head_dim)[:, :length]


def _split_keys(options: Options, x: jax.Array) -> jax.Array:
    """(B, S, K, H) -> (blocks, B, K, E, H)."""
    batch, _, heads, head_dim = x.shape
    return _pad(x, options.block_keys).reshape(batch, -1, options.block_keys, heads, head_dim).transpose(1, 0, 3, 2, 4)


def _join_keys(x: jax.Array, like: jax.Array) -> jax.Array:
    """(blocks, B, K, E, H) -> (B, S, K, H)."""
    batch, length, heads, head_dim = like.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, head_dim)[:, :length]


def _split_marks(block: int, marks: Marks) -> Marks:
    """Positions and segments (B, length) -> (blocks, B, block) each."""
    split: Marks = jax.tree.map(lambda x: _pad(x, block).reshape(x.shape[0], -1, block).swapaxes(0, 1), marks)
    return split
