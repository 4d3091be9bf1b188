"""Attention: training, and reading caches of each type, row by row or in pages.

XLA's own is jax.nn.dot_product_attention, over a cache that is widened in the same program, and of pages gathered.
Caches that one query reads come in copies, as weights do (bench/products.py): each layer of a model has its own.

Dimensions: B batch, T query, S key, N heads, K kv heads, H head dim, R tokens of a page.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.activations import find_dtype, name_case
from bench.programs import draw, make_reader, make_runner
from bench.timing import Case, Runner
from hsai.models.cache import quantize_halves, quantize_heads
from hsai_kernels import attention, paged_attention
from hsai_kernels.ops.attention.reference import read_cache

QUANTIZE = {"int8": quantize_heads, "int4": quantize_halves}
"""Of caches of integers: numbers -> codes and scales."""

PAGE = 16
"""Tokens of a page."""


def make_attention(*, quick: bool) -> Iterator[Case]:
    """Training on rows of 2048 tokens, forward and backward; decoding and prefill over caches of each type."""
    heads, kv_heads, head_dim = (4, 2, 64) if quick else (16, 4, 64)
    length = 1024 if quick else 2048
    shapes = (1, length, heads, head_dim), *[(1, length, kv_heads, head_dim)] * 2
    operands = [array.astype(find_dtype()) for array in draw(*shapes)]
    at = jnp.arange(length, dtype=jnp.int32)[None]

    def train(implementation: str | None, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out = attention(q, k, v, q_positions=at, kv_positions=at, implementation=implementation)
            return jnp.sum(jnp.square(out))

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    def train_xla(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return jax.value_and_grad(lambda *qkv: jnp.sum(jnp.square(_attend_xla(*qkv, causal=True))), (0, 1, 2))(q, k, v)

    yield Case(
        name=name_case(f"attention train {length} tokens {heads}/{kv_heads} heads"),
        nbytes=sum(array.nbytes for array in operands),
        # 2 products forward and 5 backward (FlashAttention-2, 2307.08691, section 4.1), of which causality halves each.
        flops=7 * heads * length**2 * head_dim,
        metric="GFLOP/s",
        ours=make_runner("ours", functools.partial(train, None), operands),
        peers=[
            make_runner("xla", train_xla, operands, disturbs=True),
            make_runner("reference", functools.partial(train, "reference"), operands, disturbs=True),
        ],
    )

    # Queries that follow one another at the end of a cache which they fill: one of 4 rows, and a prompt of 512 tokens.
    for batch, queries, slots in ((1 if quick else 4, 1, 4096), (1, 512, 512)):
        for cache in dict.fromkeys((find_dtype().name, "bfloat16", "int8", "int4")):
            yield _make_forward(cache, batch, queries, slots)


def _attend_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    causal: bool,
) -> jax.Array:
    """What XLA makes of jax's attention over all keys, or those at a query's own place and before."""
    k, v = (read_cache(cache, scale, q.dtype).astype(q.dtype) for cache, scale in ((k, k_scale), (v, v_scale)))
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


def _store(cache: str, *parts: jax.Array) -> dict[str, jax.Array]:
    """Keys and values (..., K, H) as a cache of some type holds them: operands of kernels, by name."""
    operands: dict[str, jax.Array] = {}
    for name, part in zip("kv", parts, strict=True):
        if cache in QUANTIZE:
            operands[name], operands[f"{name}_scale"] = QUANTIZE[cache](part)
        else:
            operands[name] = part.astype(cache)
    return operands


def _make_forward(cache: str, batch: int, queries: int, slots: int, heads: int = 32, kv_heads: int = 8) -> Case:
    """Decoding or prefill of queries of head dim 128, over a cache of some type."""
    head_dim = 128
    q, *parts = draw((batch, queries, heads, head_dim), *[(batch, slots, kv_heads, head_dim)] * 2)
    q = q.astype(find_dtype())
    operands = _store(cache, *parts)
    at = jnp.tile(jnp.arange(slots), (batch, 1))
    marks = {"q_positions": at[:, slots - queries :], "kv_positions": at}
    seen = sum(slots - queries + 1 + i for i in range(queries))

    def attend(implementation: str | None, q: jax.Array, operands: dict[str, jax.Array]) -> jax.Array:
        return attention(q, **operands, **marks, implementation=implementation)

    def attend_xla(q: jax.Array, operands: dict[str, jax.Array]) -> jax.Array:
        # The only query of a row sees all of its cache.
        return _attend_xla(q, **operands, causal=queries > 1)

    # A prompt waits for arithmetic, wherever its keys lie; a query for the memory that they come from.
    make = make_reader if queries == 1 else _make_repeated
    return Case(
        name=name_case(f"attention {cache} {batch}x{queries} of {slots} slots {heads}/{kv_heads} heads"),
        nbytes=sum(array.nbytes for array in operands.values()),
        flops=4 * batch * heads * seen * head_dim,
        metric="GB/s" if queries == 1 else "GFLOP/s",
        ours=make("ours", functools.partial(attend, None), q, operands),
        # The chunked path is the reference where all scores fit one of its blocks, as they do here.
        peers=[
            make("xla", attend_xla, q, operands, disturbs=True),
            make("reference", functools.partial(attend, "reference"), q, operands, most=1, disturbs=True),
        ],
    )


def _make_repeated(
    name: str, function: Callable[..., jax.Array], *arguments: Any, most: int = 1, disturbs: bool = False
) -> Runner:
    return make_runner(name, function, arguments, disturbs=disturbs)


def make_paged_attention(*, quick: bool) -> Iterator[Case]:
    """Decoding: a token a row, over rows of full pages that lie anywhere."""
    for shape in ((2, 256, 4, 2, 64), (16, 2048, 32, 8, 128))[: 1 if quick else 2]:
        for cache in dict.fromkeys((find_dtype().name, "int8", "int4")):
            yield _make_paged(cache, *shape)


def _make_paged(cache: str, batch: int, slots: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    pages = batch * slots // PAGE
    q, *parts = draw((batch, 1, heads, head_dim), *[(1, pages, PAGE, kv_heads, head_dim)] * 2)
    q, operands = q.astype(find_dtype()), _store(cache, *parts)
    order = np.random.default_rng(3).permutation(pages).reshape(batch, -1)
    table = jnp.asarray(order, jnp.int32)
    marks = {"table": table, "q_positions": jnp.full((batch, 1), slots - 1, jnp.int32), "layer": jnp.int32(0)}

    def attend(implementation: str | None, q: jax.Array, operands: dict[str, jax.Array]) -> jax.Array:
        return paged_attention(q=q, **operands, **marks, implementation=implementation)

    def attend_xla(q: jax.Array, operands: dict[str, jax.Array]) -> jax.Array:
        rows = {name: pages[0, table].reshape(batch, slots, *pages.shape[3:]) for name, pages in operands.items()}
        return _attend_xla(q, **rows, causal=False)

    return Case(
        name=name_case(f"paged_attention {cache} {batch}x1 of {slots} slots {heads}/{kv_heads} heads of {head_dim}"),
        nbytes=sum(array.nbytes for array in operands.values()),
        flops=4 * batch * heads * slots * head_dim,
        metric="GB/s",
        ours=make_reader("ours", functools.partial(attend, None), q, operands),
        peers=[
            make_reader("xla", attend_xla, q, operands, disturbs=True),
            make_reader("reference", functools.partial(attend, "reference"), q, operands, most=1, disturbs=True),
        ],
    )
