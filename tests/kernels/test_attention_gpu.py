"""The GPU backend of attention in the interpreter: numbers, gradients, blocks, what is skipped, and refusals.

That it compiles for GPUs is shown by test_aot.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import attention
from hsai_kernels.dispatch import compile_for
from hsai_kernels.interpret import interpret_gpu
from hsai_kernels.ops.attention.gpu import attention_gpu
from hsai_kernels.ops.attention.gpu_blocks import Tile
from hsai_kernels.ops.attention.reference import attention_reference
from hsai_kernels.ops.attention.shapes import SHAPES, AttentionShape
from tests.kernels.test_attention import _ask_oracle, _draw, check_attention_gradients
from tests.kernels.tolerances import assert_close

TILE = Tile(rows=16, keys=16)
SMALL = {"forward": TILE, "d_rows": Tile(rows=16, keys=32), "d_keys": Tile(rows=32, keys=16)}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 3},
    {"softcap": 2.0, "segments": True},
    {"segments": True, "window": 4, "softcap": 5.0, "scale": 0.2},
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_matches_the_oracle(index: int, dtype: str) -> None:
    shape, options = SHAPES[index], dict(OPTIONS[index % len(OPTIONS)])
    q, k, v, arrays = _draw(shape, dtype, options.pop("segments", False))
    with interpret_gpu():
        out = jax.jit(functools.partial(attention, **options, implementation="gpu"))(q, k, v, **arrays)
    assert out.dtype == dtype
    largest = float(np.abs(np.asarray(v, np.float64)).max())
    assert_close(out, _ask_oracle(q, k, v, arrays, **options), largest, dtype)


@pytest.mark.parametrize("options", OPTIONS[1::2], ids=str)
def test_gradients_match_finite_differences(options: dict[str, Any]) -> None:
    options = dict(options)
    shape = AttentionShape(batch=2, queries=4, keys=5, heads=4, kv_heads=2, head_dim=6)
    *operands, arrays = _draw(shape, "float32", options.pop("segments", False))
    rng = np.random.default_rng(5)
    weights = rng.standard_normal(operands[0].shape)

    def loss(*operands: jax.Array) -> jax.Array:
        return jnp.sum(attention(*operands, **arrays, **options, implementation="gpu") * weights)

    with interpret_gpu():
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*operands)
    check_attention_gradients(gradients, operands, arrays, options, weights)


def draw_blocks(dtype: str, head_dim: int) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array]:
    """Operands, marks and a gradient: ragged blocks of 16, groups of 3 heads, gaps, an empty row."""
    rng = np.random.default_rng(3)
    queries, keys = 21, 51
    q, grad = (jnp.asarray(rng.standard_normal((2, queries, 6, head_dim)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((2, keys, 2, head_dim)), dtype) for _ in range(2))
    at_q, at_k = np.tile(np.arange(keys - queries, keys), (2, 1)), np.tile(np.arange(keys), (2, 1))
    at_q[0, 8] = -1  # before every key
    at_k[1, 40:] = 2**30  # empty slots of a cache
    segments = np.sort(rng.integers(0, 3, (2, keys)), axis=1)
    marks = (at_q, at_k, segments[:, keys - queries :], segments)
    return (q, k, v), tuple(jnp.asarray(m, jnp.int32) for m in marks), grad


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("float32", 80), ("bfloat16", 64), ("bfloat16", 128), ("float32", 256)]
)
def test_many_blocks_and_their_gradients_are_the_references(dtype: str, head_dim: int) -> None:
    operands, at, grad = draw_blocks(dtype, head_dim)
    settings = {"window": 25, "softcap": 3.0, "scale": 1.8 * head_dim**-0.5}

    def run(attend: Any, **more: Any) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *operands: attend(*operands, *at, **settings, **more), *operands)
        return (out, *pull(grad))

    with interpret_gpu():
        found = jax.jit(lambda: run(attention_gpu, tiles=SMALL))()
    wanted = jax.jit(lambda: run(attention_reference))()
    for name, array, expected in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert array.dtype == dtype, name
        exact = np.asarray(expected, np.float64)
        # A gradient is a sum over keys or rows of terms of about this size.
        assert_close(array, exact, np.abs(exact).max() * (1 if name == "out" else 4), dtype)
    assert np.all(np.asarray(found[0][0, 8]) == 0) and np.all(np.asarray(found[1][0, 8]) == 0)
    for gradient in found[2:]:
        assert np.all(np.asarray(gradient[1, 40:]) == 0)


def test_blocks_that_nobody_sees_are_not_read() -> None:
    """NaN outside of what a block reaches: before its window, after its diagonal, behind the end of a cache."""
    positions = jnp.arange(64, dtype=jnp.int32)[None]
    rng = np.random.default_rng(0)
    q, k, v, grad = (jnp.asarray(rng.standard_normal((1, 64, 1, 16)), jnp.float32) for _ in range(4))
    tiles = dict.fromkeys(("forward", "d_rows", "d_keys"), TILE)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        # Queries 32 to 47 see keys from 17 on: the blocks 1 and 2.
        return attention_gpu(q, k, v, positions, positions, None, None, window=16, softcap=None, scale=0.2, tiles=tiles)

    @jax.jit
    def run(k: jax.Array, v: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(attend, q, k, v)
        return (out, *pull(grad))

    def poison(x: jax.Array) -> jax.Array:
        return x.at[:, np.r_[0:16, 48:64]].set(jnp.nan)

    with interpret_gpu():
        out, d_q, d_k, d_v = run(k, v, grad)
        poisoned_out, poisoned_d_q, *_ = run(poison(k), poison(v), grad)
        # Key 17 is seen by the queries 17 to 32: by the row blocks 1 and 2.
        *_, poisoned_d_k, poisoned_d_v = run(k, v, poison(grad))
    for found, wanted in ((poisoned_out, out), (poisoned_d_q, d_q)):
        np.testing.assert_array_equal(found[:, 32:48], wanted[:, 32:48])
    for found, wanted in ((poisoned_d_k, d_k), (poisoned_d_v, d_v)):
        np.testing.assert_array_equal(found[:, 16:32], wanted[:, 16:32])
    assert np.all(np.isnan(poisoned_out[:, 0])) and np.all(np.isnan(poisoned_d_v[:, 0]))


def test_decoding_splits_the_keys() -> None:
    """Rows of a batch that end in the first split, in the last, and before the first key."""
    shape = AttentionShape(batch=3, queries=1, keys=150, heads=6, kv_heads=2, head_dim=24)
    q, k, v, arrays = _draw(shape, "float32", False)
    arrays["q_positions"] = jnp.asarray([[2], [149], [-1]], jnp.int32)
    options = {"window": None, "softcap": None, "scale": 24**-0.5, "tiles": {"forward": TILE}}
    with interpret_gpu():
        out = jax.jit(lambda q, k, v: attention_gpu(q, k, v, *arrays.values(), None, None, **options))(q, k, v)
    assert_close(out, _ask_oracle(q, k, v, arrays), float(np.abs(v).max()), "float32")
    assert np.all(np.asarray(out[2]) == 0)


def test_the_automatic_choice_takes_it() -> None:
    q, k, v, arrays = _draw(SHAPES[2], "float32", False)
    with interpret_gpu():
        assert "pallas_call" in str(jax.make_jaxpr(functools.partial(attention, **arrays))(q, k, v))
        half = (x.astype(jnp.float16) for x in (q, k, v))
        assert "pallas_call" not in str(jax.make_jaxpr(functools.partial(attention, **arrays))(*half))
    with compile_for("cpu"):
        assert "pallas_call" not in str(jax.make_jaxpr(functools.partial(attention, **arrays))(q, k, v))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2, 1, 8), "float16", "bfloat16 or float32, not of float16"),
        ((1, 2, 1, 257), "float32", "at most 256, not 257"),
        ((1, 0, 1, 8), "float32", r"not empty, not q \(1, 0, 1, 8\)"),
    ],
)
def test_refusals(shape: tuple[int, ...], dtype: str, message: str) -> None:
    q, at = jnp.ones(shape, dtype), jnp.zeros(shape[:2], jnp.int32)
    with interpret_gpu(), pytest.raises(NotImplementedError, match=message):
        attention(q, q, q, q_positions=at, kv_positions=at, implementation="gpu")
    with (
        compile_for("cpu"),
        pytest.raises(NotImplementedError, match="gpu platform only, and jax's default platform here is cpu"),
    ):
        attention(q, q, q, q_positions=at, kv_positions=at, implementation="gpu")


def test_a_tile_is_of_powers_of_two() -> None:
    for size in (8, 24):
        with pytest.raises(ValueError, match=f"keys={size} is no block"):
            Tile(rows=16, keys=size)
