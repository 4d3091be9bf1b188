"""The native backend of attention: each instruction set and cache type against float64, hard inputs, threads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import attention, native
from hsai_kernels.ops.attention.shapes import HUGE, SHAPES, AttentionShape
from tests.kernels import oracles
from tests.kernels.native_attention_cases import draw_int4
from tests.kernels.tolerances import assert_close

Arrays = dict[str, jax.Array]

LARGER = (
    AttentionShape(batch=1, queries=70, keys=70, heads=4, kv_heads=2, head_dim=64),  # several blocks of rows and keys
    AttentionShape(batch=2, queries=9, keys=131, heads=3, kv_heads=1, head_dim=20),  # ragged everywhere
    AttentionShape(batch=1, queries=3, keys=2050, heads=2, kv_heads=1, head_dim=16),  # several pieces of a cache
    AttentionShape(batch=1, queries=2, keys=66, heads=70, kv_heads=1, head_dim=4),  # a query's heads in two tiles
    AttentionShape(batch=1, queries=12, keys=5, heads=2, kv_heads=1, head_dim=33),  # more queries than keys
)
CACHES = ("float32", "bfloat16", "int8", "int4")
EVERYWHERE = [
    (shape, cache) for shape in SHAPES + LARGER for cache in CACHES if cache != "int4" or shape.head_dim % 2 == 0
]
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 3},
    {"softcap": 2.0},
    {"segments": True, "window": 40, "softcap": 5.0, "scale": 0.2},
)


def draw(
    shape: AttentionShape, dtype: str, cache: str, segments: bool = False
) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """The arrays of a call, and its keys and values in float64; queries are the last positions of the keys."""
    rng = np.random.default_rng(shape.keys * 100 + shape.head_dim)
    arrays: Arrays = {
        "q": jnp.asarray(rng.standard_normal((shape.batch, shape.queries, shape.heads, shape.head_dim)), dtype)
    }
    exact = []
    for name in "kv":
        values = rng.standard_normal((shape.batch, shape.keys, shape.kv_heads, shape.head_dim))
        if cache == "int8":
            scale = rng.uniform(0.005, 0.02, values.shape[:3]).astype(np.float32)
            codes = rng.integers(-128, 128, values.shape).astype(np.int8)
            arrays |= {name: jnp.asarray(codes), f"{name}_scale": jnp.asarray(scale)}
            exact.append(codes.astype(np.float64) * scale[..., None])
        elif cache == "int4":
            packed, halves, numbers = draw_int4(rng, values.shape)
            arrays |= {name: jnp.asarray(packed), f"{name}_scale": jnp.asarray(halves)}
            exact.append(numbers)
        else:
            arrays[name] = jnp.asarray(values, cache)
            exact.append(np.asarray(arrays[name], np.float64))
    at_k = np.tile(np.arange(shape.keys, dtype=np.int32), (shape.batch, 1))
    at_q = np.tile(np.arange(shape.queries, dtype=np.int32) + max(0, shape.keys - shape.queries), (shape.batch, 1))
    arrays |= {"q_positions": jnp.asarray(at_q), "kv_positions": jnp.asarray(at_k)}
    if segments:
        for name, length in (("q", shape.queries), ("kv", shape.keys)):
            drawn = np.sort(rng.integers(0, 3, (shape.batch, length)), axis=1).astype(np.int32)
            arrays[f"{name}_segments"] = jnp.asarray(drawn)
    return arrays, exact[0], exact[1]


def ask_oracle(arrays: Arrays, k: np.ndarray, v: np.ndarray, **options: Any) -> np.ndarray:
    q = np.asarray(arrays["q"], np.float64)
    marks = [np.asarray(arrays[f"{name}_positions"], np.int64) for name in ("q", "kv")]
    marks += [np.asarray(arrays[f"{name}_segments"]) if f"{name}_segments" in arrays else None for name in ("q", "kv")]
    settings = {"window": None, "softcap": None, "scale": q.shape[-1] ** -0.5} | options
    return oracles.attend(q, k, v, *marks, **settings)


def attend(arrays: Arrays, implementation: str = "cpu", **options: Any) -> jax.Array:
    return jax.jit(functools.partial(attention, implementation=implementation, **options))(**arrays)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("shape", "cache"), EVERYWHERE, ids=str)
def test_every_instruction_set_matches_the_oracle(instruction_set, shape, options, cache):
    options = dict(options)
    arrays, k, v = draw(shape, "float32", cache, options.pop("segments", False))
    expected = ask_oracle(arrays, k, v, **options)
    out = attend(arrays, **options)
    assert out.dtype == jnp.float32
    assert_close(out, expected, float(np.abs(v).max()), "float32")


@pytest.mark.parametrize(("shape", "cache"), [case for case in EVERYWHERE if case[1] != "float32"], ids=str)
def test_bfloat16_queries(instruction_set, shape, cache):
    arrays, k, v = draw(shape, "bfloat16", cache)
    out = attend(arrays)
    assert out.dtype == jnp.bfloat16
    assert_close(out, ask_oracle(arrays, k, v), float(np.abs(v).max()), "bfloat16")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_cache_means_the_same_to_plain_jax(implementation, cache, dtype):
    if dtype == "bfloat16" and cache == "float32":
        cache = "bfloat16"
    arrays, k, v = draw(LARGER[1], dtype, cache)
    out = attend(arrays, implementation)
    assert_close(out, ask_oracle(arrays, k, v), float(np.abs(v).max()), dtype)


@pytest.mark.parametrize("implementation", ["cpu", "reference", "chunked"])
@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_a_long_context_matches_the_oracle(implementation, cache):
    arrays, k, v = draw(HUGE, "float32", cache)
    assert_close(attend(arrays, implementation), ask_oracle(arrays, k, v), float(np.abs(v).max()), "float32")


@pytest.mark.parametrize("implementation", ["cpu", "reference", "chunked"])
@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_the_mean_of_a_long_context_is_exact(implementation, cache):
    """Equal scores and values: every partial sum has at most 24 bits, so no order of adding loses one."""
    arrays, _, _ = draw(HUGE, "float32", cache)
    arrays |= {"q": jnp.zeros_like(arrays["q"]), "v": jnp.full_like(arrays["v"], 3)}
    if cache == "int8":
        arrays["v_scale"] = jnp.full_like(arrays["v_scale"], 0.125)
    np.testing.assert_array_equal(
        attend(arrays, implementation), np.full(arrays["q"].shape, 3 if cache != "int8" else 0.375)
    )


@pytest.mark.parametrize("cache", CACHES)
def test_rows_have_their_own_lengths(instruction_set, cache):
    """Empty slots have a position above every query's; what lies in them changes no bit."""
    shape = AttentionShape(batch=4, queries=1, keys=1100, heads=6, kv_heads=2, head_dim=64)
    arrays, k, v = draw(shape, "float32", cache)
    lengths, slots = np.array([1, 63, 700, 1100]), np.arange(1100)
    arrays["q_positions"] = jnp.asarray(lengths[:, None] - 1, jnp.int32)
    arrays["kv_positions"] = jnp.asarray(np.where(slots < lengths[:, None], slots, 2**31 - 1), jnp.int32)
    out = attend(arrays)
    assert_close(out, ask_oracle(arrays, k, v), float(np.abs(v).max()), "float32")
    empty = (slots >= lengths[:, None])[..., None, None]
    changed = arrays | {name: jnp.where(empty, jnp.asarray(100, arrays[name].dtype), arrays[name]) for name in "kv"}
    np.testing.assert_array_equal(attend(changed), out)


def test_keys_in_any_order(instruction_set):
    """A cache that is written in a ring: positions ascend nowhere in particular, and some keys repeat."""
    arrays, k, v = draw(LARGER[1], "float32", "float32")
    rng = np.random.default_rng(4)
    arrays["kv_positions"] = jnp.asarray(rng.integers(0, 200, (2, 131)), jnp.int32)
    arrays["q_positions"] = jnp.asarray(rng.integers(-3, 200, (2, 9)), jnp.int32)
    for window in (None, 7):
        out = attend(arrays, window=window)
        assert_close(out, ask_oracle(arrays, k, v, window=window), float(np.abs(v).max()), "float32")


@pytest.mark.parametrize(("shape", "cache"), [case for case in EVERYWHERE if case[0] in LARGER], ids=str)
def test_who_sees_nothing_gets_zeros(instruction_set, shape, cache):
    arrays, k, v = draw(shape, "float32", cache)
    arrays["q_positions"] = arrays["q_positions"].at[:, 1].set(-1)
    out = attend(arrays)
    assert np.all(np.asarray(out[:, 1]) == 0)
    assert_close(out, ask_oracle(arrays, k, v), float(np.abs(v).max()), "float32")
    nobody = arrays | {"q_positions": jnp.full_like(arrays["q_positions"], -1)}
    assert np.all(np.asarray(attend(nobody)) == 0)


@pytest.mark.parametrize("window", [None, 1, 5, 2**31 - 1])
def test_positions_at_the_ends_of_int32(instruction_set, window):
    shape = AttentionShape(batch=1, queries=5, keys=6, heads=1, kv_heads=1, head_dim=8)
    arrays, k, v = draw(shape, "float32", "float32")
    low, high = -(2**31), 2**31 - 1
    arrays["q_positions"] = jnp.asarray([[low, low + 1, 0, high - 1, high]], jnp.int32)
    arrays["kv_positions"] = jnp.asarray([[low, low + 1, -1, 0, high - 1, high]], jnp.int32)
    expected = ask_oracle(arrays, k, v, window=window)
    for implementation in ("cpu", "reference"):
        assert_close(attend(arrays, implementation, window=window), expected, float(np.abs(v).max()), "float32")


def bound_error(arrays: Arrays, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Magnitudes (B, T, N, H) for `assert_close` of causal attention, where a score is off by as much of its own terms.

    An output moves with score s by weight_s * (value_s - output): not at all where one key takes all.
    """
    batch, queries, heads, width = arrays["q"].shape
    q = np.asarray(arrays["q"], np.float64).reshape(batch, queries, k.shape[2], -1, width) * width**-0.5
    scores, terms = (np.einsum("btkgh,bskh->btkgs", *pair) for pair in ((q, k), (np.abs(q), np.abs(k))))
    at_q, at_k = (np.asarray(arrays[f"{name}_positions"]) for name in ("q", "kv"))
    scores = np.where((at_k[:, None] <= at_q[:, :, None])[:, :, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("btkgs,bskh->btkgh", weights, v)
    swing = np.abs(v.swapaxes(1, 2)[:, None, :, None] - out[..., None, :])
    moved = np.einsum("btkgs,btkgs,btkgsh->btkgh", weights, terms, swing)
    magnitude: np.ndarray = (np.einsum("btkgs,bskh->btkgh", weights, np.abs(v)) + moved).reshape(arrays["q"].shape)
    return magnitude


@pytest.mark.parametrize("size", [1e3, 1e18, 1e-30])
def test_scores_of_any_size(instruction_set, size):
    """Of large ones the largest takes all, and the reference, which adds in another order, agrees on which."""
    arrays, k, v = draw(LARGER[0], "float32", "float32")
    arrays = arrays | {"q": arrays["q"] * size}
    if size == 1e18:
        arrays = arrays | {"k": arrays["k"] * 1e18}  # scores reach 1e37
        k = np.asarray(arrays["k"], np.float64)
    expected, magnitude = ask_oracle(arrays, k, v), bound_error(arrays, k, v)
    for implementation in ("cpu", "reference"):
        assert_close(attend(arrays, implementation), expected, magnitude, "float32")


def test_exponentials_are_as_exact_as_stated(instruction_set):
    """Two keys of scores 0 and -d, values 0 and 1: the output is e**-d / (1 + e**-d)."""
    d = np.concatenate([np.linspace(0, 87, 4001), [1e-6, 1e-3, 88.0, 200.0, 3e38]]).astype(np.float32)
    k = np.stack([np.zeros_like(d), -d], axis=1)[:, :, None, None]
    v = np.broadcast_to(np.array([0.0, 1.0], np.float32)[None, :, None, None], k.shape)
    zeros = np.zeros((len(d), 2), np.int32)
    out = attention(
        np.ones((len(d), 1, 1, 1), np.float32),
        k,
        np.ascontiguousarray(v),
        q_positions=zeros[:, :1],
        kv_positions=zeros,
        scale=1.0,
        implementation="cpu",
    )
    exact = np.exp(-d.astype(np.float64))
    found = np.asarray(out, np.float64).ravel()
    normal = d < 87.3
    # The exponential (2**-22), the sum and the quotient (2**-24 each).
    np.testing.assert_allclose(found[normal], (exact / (1 + exact))[normal], rtol=2.0**-22 + 2.0**-23)
    assert np.all(found[~normal] == 0)


def test_caps_are_as_exact_as_stated(instruction_set):
    """A score of c * tanh(s / c) beside one of zero, for s from far below c to far above, of either sign."""
    s = np.concatenate([np.linspace(-9, 9, 2001), [1e-6, -1e-6, 1e3, -1e3]]).astype(np.float32)
    cap = 2.0
    k = np.stack([np.zeros_like(s), s], axis=1)[:, :, None, None]
    v = np.ascontiguousarray(np.broadcast_to(np.array([0.0, 1.0], np.float32)[None, :, None, None], k.shape))
    zeros = np.zeros((len(s), 2), np.int32)
    q = np.ones((len(s), 1, 1, 1), np.float32)
    at = {"q_positions": zeros[:, :1], "kv_positions": zeros}
    out = attention(q, k, v, **at, scale=1.0, softcap=cap, implementation="cpu")
    exact = np.exp(cap * np.tanh(s.astype(np.float64) / cap))
    found = np.asarray(out, np.float64).ravel()
    np.testing.assert_allclose(found, exact / (1 + exact), rtol=2.0**-22 + 2.0**-23 + cap * 2.0**-22)


@pytest.mark.parametrize("shape", LARGER, ids=str)
def test_results_are_the_same_bits_every_time(shape):
    """Also while several calls share the threads: how tiles fall to them must not matter."""
    arrays, _, _ = draw(shape, "float32", "int8")
    first = np.asarray(attend(arrays))
    devices = jax.devices()
    running = [attend(jax.device_put(arrays, devices[i % len(devices)])) for i in range(20)]
    for out in running:
        np.testing.assert_array_equal(out, first)


def test_a_batch_of_calls():
    arrays, _, _ = draw(SHAPES[2], "float32", "int8")
    several = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), arrays)
    out = jax.vmap(functools.partial(attend))(several)
    np.testing.assert_array_equal(out[0], attend(arrays))
    np.testing.assert_array_equal(out[1], out[0][::-1])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_those_of_the_reference(options, cache):
    options = dict(options)
    arrays, _, v = draw(LARGER[1], "float32", cache, options.pop("segments", False))
    learned = ["q", *(("k_scale", "v_scale") if cache in ("int8", "int4") else "kv")]
    pull = jnp.asarray(np.random.default_rng(1).standard_normal(arrays["q"].shape), jnp.float32)

    def differentiate(implementation: str) -> Arrays:
        def loss(some: Arrays) -> jax.Array:
            return jnp.sum(attend(arrays | some, implementation, **options) * pull)

        return jax.jit(jax.grad(loss))({name: arrays[name] for name in learned})

    found, wanted = differentiate("cpu"), differentiate("reference")
    for name, gradient in wanted.items():
        exact = np.asarray(gradient, np.float64)
        assert np.any(exact != 0)
        assert_close(found[name], exact, float(np.abs(exact).max()) + 1.0, gradient.dtype.name)


def test_a_gradient_keeps_no_scores():
    """Forward and backward through rows of 2048 take the chunked path: no array as large as their scores."""
    length = 2048
    shape = AttentionShape(batch=1, queries=length, keys=length, heads=1, kv_heads=1, head_dim=8)
    arrays, _, _ = draw(shape, "float32", "float32")

    def loss(q: jax.Array) -> jax.Array:
        return jnp.sum(attention(**(arrays | {"q": q})))

    program = jax.jit(jax.grad(loss)).lower(arrays["q"])
    assert "hsai_attention" not in program.as_text()
    assert program.compile().memory_analysis().temp_size_in_bytes < 4 * length**2
    assert "hsai_attention" in jax.jit(loss).lower(arrays["q"]).as_text()


def test_the_automatic_choice_is_native():
    arrays, _, _ = draw(SHAPES[2], "float32", "bfloat16")
    assert native.ATTENTION in jax.jit(attention).lower(**arrays).as_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.ones((1, 1, 2, 8), jnp.float16)}, "float16"),
        ({"q": jnp.ones((1, 0, 2, 8), jnp.float32), "q_positions": jnp.zeros((1, 0), jnp.int32)}, r"\(1, 0, 2, 8\)"),
    ],
)
def test_what_it_does_not_support_it_says(changes, message):
    arrays, _, _ = draw(AttentionShape(batch=1, queries=1, keys=3, heads=2, kv_heads=1, head_dim=8), "float32", "int8")
    with pytest.raises(NotImplementedError, match=message):
        attend(arrays | changes)
