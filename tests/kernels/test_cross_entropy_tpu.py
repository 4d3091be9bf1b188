"""The TPU kernels of cross_entropy in the TPU interpreter: numbers, gradients, no races; blocks that fit; refusals."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import cross_entropy, cross_entropy_sum
from hsai_kernels.dispatch import compile_for
from hsai_kernels.interpret import interpret_tpu
from hsai_kernels.mosaic import FAST_MEMORY
from hsai_kernels.ops.cross_entropy.shapes import SHAPES, CrossEntropyShape
from hsai_kernels.ops.cross_entropy.tpu import choose_blocks, lose_in_blocks
from tests.kernels.test_cross_entropy import ask_oracle_for_sum, check, draw
from tests.kernels.tolerances import assert_close

SMALL = {"forward": (32, 128), "backward": (16, 128)}


pytestmark = pytest.mark.usefixtures("no_races")


def check_interpreted(
    operands: tuple[jax.Array, ...], options: dict[str, Any], cores: int = 1, **blocks: tuple[int, int]
) -> None:
    with interpret_tpu(cores=cores):
        check(functools.partial(lose_in_blocks, **(SMALL | blocks)), operands, options)


SUPPORTED = [shape for shape in SHAPES if shape.embed % 128 == 0]


@pytest.mark.parametrize(("shape", "dtype"), list(zip(SUPPORTED, ("bfloat16", "float32"), strict=True)), ids=str)
def test_loss_and_gradients_match_the_oracle(shape: CrossEntropyShape, dtype: str) -> None:
    check_interpreted(draw(shape, dtype), {})


@pytest.mark.parametrize(
    ("options", "dtype"), [({"softcap": 2.5}, "float32"), ({"softcap": 4.0, "z_loss": 0.1}, "bfloat16")], ids=str
)
def test_options_match_the_oracle(options: dict[str, Any], dtype: str) -> None:
    shape = CrossEntropyShape(lead=(2, 1), tokens=9, embed=128, vocab=300)
    check_interpreted(draw(shape, dtype, dtype), options)


@pytest.mark.parametrize(
    ("forward", "backward"), [((16, 256), (32, 128)), ((16, 128), (16, 384)), ((64, 512), (64, 512))]
)
def test_any_blocks_give_the_same_numbers(forward: tuple[int, int], backward: tuple[int, int]) -> None:
    """Other ones backward than forward, one block of tokens in flight, and a single block of everything."""
    shape = CrossEntropyShape(lead=(), tokens=33, embed=128, vocab=300)
    check_interpreted(draw(shape, "float32"), {"z_loss": 0.1}, forward=forward, backward=backward)


def test_two_cores_share_no_result() -> None:
    """Blocks of tokens are spread over cores forward; backward one core does everything."""
    check_interpreted(draw(CrossEntropyShape(lead=(), tokens=40, embed=128, vocab=200), "float32"), {}, cores=2)


def test_it_is_the_automatic_choice_on_a_tpu() -> None:
    """Of a sum too, up to embeddings beyond which another backend is faster."""
    x, w, targets, weights = draw(CrossEntropyShape(lead=(2,), tokens=3, embed=128, vocab=9), "float32")
    with compile_for("tpu"):
        assert "cross_entropy_forward" in str(jax.make_jaxpr(cross_entropy)(x, w, targets))
        assert "cross_entropy_forward" in str(jax.make_jaxpr(cross_entropy_sum)(x, w, targets, weights))
        wide = (jnp.zeros((2, 3, 4096)), jnp.zeros((4096, 9)), targets)
        assert "cross_entropy_forward" in str(jax.make_jaxpr(cross_entropy)(*wide))
        assert "cross_entropy_forward" not in str(jax.make_jaxpr(cross_entropy_sum)(*wide, weights))
        with pytest.raises(NotImplementedError, match="up to 2048, where it saves time, not 4096"):
            cross_entropy_sum(*wide, weights, implementation="tpu")


def test_a_sum_and_its_gradients_match_the_oracle() -> None:
    """Those of x, w and the weights, behind which another gradient comes."""
    operands = draw(CrossEntropyShape(lead=(2,), tokens=3, embed=128, vocab=9), "float32")

    def lose(*operands: jax.Array) -> jax.Array:
        return 3.0 * cross_entropy_sum(*operands, z_loss=0.1, implementation="tpu")

    with interpret_tpu():
        found = jax.jit(jax.value_and_grad(lose, (0, 1, 3)))(*operands)
    wanted = ask_oracle_for_sum(operands, 3.0, z_loss=0.1)
    # Magnitudes bound what rounding could do to a sum of many terms; it does not come near that of the largest.
    for array, (expected, magnitude) in zip(jax.tree.leaves(found), wanted, strict=True):
        assert array.dtype == jnp.float32
        assert_close(array, expected, np.minimum(magnitude, 50.0), "float32")


def test_large_logits_stay_finite() -> None:
    x, *others = draw(CrossEntropyShape(lead=(), tokens=5, embed=128, vocab=130), "float32")
    check_interpreted((1e4 * x, *others), {})


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("embed", [128, 640, 2048, 4096, 8192])
def test_blocks_fit_fast_memory(embed: int, itemsize: int) -> None:
    for (tokens, words), sums in zip(choose_blocks(embed, itemsize), (0, 4 * embed), strict=True):
        held = 2 * itemsize * embed * (tokens + words) + sums * (tokens + 2 * words)
        assert held < FAST_MEMORY
        assert tokens % 16 == 0 and words % 128 == 0
    assert choose_blocks(2048, 2)[1] == (512, 512)


@pytest.mark.parametrize(
    ("embed", "message"), [(80, "multiples of 128, not 80"), (2**16, "fit 48 MiB, not 65536 for 4-byte activations")]
)
def test_embeddings_that_do_not_fit_are_refused(embed: int, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        choose_blocks(embed, 4)


def test_another_platform_is_refused_by_name_and_passed_over_without() -> None:
    x, w, targets, _ = draw(SHAPES[4], "float32")
    with compile_for("cpu"), pytest.raises(NotImplementedError, match="tpu platform only"):
        cross_entropy(x, w, targets, implementation="tpu")
    assert np.all(np.isfinite(cross_entropy(x, w, targets)))


def test_the_cost_is_stated() -> None:
    """XLA counts no flops of a kernel itself; 2TDV forward and 6TDV backward, of padded tokens."""
    x, w, targets, pull = draw(CrossEntropyShape(lead=(), tokens=32, embed=128, vocab=256), "float32")

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(pull * lose_in_blocks(x, w, targets, softcap=None, z_loss=0.0, **SMALL))

    jaxpr = str(jax.make_jaxpr(jax.grad(run, (0, 1)))(x, w))
    for times in (2, 6):
        assert f"flops={times * 32 * 128 * 256}" in jaxpr
