"""paged_attention: every backend against the float64 oracle over rows that share pages, and what it refuses."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import pack_halves, paged_attention
from hsai_kernels.ops.attention.chunked import BLOCK_KEYS, BLOCK_QUERIES
from hsai_kernels.ops.paged_attention.api import BACKENDS
from hsai_kernels.ops.paged_attention.shapes import LARGER, SHAPES, PagedShape
from tests.kernels import oracles
from tests.kernels.refusals import list_wrong_caps, list_wrong_counts, list_wrong_factors
from tests.kernels.tolerances import assert_close

IMPLEMENTATIONS = sorted(BACKENDS.keys() - {"gpu", "tpu"})
CACHES = ("float32", "bfloat16", "uint16", "int8", "int4")
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"window": 3}, {"window": 40, "softcap": 5.0, "scale": 0.2})
NOWHERE = 2**20
"""An entry of the table that names no page."""


def draw(shape: PagedShape, dtype: str, cache: str) -> tuple[dict[str, jax.Array], list[np.ndarray]]:
    """The arrays of a call, and keys and values of its rows in float64 (B, S, K, H), zeros where nothing lies.

    Pages lie in any order, a row's first one is that of all, and no page that a row does not see is named; all that no
    query sees is NaN, or the widest integer.
    """
    rng = np.random.default_rng(shape.page * 100 + shape.head_dim)
    batch, slots = len(shape.lengths), shape.row_pages * shape.page
    pages = 1 + batch * shape.row_pages
    table = np.full((batch, shape.row_pages), NOWHERE, np.int32)
    free = iter(rng.permutation(pages))
    shared = next(free)
    for row, length in enumerate(shape.lengths):
        for index in range(-(-length // shape.page)):
            table[row, index] = shared if index == 0 and length >= shape.page else next(free)
    arrays = {"table": jnp.asarray(table), "layer": jnp.asarray(1, jnp.int32)}
    sizes = (3, pages, shape.page, shape.kv_heads, shape.head_dim)
    used = np.zeros(sizes[:3], bool)
    for row, length in enumerate(shape.lengths):
        for token in range(length):
            used[1, table[row, token // shape.page], token % shape.page] = True
    exact = []
    for name in "kv":
        if cache == "int4":
            codes = np.where(used[..., None, None], rng.integers(-8, 8, sizes), -8).astype(np.int8)
            halves = codes.reshape(*sizes[:4], 2, -1)
            drawn = rng.uniform(-0.2, 0.2, (*sizes[:4], 2))
            scales = jnp.asarray(np.where(used[..., None, None], drawn, np.nan), jnp.bfloat16)
            bits = jax.lax.bitcast_convert_type(scales, jnp.uint16)
            arrays |= {name: pack_halves(jnp.asarray(halves)), f"{name}_scale": bits}
            numbers = (halves * np.asarray(scales, np.float64)[..., None]).reshape(sizes)
        elif cache == "int8":
            codes = np.where(used[..., None, None], rng.integers(-127, 128, sizes), -128).astype(np.int8)
            scales = np.where(used[..., None], rng.uniform(0.005, 0.02, sizes[:4]), np.nan).astype(np.float32)
            arrays |= {name: jnp.asarray(codes), f"{name}_scale": jnp.asarray(scales)}
            numbers = codes.astype(np.float64) * scales[..., None]
        else:
            kind = "bfloat16" if cache == "uint16" else cache
            values = jnp.asarray(np.where(used[..., None, None], rng.standard_normal(sizes), np.nan), kind)
            numbers = np.asarray(values, np.float64)
            arrays[name] = jax.lax.bitcast_convert_type(values, jnp.uint16) if cache == "uint16" else values
        rows = np.zeros((batch, slots, *sizes[3:]))
        for row, length in enumerate(shape.lengths):
            for token in range(length):
                rows[row, token] = numbers[1, table[row, token // shape.page], token % shape.page]
        exact.append(rows)
    ends = np.array(shape.lengths)[:, None]
    arrays["q_positions"] = jnp.asarray(np.maximum(ends - np.arange(shape.queries)[::-1] - 1, -1), jnp.int32)
    q = rng.standard_normal((batch, shape.queries, shape.heads, shape.head_dim))
    return arrays | {"q": jnp.asarray(q, dtype)}, exact


def ask_oracle(arrays: dict[str, jax.Array], exact: list[np.ndarray], **options: Any) -> np.ndarray:
    q = np.asarray(arrays["q"], np.float64)
    slots = np.broadcast_to(np.arange(exact[0].shape[1]), exact[0].shape[:2])
    settings = {"window": None, "softcap": None, "scale": q.shape[-1] ** -0.5} | options
    at = (np.asarray(arrays["q_positions"], np.int64), slots, None, None)
    return oracles.attend(q, *exact, *at, **settings)


def attend(arrays: dict[str, jax.Array], implementation: str, **options: Any) -> jax.Array:
    return jax.jit(functools.partial(paged_attention, implementation=implementation, **options))(**arrays)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_every_backend_matches_the_oracle(index: int, implementation: str) -> None:
    """Every shape, cache and option, if not each with each: what they share with `attention` is tested there."""
    arrays, exact = draw(SHAPES[index], "float32", CACHES[index % len(CACHES)])
    options = OPTIONS[index % len(OPTIONS)]
    out = attend(arrays, implementation, **options)
    assert out.dtype == jnp.float32
    assert_close(out, ask_oracle(arrays, exact, **options), float(np.abs(exact[1]).max()), "float32")


def test_long_prompts_match_the_oracle() -> None:
    """Over more queries and keys than a block has: chunked attention leaves fewer to the reference."""
    for size, block in ((LARGER.queries, BLOCK_QUERIES), (LARGER.row_pages * LARGER.page, BLOCK_KEYS)):
        assert size > block and size % block
    arrays, exact = draw(LARGER, "float32", "float32")
    expected = ask_oracle(arrays, exact)
    for implementation in IMPLEMENTATIONS:
        assert_close(attend(arrays, implementation), expected, float(np.abs(exact[1]).max()), "float32")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_every_instruction_set_matches_the_oracle(instruction_set: None, index: int, cache: str) -> None:
    """Decoding and prefill over every cache; what is not named, or lies behind a row, is never looked at."""
    if cache == "int4" and SHAPES[index].head_dim % 2:
        pytest.skip("4-bit integers come in pairs")
    arrays, exact = draw(SHAPES[index], "float32", cache)
    options = OPTIONS[(index + CACHES.index(cache)) % len(OPTIONS)]
    out = attend(arrays, "cpu", **options)
    assert_close(out, ask_oracle(arrays, exact, **options), float(np.abs(exact[1]).max()), "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cache", ["uint16", "int8"])
def test_bfloat16_queries(cache: str, implementation: str) -> None:
    arrays, exact = draw(SHAPES[1], "bfloat16", cache)
    out = attend(arrays, implementation)
    assert out.dtype == jnp.bfloat16
    assert_close(out, ask_oracle(arrays, exact), float(np.abs(exact[1]).max()), "bfloat16")


def test_a_row_has_the_same_bits_in_any_company(instruction_set: None) -> None:
    """Alone or among longer ones, which are read in pieces; over whatever room the table has."""
    shape = PagedShape(lengths=(37, 2500, 1), row_pages=45, page=64, queries=1, heads=4, kv_heads=2, head_dim=64)
    arrays, _ = draw(shape, "float32", "float32")
    together = np.asarray(attend(arrays, "cpu"))
    for row, width in ((0, 1), (1, 40)):
        alone = arrays | {name: arrays[name][row : row + 1] for name in ("q", "table", "q_positions")}
        alone["table"] = alone["table"][:, :width]
        np.testing.assert_array_equal(attend(alone, "cpu")[0], together[row])


@pytest.mark.parametrize("cache", ["float32", "int8", "int4"])
@pytest.mark.parametrize(("page", "window"), [(64, None), (64, 50), (48, 1500), (8, 3)])
def test_a_token_has_the_same_bits_among_those_of_a_draft(
    instruction_set: None, page: int, window: int | None, cache: str
) -> None:
    """Speculation reads a token with those that are drafted behind it, and must find what it finds alone: of more rows
    than a tile has, over several pieces of keys, from wherever the window begins."""
    shape = PagedShape(
        lengths=(70, 1040, 2105), row_pages=-(-2105 // page), page=page, queries=17, heads=10, kv_heads=2, head_dim=16
    )
    arrays, _ = draw(shape, "float32", cache)
    together = np.asarray(attend(arrays, "cpu", window=window))
    for first, last in ((0, 1), (5, 6), (16, 17), (3, 8)):
        part = arrays | {name: arrays[name][:, first:last] for name in ("q", "q_positions")}
        np.testing.assert_array_equal(attend(part, "cpu", window=window), together[:, first:last])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": lambda table: table.at[2, 1].set(17)}, "row 2 has page 17 of 17"),
        ({"table": lambda table: table.at[0, 0].set(-1)}, "row 0 has page -1 of 17"),
        ({"q_positions": lambda at: at + 64}, "a query at position 64 of a row of 4 pages of 16"),
        ({"layer": lambda layer: layer + 2}, "layer 3 of 3"),
    ],
)
def test_pages_that_are_not_there_are_an_error(changes: dict[str, Any], message: str) -> None:
    """When the program runs: nothing outside of the cache is read."""
    arrays, _ = draw(SHAPES[0], "float32", "float32")
    arrays |= {name: change(arrays[name]) for name, change in changes.items()}
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(attend(arrays, "cpu"))


PAGES = (3, 17, 16, 2, 64)
"""Of keys and values, as `draw` makes them of SHAPES[0]."""
INT8 = {name: jnp.zeros(PAGES, jnp.int8) for name in "kv"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": jnp.zeros((2, 4), jnp.int32)}, r"table must be int32 \(4, pages of a row\), got int32\(2, 4\)"),
        ({"table": jnp.zeros((4, 4), jnp.uint32)}, r"table must be int32 \(4, pages of a row\), got uint32\(4, 4\)"),
        ({"table": jnp.zeros((4,), jnp.int32)}, r"table must be int32 \(4, pages of a row\), got int32\(4,\)"),
        ({"layer": jnp.zeros((1,), jnp.int32)}, r"layer must be an int32 scalar, got int32\(1,\)"),
        ({"q_positions": jnp.zeros((4, 2), jnp.int32)}, r"q_positions must be int32 \(4, 1\)"),
        ({"q_positions": jnp.zeros((4, 1), jnp.uint32)}, r"q_positions must be int32 \(4, 1\), got uint32"),
        ({"q": jnp.zeros((4, 1, 64))}, re.escape(f"H), got (4, 1, 64) and {PAGES}")),
        ({"k": jnp.zeros(PAGES[1:])}, re.escape("H), got (4, 1, 6, 64) and (17, 16, 2, 64)")),
        ({"q": jnp.zeros((4, 1, 6, 64), jnp.int32)}, "paged_attention needs floating q, got int32"),
        ({"v": jnp.zeros((3, 17, 8, 2, 64))}, re.escape(f"differ: float32{PAGES} and float32(3, 17, 8, 2, 64)")),
        ({"v": jnp.zeros(PAGES, jnp.bfloat16)}, re.escape(f"differ: float32{PAGES} and bfloat16{PAGES}")),
        ({"q": jnp.zeros((4, 1, 5, 64))}, "5 query heads are no multiple of 2 kv heads"),
        ({name: jnp.zeros((3, 17, 16, 0, 64)) for name in "kv"}, "6 query heads are no multiple of 0 kv heads"),
        ({"k_scale": jnp.zeros((3, 17, 16, 2))}, "k is float32 and comes with scales"),
        (INT8, "k is int8 and comes without scales"),
        (INT8 | {"k_scale": jnp.zeros(PAGES[:4])}, "v is int8 and comes without scales"),
        (
            INT8 | {f"{name}_scale": jnp.zeros(PAGES[1:4]) for name in "kv"},
            re.escape("k_scale must be float32(3, 17, 16, 2), got float32(17, 16, 2)"),
        ),
        (
            INT8 | {"k_scale": jnp.zeros(PAGES[:4]), "v_scale": jnp.zeros(PAGES[:4], jnp.uint16)},
            re.escape("v_scale must be float32(3, 17, 16, 2), got uint16(3, 17, 16, 2)"),
        ),
        (
            {name: jnp.zeros((3, 17, 16, 2, 32), jnp.uint8) for name in "kv"}
            | {f"{name}_scale": jnp.zeros((3, 17, 16, 2, 2)) for name in "kv"},
            re.escape("k_scale must be bfloat16(3, 17, 16, 2, 2), got float32(3, 17, 16, 2, 2)"),
        ),
        ({name: jnp.zeros(PAGES, jnp.int32) for name in "kv"}, "k and v are int32; under float32 queries"),
        ({name: jnp.zeros(PAGES, jnp.uint8) for name in "kv"}, "q has head dim 64, k has head dim 128"),
        *list_wrong_counts("window"),
        *list_wrong_caps("softcap"),
        *list_wrong_factors("scale"),
    ],
)
def test_refusals_name_both_values(changes: dict[str, Any], message: str) -> None:
    arrays, _ = draw(SHAPES[0], "float32", "float32")
    with pytest.raises(ValueError, match=message):
        paged_attention(**(arrays | changes))


@pytest.mark.parametrize("implementation", ["gpu", "tpu"])
def test_accelerators_that_are_not_there_are_refused(implementation: str) -> None:
    arrays, _ = draw(SHAPES[0], "float32", "float32")
    with pytest.raises(NotImplementedError, match=f"runs on the {implementation} platform only"):
        attend(arrays, implementation)


def test_the_native_backend_has_no_gradient_and_says_so() -> None:
    arrays, _ = draw(SHAPES[0], "float32", "float32")
    with pytest.raises(ValueError, match="hsai_paged_attention.*cannot be differentiated"):
        jax.grad(lambda q: jnp.sum(attend(arrays | {"q": q}, "cpu")))(arrays["q"])
