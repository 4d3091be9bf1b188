"""norm_matmul: the reference and the TPU kernel (interpreted) against a float64 oracle, gradients, and refusals."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import norm_matmul
from hsai_kernels.dispatch import compile_for
from hsai_kernels.interpret import interpret_tpu
from hsai_kernels.ops.norm_matmul.shapes import LARGER, SHAPES, NormShape
from hsai_kernels.ops.norm_matmul.tpu import choose_blocks, multiply_in_blocks
from tests.kernels import oracles
from tests.kernels.slopes import check_slopes
from tests.kernels.tolerances import assert_close

EPS = 1e-3
SUPPORTED = [shape for shape in SHAPES if shape.contraction % 128 == 0]


pytestmark = pytest.mark.usefixtures("no_races")


def draw(shape: NormShape, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(shape.contraction)
    sizes = ((*shape.lead, shape.contraction), (shape.contraction,), (shape.contraction, shape.columns))
    x, gain, w = (rng.standard_normal(size) for size in sizes)
    return jnp.asarray(5.0 * x, dtype), jnp.asarray(gain, jnp.float32), jnp.asarray(w, jnp.float32)


def check(kernel: Any, operands: tuple[jax.Array, jax.Array, jax.Array]) -> None:
    x, gain, w = operands
    out = jax.jit(kernel)(*operands)
    assert out.dtype == x.dtype and out.shape == (*x.shape[:-1], w.shape[1])
    rows, *others = (np.asarray(a, np.float64) for a in (x.reshape(-1, x.shape[-1]), gain, w))
    expected, magnitude = oracles.normalize_and_multiply(rows, *others, EPS)
    assert_close(out.reshape(expected.shape), expected, magnitude, str(x.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_matches_the_oracle(shape: NormShape, dtype: str) -> None:
    check(functools.partial(norm_matmul, eps=EPS, implementation="reference"), draw(shape, dtype))


@pytest.mark.parametrize("blocks", [(16, 128), (64, 512)], ids=str)
@pytest.mark.parametrize("shape", SUPPORTED, ids=str)
def test_the_tpu_kernel_matches_the_oracle(shape: NormShape, blocks: tuple[int, int]) -> None:
    with interpret_tpu():
        check(functools.partial(multiply_in_blocks, eps=EPS, blocks=blocks), draw(shape, "float32"))
        check(functools.partial(multiply_in_blocks, eps=EPS, blocks=blocks), draw(shape, "bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tpu_kernels_own_blocks_match_the_oracle(dtype: str) -> None:
    operands = draw(LARGER, dtype)
    rows, columns = choose_blocks(LARGER.contraction, operands[0].dtype.itemsize)
    assert rows < LARGER.lead[0] < 2 * rows and columns < LARGER.columns < 2 * columns
    with interpret_tpu():
        check(functools.partial(norm_matmul, eps=EPS, implementation="tpu"), operands)


def test_two_cores_share_no_result() -> None:
    """3 blocks of rows, so that one would be halved if the two of columns, for which rows are normalized once, were
    split over cores."""
    with interpret_tpu(cores=2):
        kernel = functools.partial(multiply_in_blocks, eps=EPS, blocks=(16, 128))
        check(kernel, draw(NormShape(lead=(40,), contraction=128, columns=200), "float32"))


def test_gradients_match_finite_differences() -> None:
    def oracle(*operands: np.ndarray) -> np.ndarray:
        return oracles.normalize_and_multiply(*operands, EPS)[0]

    def pull(x: np.ndarray, gain: np.ndarray, w: np.ndarray, pull: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return oracles.pull_normalize_and_multiply(x, gain, w, EPS, pull)

    check_slopes(
        functools.partial(norm_matmul, eps=EPS, implementation="reference"),
        oracle,
        pull,
        draw(NormShape(lead=(3,), contraction=16, columns=5), "float32"),
    )
    with interpret_tpu():
        kernel = functools.partial(multiply_in_blocks, eps=EPS, blocks=(16, 128))
        check_slopes(kernel, oracle, pull, draw(NormShape(lead=(3,), contraction=128, columns=5), "float32"))


def test_a_row_of_zeros_gives_zeros() -> None:
    x, gain, w = draw(SHAPES[1], "float32")
    assert np.all(np.asarray(norm_matmul(jnp.zeros_like(x), gain, w, eps=EPS)) == 0)


def test_what_the_tpu_kernel_does_not_take() -> None:
    with pytest.raises(NotImplementedError, match="multiples of 128, not 80"):
        choose_blocks(80, 4)
    with pytest.raises(NotImplementedError, match="not 131072 of 2 bytes"):
        choose_blocks(2**17, 2)
    assert choose_blocks(4096, 2) == (512, 512)
    with compile_for("cpu"), pytest.raises(NotImplementedError, match="tpu platform only"):
        norm_matmul(*draw(SHAPES[2], "float32"), eps=EPS, implementation="tpu")


X, GAIN, W = jnp.ones((2, 8)), jnp.ones(8), jnp.ones((8, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w": W[:7]}, r"needs w \(8, F\) for x of shape \(2, 8\), got \(7, 3\)"),
        ({"w": GAIN}, r"got \(8,\)"),
        ({"gain": GAIN[:7]}, r"gain has shape \(7,\), x needs \(8,\)"),
        ({"x": X.astype(jnp.float16)}, "not of float16"),
        ({"w": W.astype(jnp.int8)}, "w must be floating, got int8"),
        *(
            ({"eps": eps}, re.escape(f"eps={eps} must be from 1.17549e-38 to 3.40282e+38: positive and normal"))
            for eps in (0.0, -1e-5, 1e-46, 1e-40, 10**39, math.inf, math.nan)
        ),
    ],
)
def test_refusals_name_both_values(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "gain": GAIN, "w": W, "eps": EPS} | changes
    with pytest.raises(ValueError, match=message):
        norm_matmul(**arguments)
