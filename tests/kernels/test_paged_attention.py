"""paged_attention: every backend against the float64 oracle over rows that share pages, and what it refuses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import paged_attention
from hsai_kernels.ops.paged_attention.api import BACKENDS
from hsai_kernels.ops.paged_attention.shapes import SHAPES, PagedShape
from tests.kernels import oracles
from tests.kernels.tolerances import assert_close

IMPLEMENTATIONS = sorted(BACKENDS.keys() - {"gpu", "tpu"})
CACHES = ("float32", "bfloat16", "uint16", "int8")
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
        if cache == "int8":
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cache", ["uint16", "int8"])
def test_bfloat16_queries(cache: str, implementation: str) -> None:
    arrays, exact = draw(SHAPES[1], "bfloat16", cache)
    out = attend(arrays, implementation)
    assert out.dtype == jnp.bfloat16
    assert_close(out, ask_oracle(arrays, exact), float(np.abs(exact[1]).max()), "bfloat16")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_do_not_know_of_each_other(implementation: str) -> None:
    """A row alone gives the bits that it gives among others."""
    arrays, _ = draw(SHAPES[0], "float32", "float32")
    together = np.asarray(attend(arrays, implementation))
    for row in range(len(SHAPES[0].lengths)):
        alone = arrays | {name: arrays[name][row : row + 1] for name in ("q", "table", "q_positions")}
        np.testing.assert_array_equal(attend(alone, implementation)[0], together[row])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": jnp.zeros((2, 4), jnp.int32)}, r"table must be int32 \(4, pages of a row\), got int32\(2, 4\)"),
        ({"layer": jnp.zeros((1,), jnp.int32)}, r"layer must be an int32 scalar, got int32\(1,\)"),
        ({"q_positions": jnp.zeros((4, 2), jnp.int32)}, r"q_positions must be int32 \(4, 1\)"),
        ({"k_scale": jnp.zeros((3, 17, 16, 2))}, "k is float32 and comes with scales"),
        ({"window": 0}, "window=0 sees no key"),
        ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    arrays, _ = draw(SHAPES[0], "float32", "float32")
    with pytest.raises(ValueError, match=message):
        paged_attention(**(arrays | changes))
