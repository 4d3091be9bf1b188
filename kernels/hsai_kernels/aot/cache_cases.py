"""The programs, for any platform, that read a cache of fewer bits than the queries have, or pages: a token, a prompt.

All are `attention forward`, and what XLA does in front of it: it widens 4-bit integers, and copies pages side by side.

Dimensions: B batch, T query, S slots, L layers, P pages, R tokens of a page, N heads, K kv heads, H head dim.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax

from hsai_kernels.aot.case import DTYPES, Case
from hsai_kernels.ops.attention.api import attention
from hsai_kernels.ops.paged_attention.api import paged_attention

NARROW = (("int4", "bfloat16"), ("int4", "float32"), ("int8", "bfloat16"), ("int8", "float32"), ("bfloat16", "float32"))
"""What a cache holds, and the dtype of the queries."""
WIDENED = tuple((cache, dtype) for cache, dtype in NARROW if cache != "int4")
"""Those that a kernel widens itself."""
PAGED = (*((dtype, dtype) for dtype in DTYPES), *(("int8", dtype) for dtype in DTYPES))
PAGES, PAGE = 40, 64
"""P and R; a row has half of the pages."""


def list_caches(platform: str, name: str, slots: int) -> Iterator[Case]:
    """One query of each of two rows, `name` being that of the same over a cache of the queries' dtype; and prompts."""
    for cache, dtype in NARROW:
        at = (_shape("int32", 2, 1), _shape("int32", 2, slots))
        yield Case(
            kernel="attention forward",
            name=f"{name}, {cache} cache",
            dtype=dtype,
            function=functools.partial(_attend, platform),
            operands=(_shape(dtype, 2, 1, 8, 128), *at, *_describe_cache(cache, 2, slots)),
            quick=cache != "int4",  # whose kernel is that of the queries' dtype
        )
    for head_dim, (cache, dtype) in itertools.product((64, 128, 256), WIDENED):
        at = (_shape("int32", 1, 512), _shape("int32", 1, 1024))
        yield Case(
            kernel="attention forward",
            name=f"a prompt of 512, head dim {head_dim}, {cache} cache",
            dtype=dtype,
            function=functools.partial(_attend, platform),
            operands=(_shape(dtype, 1, 512, 8, head_dim), *at, *_describe_cache(cache, 1, 1024, head_dim=head_dim)),
        )
    for cache, dtype in PAGED:
        pages = (_shape("int32", 2, 1), _shape("int32", 2, PAGES // 2), _shape("int32"))
        yield Case(
            kernel="attention forward",
            name=f"paged_attention, {name}{', int8 pages' if cache == 'int8' else ''}",
            dtype=dtype,
            function=functools.partial(_attend_pages, platform),
            operands=(_shape(dtype, 2, 1, 8, 128), *pages, *_describe_cache(cache, 3, PAGES, PAGE)),
        )


def _describe_cache(held: str, *lead: int, head_dim: int = 128) -> tuple[jax.ShapeDtypeStruct, ...]:
    """k and v (..., K, H), K = 2, and their scales if there are any."""
    values = _shape("uint8", *lead, 2, head_dim // 2) if held == "int4" else _shape(held, *lead, 2, head_dim)
    scales = {"int8": _shape("float32", *lead, 2), "int4": _shape("bfloat16", *lead, 2, 2)}
    return (values,) * 2 + ((scales[held],) * 2 if held in scales else ())


def _attend(platform: str, q: jax.Array, q_positions: jax.Array, kv_positions: jax.Array, *cache: jax.Array) -> Any:
    given = _name_arrays(cache)
    return attention(q, q_positions=q_positions, kv_positions=kv_positions, **given, implementation=platform)


def _attend_pages(
    platform: str, q: jax.Array, q_positions: jax.Array, table: jax.Array, layer: jax.Array, *cache: jax.Array
) -> Any:
    given = _name_arrays(cache)
    return paged_attention(q, q_positions=q_positions, table=table, layer=layer, **given, implementation=platform)


def _name_arrays(cache: tuple[jax.Array, ...]) -> dict[str, Any]:
    return dict(zip(("k", "v", "k_scale", "v_scale"), cache, strict=False))


def _shape(dtype: str, *dimensions: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dimensions, dtype)
