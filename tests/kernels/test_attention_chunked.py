"""The chunked backend: the reference's numbers and gradients block by block, and memory that follows the length."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels.ops.attention.chunked import BLOCK_QUERIES, attention_chunked
from hsai_kernels.ops.attention.reference import attention_reference
from tests.kernels.tolerances import assert_close

# T, S, N, K, H, and queries and keys a block: whole and ragged blocks, a single block of one of the two, tiny ones.
CASES = (
    (16, 16, 4, 2, 128, 8, 8),
    (13, 29, 6, 2, 256, 4, 8),
    (7, 40, 3, 3, 5, 16, 8),
    (33, 5, 4, 1, 64, 8, 8),
    (5, 5, 2, 2, 80, 1, 1),
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 3},
    {"softcap": 1.5},
    {"segments": True, "window": 9, "softcap": 5.0},
)
Arrays = tuple[jax.Array, ...]


def draw(case: tuple[int, ...], dtype: str, segments: bool) -> tuple[Arrays, Arrays, jax.Array]:
    """q, k, v; positions and segments; and a gradient of the output. One query sees nothing, one row has gaps."""
    queries, keys, heads, kv_heads, head_dim, *_ = case
    rng = np.random.default_rng(queries * 1000 + keys)
    shapes = ((2, queries, heads, head_dim), *[(2, keys, kv_heads, head_dim)] * 2)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    longest = max(queries, keys)
    at_q = np.tile(np.arange(longest - queries, longest), (2, 1))
    at_k = np.tile(np.arange(longest - keys, longest), (2, 1))
    at_q[0, queries // 2] = -1  # before every key
    at_k[1, keys // 2 :] = 2**30  # slots of a cache that are empty
    marks = [np.sort(rng.integers(0, 3, (2, n)), axis=1) if segments else None for n in (queries, keys)]
    at = tuple(None if m is None else jnp.asarray(m, jnp.int32) for m in (at_q, at_k, *marks))
    return (q, k, v), at, jnp.asarray(rng.standard_normal(q.shape), dtype)


def both(case: tuple[int, ...], dtype: str, options: dict[str, Any]) -> tuple[list[Arrays], float]:
    """Output and gradients of q, k and v, by the chunked backend and by the reference; and the size of their terms."""
    settings = {"window": None, "softcap": None, "scale": case[4] ** -0.5, **options}
    operands, at, grad = draw(case, dtype, settings.pop("segments", False))
    chunked = functools.partial(attention_chunked, block_queries=case[5], block_keys=case[6])
    results = []
    for attend in (chunked, attention_reference):

        @jax.jit
        def run(operands: Arrays, attend: Any = attend) -> Arrays:
            out, pull = jax.vjp(lambda *operands: attend(*operands, *at, **settings), *operands)
            return (out, *pull(grad))

        results.append(run(operands))
    magnitude = max(float(jnp.max(jnp.abs(array.astype(jnp.float32)))) for array in results[1])
    return results, magnitude


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_change_no_number(case: tuple[int, ...], options: dict[str, Any]) -> None:
    (found, wanted), magnitude = both(case, "float32", options)
    for name, array, expected in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert array.dtype == expected.dtype, name
        # A gradient is a sum over keys or queries of terms of this size.
        terms = magnitude * (1 if name == "out" else max(case[:2]))
        assert_close(array, np.asarray(expected, np.float64), terms, "float32")


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_bfloat16(case: tuple[int, ...]) -> None:
    (found, wanted), magnitude = both(case, "bfloat16", {"window": 5})
    for array, expected in zip(found, wanted, strict=True):
        assert array.dtype == jnp.bfloat16
        assert_close(array, np.asarray(expected, np.float64), 2 * magnitude, "bfloat16")


def test_who_sees_nothing_gets_zeros_and_gives_none() -> None:
    ((out, d_q, d_k, d_v), _), _ = both(CASES[1], "float32", {})
    assert np.all(np.asarray(out[0, 6]) == 0) and np.all(np.asarray(d_q[0, 6]) == 0)
    assert np.any(np.asarray(out[0, 7]) != 0)
    for gradient in (d_k, d_v):
        assert np.all(np.asarray(gradient[1, 29 // 2 :]) == 0)  # keys that no query sees


def compile_gradient(length: int, attend: Any) -> jax.stages.Compiled:
    shape = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
    at = jnp.arange(length, dtype=jnp.int32)[None]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v, at, at, None, None, window=None, softcap=None, scale=0.2) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()


def test_memory_follows_the_length_and_not_its_square() -> None:
    short, long = (compile_gradient(n * BLOCK_QUERIES, attention_chunked).memory_analysis() for n in (4, 8))
    assert long.temp_size_in_bytes < 2.2 * short.temp_size_in_bytes
    scores = 4 * 4 * (8 * BLOCK_QUERIES) ** 2
    assert long.temp_size_in_bytes < scores / 4
    whole = compile_gradient(8 * BLOCK_QUERIES, attention_reference).memory_analysis()
    assert whole.temp_size_in_bytes >= scores


def test_what_fits_a_block_is_the_reference() -> None:
    operands, at, _ = draw(CASES[0], "float32", False)
    settings = {"window": 3, "softcap": None, "scale": 0.4}
    texts = [
        jax.jit(functools.partial(attend, **settings)).lower(*operands, *at).as_text().replace(attend.__name__, "")
        for attend in (attention_chunked, attention_reference)
    ]
    assert texts[0] == texts[1]


def test_a_mesh_gets_the_same_numbers_and_no_branches() -> None:
    case = (16, 24, 4, 4, 16, 8, 8)
    operands, at, _ = draw(case, "float32", True)
    attend = functools.partial(attention_chunked, window=7, softcap=None, scale=0.3, block_queries=8, block_keys=8)
    alone = jax.jit(attend).lower(*operands, *at)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "model"))
    with jax.set_mesh(mesh):
        split = tuple(jax.device_put(x, sharding) for x in operands)
        spread = jax.jit(lambda *operands: attend(*operands)).lower(*split, *at)
        found = spread.compile()(*split, *at)
    assert "stablehlo.case" in alone.as_text() and "stablehlo.case" not in spread.as_text()
    wanted = np.asarray(alone.compile()(*operands, *at), np.float64)
    assert_close(found, wanted, float(np.abs(operands[2]).max()), "float32")
    assert found.sharding.is_equivalent_to(sharding, 4)
