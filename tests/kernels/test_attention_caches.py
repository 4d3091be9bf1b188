"""Caches of fewer bits than the queries, and in pages, in the TPU and GPU kernels, interpreted, against the oracle.

That these kernels compile for real chips is shown by test_aot.py; the native kernel's turn is test_attention_cpu.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import attention, paged_attention
from hsai_kernels.interpret import interpret_gpu, interpret_tpu
from hsai_kernels.ops.attention.shapes import AttentionShape
from hsai_kernels.ops.paged_attention.shapes import PagedShape
from tests.kernels import test_paged_attention as paged
from tests.kernels.test_attention_cpu import ask_oracle, draw
from tests.kernels.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("no_races")

INTERPRETERS: dict[str, Callable[..., Any]] = {"tpu": interpret_tpu, "gpu": interpret_gpu}
CACHES = [("int8", "float32"), ("int8", "bfloat16"), ("bfloat16", "float32"), ("int4", "float32"), ("int4", "bfloat16")]
"""What the cache holds, and the dtype of the queries."""
DECODE = AttentionShape(batch=2, queries=1, keys=150, heads=6, kv_heads=2, head_dim=24)
PREFILL = AttentionShape(batch=1, queries=9, keys=131, heads=3, kv_heads=1, head_dim=20)
DECODE_OF_TWO = AttentionShape(batch=2, queries=1, keys=9, heads=2, kv_heads=2, head_dim=8)
DECODE_PAGES = PagedShape(lengths=(1, 21, 0), row_pages=2, page=16, queries=1, heads=2, kv_heads=1, head_dim=8)
PREFILL_PAGES = PagedShape(lengths=(11, 4), row_pages=4, page=3, queries=7, heads=2, kv_heads=1, head_dim=8)


@pytest.mark.parametrize("platform", INTERPRETERS)
@pytest.mark.parametrize(("cache", "dtype"), CACHES)
@pytest.mark.parametrize(
    ("shape", "options"), [(DECODE, {}), (PREFILL, {"segments": True, "window": 40, "softcap": 5.0})], ids=str
)
def test_a_narrow_cache_matches_the_oracle(
    platform: str, cache: str, dtype: str, shape: AttentionShape, options: dict[str, Any]
) -> None:
    """Also where rows of a batch end at different places; nobody sees what lies behind them."""
    options = dict(options)
    arrays, k, v = draw(shape, dtype, cache, options.pop("segments", False))
    lengths = np.array([shape.keys, 33])[: shape.batch, None]
    slots = np.arange(shape.keys)
    arrays["kv_positions"] = jnp.asarray(np.where(slots < lengths, slots, 2**31 - 1), jnp.int32)
    arrays["q_positions"] = jnp.asarray(lengths - np.arange(shape.queries)[::-1] - 1, jnp.int32)
    with INTERPRETERS[platform]():
        attend = functools.partial(attention, **options, implementation=platform)
        text = str(jax.make_jaxpr(attend)(**arrays))
        out = jax.jit(attend)(**arrays)
    assert "attention_forward" in text and out.dtype == dtype
    assert_close(out, ask_oracle(arrays, k, v, **options), float(np.abs(v).max()), dtype)


@pytest.mark.parametrize("platform", INTERPRETERS)
@pytest.mark.parametrize(
    ("shape", "cache", "dtype", "options"),
    [
        (DECODE_PAGES, "float32", "float32", {}),
        (DECODE_PAGES, "int4", "float32", {}),
        (DECODE_PAGES, "uint16", "bfloat16", {"window": 17}),
        (PREFILL_PAGES, "int8", "float32", {"window": 3, "softcap": 5.0, "scale": 0.2}),
    ],
    ids=str,
)
def test_pages_match_the_oracle(
    platform: str, shape: PagedShape, cache: str, dtype: str, options: dict[str, Any]
) -> None:
    """Of rows of any length, one of them empty, and from before a row's beginning; what no query sees is NaN, or the
    widest integer."""
    arrays, exact = paged.draw(shape, dtype, cache)
    with INTERPRETERS[platform]():
        out = jax.jit(functools.partial(paged_attention, **options, implementation=platform))(**arrays)
    assert out.dtype == dtype
    assert_close(out, paged.ask_oracle(arrays, exact, **options), float(np.abs(exact[1]).max()), dtype)


LOW, HIGH = -(2**31), 2**31 - 1


@pytest.mark.parametrize("platform", INTERPRETERS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([LOW, LOW + 1, 0, HIGH - 1, HIGH], [LOW, LOW + 1, -1, 0, HIGH - 1, HIGH]),
        ([-2, 0, 1, 2, 3], [0, 1, 2, 3, HIGH, HIGH]),  # a query of no key, in front of empty slots
    ],
)
def test_positions_at_the_ends_of_int32(platform: str, window: int | None, queries: list[int], keys: list[int]) -> None:
    """Differences that leave int32 are not the distances of positions."""
    shape = AttentionShape(batch=1, queries=5, keys=6, heads=1, kv_heads=1, head_dim=8)
    arrays, k, v = draw(shape, "float32", "float32")
    arrays |= {"q_positions": jnp.asarray([queries], jnp.int32), "kv_positions": jnp.asarray([keys], jnp.int32)}
    with INTERPRETERS[platform]():
        out = jax.jit(functools.partial(attention, window=window, implementation=platform))(**arrays)
    assert_close(out, ask_oracle(arrays, k, v, window=window), float(np.abs(v).max()), "float32")


@pytest.mark.parametrize("platform", INTERPRETERS)
@pytest.mark.parametrize(("cache", "name"), [("int8", "k_scale"), ("int4", "v_scale")])
def test_a_scale_that_is_no_number_spoils_its_row_only(platform: str, cache: str, name: str) -> None:
    """While decoding, of a batch: the query heads of its kv head, and no other row."""
    arrays, *_ = draw(DECODE_OF_TWO, "float32", cache)
    spoiled = arrays | {name: arrays[name].at[1, 3, 0].set(jnp.nan)}
    with INTERPRETERS[platform]():
        attend = jax.jit(functools.partial(attention, implementation=platform))
        right, found = (np.asarray(attend(**some)) for some in (arrays, spoiled))
    assert np.all(np.isnan(found[1, 0, :1]))
    np.testing.assert_array_equal(found[0], right[0])
    np.testing.assert_array_equal(found[1, 0, 1:], right[1, 0, 1:])


@pytest.mark.parametrize("platform", INTERPRETERS)
@pytest.mark.parametrize(("cache", "learned"), [("int8", ("q", "k_scale", "v_scale")), ("bfloat16", ("q", "k", "v"))])
def test_gradients_take_the_chunked_backend(platform: str, cache: str, learned: tuple[str, ...]) -> None:
    arrays, _, _ = draw(PREFILL, "float32", cache)

    def differentiate(implementation: str) -> dict[str, jax.Array]:
        def loss(some: dict[str, jax.Array]) -> jax.Array:
            return jnp.sum(jnp.sin(attention(**(arrays | some), implementation=implementation)))

        return jax.jit(jax.grad(loss))({name: arrays[name] for name in learned})

    with INTERPRETERS[platform]():
        found = differentiate(platform)
    for name, wanted in differentiate("chunked").items():
        assert np.any(np.asarray(wanted) != 0)
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


@pytest.mark.parametrize("platform", INTERPRETERS)
def test_the_automatic_choice_takes_the_kernel(platform: str) -> None:
    arrays, _, _ = draw(DECODE, "float32", "int8")
    with INTERPRETERS[platform]():
        assert "attention_forward" in str(jax.make_jaxpr(attention)(**arrays))
