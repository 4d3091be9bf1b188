"""gated_mlp: the reference and the TPU kernel (interpreted) against a float64 oracle, gradients, and refusals."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import gated_mlp
from hsai_kernels.dispatch import compile_for
from hsai_kernels.interpret import interpret_tpu
from hsai_kernels.ops.gated_mlp.shapes import LARGER, SHAPES, MlpShape
from hsai_kernels.ops.gated_mlp.tpu import choose_blocks, multiply_in_blocks
from tests.kernels import oracles
from tests.kernels.slopes import check_slopes
from tests.kernels.tolerances import assert_close

SUPPORTED = [shape for shape in SHAPES if shape.embed % 128 == 0]


pytestmark = pytest.mark.usefixtures("no_races")


def draw(shape: MlpShape, dtype: str) -> tuple[jax.Array, ...]:
    """x, gate, up and down; x of both signs and of sizes at which the activations bend."""
    rng = np.random.default_rng(shape.embed)
    sizes = ((*shape.lead, shape.embed), *[(shape.embed, shape.ffn)] * 2, (shape.ffn, shape.embed))
    x, *weights = (rng.standard_normal(size) for size in sizes)
    return jnp.asarray(x, dtype), *(jnp.asarray(w * shape.embed**-0.5, jnp.float32) for w in weights)


def check(kernel: Any, operands: tuple[jax.Array, ...], activation: str) -> None:
    x, *weights = operands
    out = jax.jit(functools.partial(kernel, activation=activation))(*operands)
    assert out.dtype == x.dtype and out.shape == x.shape
    exact = [np.asarray(a, np.float64) for a in (x.reshape(-1, x.shape[-1]), *weights)]
    expected, magnitude = oracles.feed_forward(*exact, activation)
    assert_close(out.reshape(expected.shape), expected, magnitude, str(x.dtype))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_matches_the_oracle(shape: MlpShape, activation: str) -> None:
    for dtype in ("float32", "bfloat16"):
        check(functools.partial(gated_mlp, implementation="reference"), draw(shape, dtype), activation)


@pytest.mark.parametrize(
    ("blocks", "dtype", "activation"),
    [((16, 128), "float32", "silu"), ((16, 256), "bfloat16", "gelu"), ((64, 512), "float32", "gelu")],
    ids=str,
)
@pytest.mark.parametrize("shape", SUPPORTED, ids=str)
def test_the_tpu_kernel_matches_the_oracle(
    shape: MlpShape, blocks: tuple[int, int], dtype: str, activation: str
) -> None:
    with interpret_tpu():
        check(functools.partial(multiply_in_blocks, blocks=blocks), draw(shape, dtype), activation)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tpu_kernels_own_blocks_match_the_oracle(dtype: str) -> None:
    operands = draw(LARGER, dtype)
    rows, hidden = choose_blocks(LARGER.embed, operands[0].dtype.itemsize)
    assert rows < LARGER.lead[0] < 2 * rows and hidden < LARGER.ffn < 2 * hidden
    with interpret_tpu():
        check(functools.partial(gated_mlp, implementation="tpu"), operands, "silu")


def test_two_cores_share_no_result() -> None:
    """3 blocks of rows, so that one would be halved if the two of the hidden activations were split over cores."""
    with interpret_tpu(cores=2):
        kernel = functools.partial(multiply_in_blocks, blocks=(16, 128))
        check(kernel, draw(MlpShape(lead=(40,), embed=128, ffn=200), "float32"), "silu")


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gradients_match_finite_differences(activation: str) -> None:
    def oracle(*operands: np.ndarray) -> np.ndarray:
        return oracles.feed_forward(*operands, activation)[0]

    reference = functools.partial(gated_mlp, activation=activation, implementation="reference")
    pull = functools.partial(oracles.pull_feed_forward, activation=activation)
    check_slopes(reference, oracle, pull, draw(MlpShape(lead=(3,), embed=16, ffn=20), "float32"))
    with interpret_tpu():
        kernel = functools.partial(multiply_in_blocks, activation=activation, blocks=(16, 128))
        check_slopes(kernel, oracle, pull, draw(MlpShape(lead=(3,), embed=128, ffn=20), "float32"))


def test_what_the_tpu_kernel_does_not_take() -> None:
    with pytest.raises(NotImplementedError, match="multiples of 128, not 80"):
        choose_blocks(80, 4)
    with pytest.raises(NotImplementedError, match="not 131072 of 2 bytes"):
        choose_blocks(2**17, 2)
    with compile_for("cpu"), pytest.raises(NotImplementedError, match="tpu platform only"):
        gated_mlp(*draw(SHAPES[2], "float32"), implementation="tpu")


X, IN, OUT = jnp.ones((2, 8)), jnp.ones((8, 3)), jnp.ones((3, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": IN[:7]}, r"needs gate \(8, F\) for x of shape \(2, 8\), got \(7, 3\)"),
        ({"up": IN[:, :2]}, r"up has shape \(8, 2\), gate of \(8, 3\) needs \(8, 3\)"),
        ({"down": IN}, r"down has shape \(8, 3\), gate of \(8, 3\) needs \(3, 8\)"),
        ({"x": X.astype(jnp.float16)}, "not of float16"),
        ({"down": OUT.astype(jnp.int8)}, "down must be floating, got int8"),
        ({"activation": "relu"}, "unknown activation 'relu': valid are silu, gelu"),
    ],
)
def test_refusals_name_both_values(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "gate": IN, "up": IN, "down": OUT} | changes
    with pytest.raises(ValueError, match=message):
        gated_mlp(**arguments)
