"""The GPU backend of sparse_matmul for V:N:M weights in the interpreter: numbers, gradients, blocks and refusals.

That it compiles for GPUs is shown by test_aot.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import sparse_matmul
from hsai_kernels.gpu_product import ProductTile
from hsai_kernels.interpret import interpret_gpu
from hsai_kernels.ops.sparse_matmul.gpu import sparse_matmul_gpu
from hsai_kernels.ops.sparse_matmul.shapes import BLOCKED_SHAPES, SparseShape
from tests.kernels import oracles
from tests.kernels.test_sparse_matmul import _draw as draw
from tests.kernels.tolerances import assert_close

KINDS = ("float32", "bfloat16", "int4")
SMALL = ProductTile(rows=16, columns=32, units=16)


def run(function: Callable[..., jax.Array], *operands: Any, **options: Any) -> jax.Array:
    with interpret_gpu():
        return jax.jit(functools.partial(function, **options))(*operands)


def check(shape: SparseShape, kind: str, dtype: str, scale_dtype: str = "float32", **options: Any) -> None:
    operands, x, weight = draw(shape, kind, dtype, scale_dtype)
    out = run(sparse_matmul_gpu, *operands, n=shape.kept, m=shape.pattern, **options)
    assert out.dtype == dtype
    assert_close(out, x @ weight, np.abs(x) @ np.abs(weight), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", BLOCKED_SHAPES, ids=str)
def test_products_match_the_oracle(shape: SparseShape, kind: str) -> None:
    for dtype in ("float32", "bfloat16"):
        check(shape, kind, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["float32", "int4"])
@pytest.mark.parametrize(("m", "n", "group"), [(8, 2, 64), (16, 3, 256), (16, 1, 768), (32, 2, 96)])
def test_many_blocks(m: int, n: int, group: int, kind: str, dtype: str) -> None:
    """3 ragged blocks of rows; blocks of 48 columns, one and a half tiles; several blocks of units, the last ragged;
    scale groups of parts of a block of units, of one, and of all."""
    shape = SparseShape(lead=(35,), contraction=768, columns=144, kept=n, group=group, pattern=m, width=48)
    check(shape, kind, dtype, "bfloat16", tile=SMALL)


@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_a_contraction_that_is_split(kind: str) -> None:
    """8 rows: 17 blocks of units over several programs, the last of which have less to do."""
    shape = SparseShape(lead=(8,), contraction=17 * 128, columns=64, kept=2, group=128, pattern=8, width=32)
    operands, *_ = draw(shape, kind, "bfloat16")
    with interpret_gpu():
        multiply = functools.partial(sparse_matmul_gpu, n=2, m=8, tile=SMALL)
        assert "f32[5,8,64]" in str(jax.make_jaxpr(multiply)(*operands))
    check(shape, kind, "bfloat16", tile=SMALL)


def test_a_block_takes_what_it_chose_and_nothing_else() -> None:
    """What no block chose is not read: there x may be anything."""
    shape = BLOCKED_SHAPES[0]
    (x, values, indices, scale, choices), exact, weight = draw(shape, "float32", "float32")
    read = (np.asarray(choices)[:, 0][:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool).reshape(-1)
    assert read.sum() == shape.contraction // 2
    out = run(sparse_matmul_gpu, jnp.where(read, x, jnp.nan), values, indices, scale, choices, n=2, m=8)
    assert_close(out, exact @ weight, np.abs(exact) @ np.abs(weight), "float32")


def test_choices_of_too_few_or_too_many_are_read_within_their_bounds() -> None:
    """What the product then is nobody says, but it is the same each time and stays a number."""
    (x, values, indices, scale, choices), *_ = draw(BLOCKED_SHAPES[1], "int4", "float32")
    multiply = functools.partial(run, sparse_matmul_gpu, x, values, indices, scale, n=1, m=8)
    for odd in (jnp.zeros_like(choices), ~jnp.zeros_like(choices)):
        outs = [np.asarray(multiply(odd)) for _ in range(2)]
        np.testing.assert_array_equal(*outs)
        assert np.isfinite(outs[0]).all()


@pytest.mark.parametrize("kind", ["float32", "int4"])
def test_gradients_match_the_oracle(kind: str) -> None:
    (x, *weight), exact, dense = draw(BLOCKED_SHAPES[1], kind, "float32")
    _, indices, scale, choices = weight
    cotangent = np.random.default_rng(1).standard_normal((3, 48)).astype(np.float32)

    def pull(x: jax.Array, *weight: jax.Array) -> Any:
        return jax.vjp(functools.partial(sparse_matmul, n=1, m=8, implementation="gpu"), x, *weight)[1](cotangent)

    leaves = jax.tree.leaves(run(pull, x, *weight))
    assert len(leaves) == (5 if kind == "int4" else 4)
    found = [a for a in leaves if a.dtype != jax.dtypes.float0]
    where: dict[str, Any] = {"scale": np.asarray(scale, np.float64)}
    if kind == "float32":
        where = {"rows": oracles.find_rows(np.asarray(indices), 1, 8, np.asarray(choices))}
    wanted = oracles.pull_product(exact, dense, np.abs(dense), cotangent.astype(np.float64), **where)
    for gradient, (expected, magnitude) in zip(found, wanted, strict=True):
        assert np.any(expected != 0)
        assert_close(gradient, expected, magnitude, "float32")


def test_the_automatic_choice_takes_it_and_falls_back() -> None:
    for width, chosen in ((16, True), (8, False)):
        shape = SparseShape(lead=(2,), contraction=128, columns=32, kept=2, group=64, pattern=8, width=width)
        operands, x, weight = draw(shape, "int4", "float32")
        multiply = functools.partial(sparse_matmul, n=2, m=8)
        with interpret_gpu():
            assert ("pallas_call" in str(jax.make_jaxpr(multiply)(*operands))) is chosen
        assert_close(run(multiply, *operands), x @ weight, np.abs(x) @ np.abs(weight), "float32")


def test_refusals() -> None:
    for shape, kind, message in (
        (SparseShape(lead=(1,), contraction=128, columns=8, kept=2, group=64, pattern=8, width=8), "int4", "8 columns"),
        (BLOCKED_SHAPES[0], "int8", "not int8 values"),
    ):
        operands, *_ = draw(shape, kind, "float32")
        with pytest.raises(NotImplementedError, match=message):
            run(sparse_matmul, *operands, n=2, m=8, implementation="gpu")
