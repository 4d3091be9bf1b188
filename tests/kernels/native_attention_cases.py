"""Attention for native_driver.cc to run without Python, beside the products of native_cases.py.

Dimensions: B batch, T query, S key, N heads, K kv heads, H head dim.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from tests.kernels import oracles
from tests.kernels.native_cases import ATTENTION, DTYPES, THREADS, Case

CACHES = ("float32", "bfloat16", "int8", "int4")
"""In the order of CacheType in attention_tile.h."""

SHAPES = {
    # (B, T, S, N, K, H)
    "decode": (2, 1, 67, 6, 2, 20),
    "decode of a long cache, in pieces": (2, 1, 1100, 2, 1, 16),
    "few rows": (2, 3, 65, 2, 2, 8),
    "decode of halves of whole vectors": (2, 1, 67, 6, 2, 64),
    "prefill": (2, 70, 70, 2, 1, 34),
    "odd": (2, 9, 70, 2, 1, 33),
    "one of each": (2, 1, 1, 1, 1, 1),
    "head dim 80": (1, 5, 19, 2, 1, 80),
    "head dim 128": (2, 1, 21, 2, 1, 128),
    "head dim 256": (1, 9, 18, 1, 1, 256),
    "heads of a query in two tiles": (2, 2, 5, 70, 1, 4),
}

EMPTY = 2**31 - 1
"""Position of a slot that holds nothing."""


def draw_int4(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys or values (B, S, K, H) of 4 bits, by the definition: bytes (B, S, K, H / 2), scales of either sign bfloat16
    (B, S, K, 2), and the numbers that they are in float64."""
    *lead, width = shape
    codes = rng.integers(-8, 8, (*lead, 2, width // 2))
    scale = (rng.uniform(0.05, 0.2, (*lead, 2)) * rng.choice([-1, 1], (*lead, 2))).astype(ml_dtypes.bfloat16)
    low, high = codes[..., 0, :] % 16, codes[..., 1, :] % 16
    exact = (codes * scale.astype(np.float64)[..., None]).reshape(shape)
    return (low + 16 * high).astype(np.uint8), scale, exact


def make_case(
    name: str,
    *,
    cache: str = "float32",
    dtype: str = "float32",
    window: int = 0,
    softcap: float = 0.0,
    segments: bool = False,
    ragged: bool = False,
    page: int = 0,
) -> Case:
    """Attention of the shape of that name, drawn from its own arguments.

    Queries are at the last positions of the keys. With `ragged` rows have different lengths, and what lies in the slots
    behind them must not matter; the last row is empty, and gives zeros. With `page` the keys lie in pages of so many.
    """
    batch, queries, keys, heads, kv_heads, head_dim = SHAPES[name]
    name = f"attention: {name}, {cache}, {dtype}, {window=}, {softcap=}, {segments=}, {ragged=}, {page=}"
    rng = np.random.default_rng(list(name.encode()))
    q = rng.standard_normal((batch, queries, heads, head_dim)).astype(DTYPES[dtype])
    stored, scales, exact = [], [], []
    for _ in "kv":
        numbers = rng.standard_normal((batch, keys, kv_heads, head_dim))
        if cache == "int8":
            stored.append(rng.integers(-128, 128, numbers.shape).astype(np.int8))
            scales.append(rng.uniform(0.005, 0.02, numbers.shape[:3]).astype(np.float32))
            exact.append(stored[-1].astype(np.float64) * scales[-1][..., None])
        elif cache == "int4":
            packed, halves, exact_numbers = draw_int4(rng, numbers.shape)
            stored.append(packed)
            scales.append(halves)
            exact.append(exact_numbers)
        else:
            stored.append(numbers.astype({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[cache]))
            scales.append(np.zeros(0, np.float32))
            exact.append(stored[-1].astype(np.float64))
    at_k = np.tile(np.arange(keys, dtype=np.int32), (batch, 1))
    at_q = np.tile(np.arange(queries, dtype=np.int32) + keys - queries, (batch, 1))
    if ragged:
        lengths = np.append(rng.integers(1, keys + 1, batch - 1), 0)[:, None]
        at_k = np.where(at_k < lengths, at_k, EMPTY).astype(np.int32)
        at_q = (lengths - 1 - np.arange(queries)[::-1]).astype(np.int32)
    marks = [np.sort(rng.integers(0, 3, (batch, n)), axis=1).astype(np.int32) for n in (queries, keys)]
    if not segments:
        marks = [np.zeros(0, np.int32)] * 2
    scale = np.float32(head_dim**-0.5)
    table, pages = np.zeros((0, 0), np.int32), 0
    if page:
        table = (rng.permutation(batch * -(-keys // page)).astype(np.int32) + 1).reshape(batch, -1)
        pages = table.size + 1
        stored, scales = ([lay_in_pages(array, table, pages, page) for array in arrays] for arrays in (stored, scales))
    seen_by = (at_q.astype(np.int64), at_k.astype(np.int64), *(marks if segments else (None, None)))
    return Case(
        kind=ATTENTION,
        name=name,
        header=(
            CACHES.index(cache),
            dtype == "bfloat16",
            batch,
            queries,
            keys,
            heads,
            kv_heads,
            head_dim,
            window,
            THREADS,
            1 if page else 0,
            pages,
            page,
            table.shape[1],
        ),
        arrays=(
            q,
            *stored,
            *scales,
            at_q,
            np.zeros(0, np.int32) if page else at_k,
            *marks,
            np.array([softcap, scale], np.float32),
            table,
        ),
        dtype=dtype,
        expected=oracles.attend(q.astype(np.float64), *exact, *seen_by, window or None, softcap or None, float(scale)),
        magnitude=np.abs(exact[1]).max(),
    )


def lay_in_pages(array: np.ndarray, table: np.ndarray, pages: int, page: int) -> np.ndarray:
    """(B, S, ...) as (2, pages, page, ...): in the second layer, rows in the pages of `table` (B, M). All other bytes
    are 255, which is NaN where they are floats."""
    if not array.size:
        return array
    laid = np.full((2, pages, page, *array.shape[2:], array.itemsize), 255, np.uint8).view(array.dtype)[..., 0]
    padded = np.zeros((len(table), table.shape[1] * page, *array.shape[2:]), array.dtype)
    padded[:, : array.shape[1]] = array
    laid[1, table] = padded.reshape(*table.shape, page, *array.shape[2:])
    return laid


def list_cases() -> Iterator[Case]:
    """Every option with every cache, then every shape with every cache under both kinds of queries.

    In the last of each cache every row reads its keys: with fewer of them it must fail.
    """
    for cache in CACHES:
        for shape in ("decode", "decode of halves of whole vectors", "decode of a long cache, in pieces", "few rows"):
            yield make_case(shape, cache=cache, ragged=True)
        for shape, page in (
            ("decode", 16),
            ("decode of a long cache, in pieces", 64),
            ("prefill", 64),
            ("few rows", 3),
        ):
            if cache == "int4" and SHAPES[shape][-1] % 2:
                continue  # no halves
            yield make_case(shape, cache=cache, page=page, ragged=shape != "prefill")
            yield make_case(shape, cache=cache, page=page, window=5)
        for shape in ("decode", "prefill"):
            yield make_case(shape, cache=cache, window=3)
            yield make_case(shape, cache=cache, softcap=2.0)
            yield make_case(shape, cache=cache, segments=True, window=40, softcap=5.0)
        for shape in SHAPES:
            if cache == "int4" and SHAPES[shape][-1] % 2:
                continue  # no halves
            yield make_case(shape, cache=cache)
            if cache != "float32":
                yield make_case(shape, cache=cache, dtype="bfloat16")
