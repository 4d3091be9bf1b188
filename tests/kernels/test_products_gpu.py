"""The GPU backends of quantized_matmul and sparse_matmul in the interpreter: numbers, gradients, blocks and refusals.

That they compile for GPUs is shown by test_aot.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import pack_words, quantized_matmul, sparse_matmul
from hsai_kernels.dispatch import compile_for
from hsai_kernels.gpu_product import ProductTile
from hsai_kernels.interpret import interpret_gpu
from hsai_kernels.ops.quantized_matmul.gpu import quantized_matmul_gpu
from hsai_kernels.ops.quantized_matmul.shapes import SHAPES as QUANTIZED_SHAPES
from hsai_kernels.ops.quantized_matmul.shapes import QuantizedShape
from hsai_kernels.ops.sparse_matmul.gpu import sparse_matmul_gpu
from hsai_kernels.ops.sparse_matmul.shapes import EIGHTHS, SparseShape
from hsai_kernels.ops.sparse_matmul.shapes import SHAPES as SPARSE_SHAPES
from tests.kernels import oracles
from tests.kernels.test_quantized_matmul import _draw as draw_quantized
from tests.kernels.test_quantized_matmul import _draw_minima as draw_minima
from tests.kernels.test_sparse_matmul import _draw as draw_sparse
from tests.kernels.tolerances import assert_close

SMALL = ProductTile(rows=16, columns=32, units=16)


def run(function: Callable[..., jax.Array], *operands: Any, **options: Any) -> jax.Array:
    with interpret_gpu():
        return jax.jit(functools.partial(function, **options))(*operands)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_products_match_the_oracle(kind: str) -> None:
    for index, shape in enumerate(QUANTIZED_SHAPES):
        for dtype in ("float32", "bfloat16") if index % 3 == 2 else ("float32",):
            operands, x, weight, largest = draw_quantized(shape, kind, dtype)
            out = run(quantized_matmul, *operands, implementation="gpu")
            assert out.dtype == dtype
            assert_close(out, x @ weight, np.abs(x) @ largest, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "int4"])
def test_sparse_products_match_the_oracle(kind: str) -> None:
    for index, shape in enumerate((*SPARSE_SHAPES, *EIGHTHS)):
        if shape.columns > 2000 and (index % 2 == 1) != (kind == "int4"):
            continue  # many programs, slow in an interpreter: one kind each
        values = kind if kind == "int4" else ("float32", "bfloat16")[index % 2]
        for dtype in ("float32", "bfloat16") if index % 3 == 2 else ("float32",):
            operands, x, weight = draw_sparse(shape, values, dtype)
            out = run(sparse_matmul, *operands, n=shape.kept, m=shape.pattern, implementation="gpu")
            assert out.dtype == dtype
            assert_close(out, x @ weight, np.abs(x) @ np.abs(weight), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_from_a_minimum_match_the_oracle(dtype: str) -> None:
    operands, x, weight, largest = draw_minima(QUANTIZED_SHAPES[2], dtype, "float16")
    out = run(quantized_matmul, *operands, implementation="gpu")
    assert_close(out, x @ weight, np.abs(x) @ largest, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_many_blocks_of_a_quantized_product(kind: str, dtype: str) -> None:
    """3 ragged blocks of rows, 2 of columns, and of units 3 ragged ones (int4) or 19; groups that blocks straddle."""
    shape = QuantizedShape(lead=(35,), contraction=296, columns=45, group=8)
    operands, x, weight, largest = draw_quantized(shape, kind, dtype, "bfloat16")
    assert_close(run(quantized_matmul_gpu, *operands, tile=SMALL), x @ weight, np.abs(x) @ largest, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["float32", "int4"])
def test_many_blocks_of_a_sparse_product(kind: str, dtype: str) -> None:
    """3 ragged blocks of rows, 2 of columns, 5 of units; scale groups of 3 and of 1 1/3 blocks."""
    shape = SparseShape(lead=(35,), contraction=320, columns=45, kept=2, group=80)
    operands, x, weight = draw_sparse(shape, kind, dtype)
    out = run(sparse_matmul_gpu, *operands, n=2, m=4, tile=SMALL)
    assert_close(out, x @ weight, np.abs(x) @ np.abs(weight), dtype)


@pytest.mark.parametrize(("kind", "kept"), [("float32", 2), ("int4", 4)])
def test_many_blocks_of_a_product_of_eighths(kind: str, kept: int) -> None:
    """3 ragged blocks of rows, 2 of columns, 3 of units; scale groups of 3/4 of one."""
    shape = SparseShape(lead=(35,), contraction=384, columns=45, kept=kept, group=96, pattern=8)
    operands, x, weight = draw_sparse(shape, kind, "float32")
    out = run(sparse_matmul_gpu, *operands, n=kept, m=8, tile=SMALL)
    assert_close(out, x @ weight, np.abs(x) @ np.abs(weight), "float32")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_contraction_that_is_split(kind: str) -> None:
    """8 rows: 17 blocks of units (int8: 136) over several programs, the last of which have less to do, or nothing."""
    shape = QuantizedShape(lead=(8,), contraction=17 * 128, columns=20, group=128)
    operands, x, weight, largest = draw_quantized(shape, kind, "bfloat16")
    with interpret_gpu():
        jaxpr = str(jax.make_jaxpr(functools.partial(quantized_matmul_gpu, tile=SMALL))(*operands))
    assert f"f32[{34 if kind == 'int8' else 5},8,20]" in jaxpr
    assert_close(run(quantized_matmul_gpu, *operands, tile=SMALL), x @ weight, np.abs(x) @ largest, "bfloat16")


@pytest.mark.parametrize("kind", ["int8", "int4", "2:4", "2:4 int4"])
def test_gradients_match_the_oracle(kind: str) -> None:
    rows = None
    if kind.startswith("2:4"):
        (x, *weight), exact, dense = draw_sparse(SPARSE_SHAPES[3], "int4" if "int4" in kind else "float32", "float32")
        function: Callable[..., jax.Array] = functools.partial(sparse_matmul, n=2, m=4)
        largest, scale = np.abs(dense), weight[2]
        if scale is None:
            rows = oracles.find_rows(np.asarray(weight[1]), 2, 4)
    else:
        (x, *weight), exact, dense, largest = draw_quantized(QUANTIZED_SHAPES[3], kind, "float32")
        function, scale = quantized_matmul, weight[1]
    cotangent = np.random.default_rng(1).standard_normal((2, 16)).astype(np.float32)

    def pull(x: jax.Array, *weight: jax.Array) -> Any:
        return jax.vjp(functools.partial(function, implementation="gpu"), x, *weight)[1](cotangent)

    found = [a for a in jax.tree.leaves(run(pull, x, *weight)) if a.dtype != jax.dtypes.float0]
    scales = None if scale is None else np.asarray(scale, np.float64)
    wanted = oracles.pull_product(exact, dense, largest, cotangent.astype(np.float64), scale=scales, rows=rows)
    for gradient, (expected, magnitude) in zip(found, wanted, strict=True):
        assert_close(gradient, expected, magnitude, "float32")


def test_vmap_and_scan() -> None:
    """Of integers and powers of two, whose sums are exact in any order."""
    (x, values, scale), *_ = draw_quantized(QUANTIZED_SHAPES[3], "int4", "float32")
    x, scale = jnp.round(8.0 * x), jnp.full_like(scale, 2.0**-5)
    multiply = functools.partial(quantized_matmul, implementation="gpu")
    expected = np.asarray(run(multiply, x, values, scale))
    mapped = run(jax.vmap(multiply, in_axes=(0, None, None)), jnp.stack([x, -x]), values, scale)
    np.testing.assert_array_equal(mapped, [expected, -expected])

    def step(carry: int, layer: Any) -> tuple[int, jax.Array]:
        return carry, multiply(x, *layer)

    layers = (jnp.stack([values, values]), jnp.stack([scale, 2 * scale]))
    scanned = run(lambda layers: jax.lax.scan(step, 0, layers)[1], layers)
    np.testing.assert_array_equal(scanned, [expected, 2 * expected])


def test_the_automatic_choice_takes_them_and_falls_back() -> None:
    x, words = jnp.ones((1, 32)), pack_words(np.full((32, 5), 9, np.uint8), 4)
    indices = pack_words(np.zeros((32, 5), np.uint8), 2)
    for groups, chosen in ((4, True), (8, False)):
        scale = jnp.full((groups, 5), 0.5)
        with interpret_gpu():
            assert ("pallas_call" in str(jax.make_jaxpr(quantized_matmul)(x, words, scale))) is chosen
            np.testing.assert_array_equal(quantized_matmul(x, words, scale), np.full((1, 5), 16.0))
    sparse = functools.partial(sparse_matmul, n=2, m=4)
    with interpret_gpu():
        assert "pallas_call" in str(jax.make_jaxpr(sparse)(jnp.ones((1, 64)), jnp.ones((32, 5)), indices))


def test_refusals() -> None:
    x, words, scale = jnp.ones((1, 32)), pack_words(np.zeros((32, 5), np.uint8), 4), jnp.ones((8, 5))
    indices = pack_words(np.zeros((32, 5), np.uint8), 2)
    with interpret_gpu():
        with pytest.raises(NotImplementedError, match=r"multiples of 8\), not of 4"):
            quantized_matmul(x, words, scale, implementation="gpu")
        with pytest.raises(NotImplementedError, match=r"not x \(0, 32\)"):
            quantized_matmul(x[:0], words, scale[:1], implementation="gpu")
        with pytest.raises(NotImplementedError, match=r"not x \(0, 64\)"):
            sparse_matmul(jnp.ones((0, 64)), jnp.ones((32, 5)), indices, n=2, m=4, implementation="gpu")
        with pytest.raises(NotImplementedError, match=r"codes of -8 to 7 .*not 4 bits, centered=True"):
            quantized_matmul(x, words, scale[:1], centered=True, implementation="gpu")
    with compile_for("cpu"), pytest.raises(NotImplementedError, match="gpu platform only"):
        quantized_matmul(x, words, scale[:1], implementation="gpu")
    with pytest.raises(ValueError, match="units=8 is no block"):
        ProductTile(rows=16, columns=16, units=8)
