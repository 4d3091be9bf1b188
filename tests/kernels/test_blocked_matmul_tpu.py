"""The TPU backend of sparse_matmul for V:N:M weights in TPU interpret mode, against the float64 oracle.

That its kernel compiles for real chips is shown by test_aot.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import sparse_matmul
from hsai_kernels.interpret import interpret_tpu
from hsai_kernels.mosaic import LANES
from hsai_kernels.ops.sparse_matmul.shapes import BLOCKED_SHAPES, SparseShape
from hsai_kernels.ops.sparse_matmul.tpu import choose_packing
from hsai_kernels.ops.sparse_matmul.tpu_chosen import LARGEST_BLOCK, MOST_ACTIVATIONS, MOST_CHOSEN, plan_chosen
from hsai_kernels.tuning import name_product_shape, use_tiles
from tests.kernels.test_sparse_matmul import _draw as draw
from tests.kernels.tolerances import assert_close

DTYPES = ("float32", "bfloat16")

pytestmark = pytest.mark.usefixtures("no_races")


def multiply(operands, shape: SparseShape, cores: int = 1) -> np.ndarray:
    with interpret_tpu(cores=cores):
        return np.asarray(sparse_matmul(*operands, n=shape.kept, m=shape.pattern, implementation="tpu"))


def check(shape: SparseShape, kind: str, dtype: str, scale_dtype: str = "float32", cores: int = 1) -> None:
    operands, x, weight = draw(shape, kind, dtype, scale_dtype)
    out = multiply(operands, shape, cores)
    assert out.dtype == dtype
    assert_close(out, x @ weight, np.abs(x) @ np.abs(weight), dtype)


# Each shape with int4 and with one kind of floating values, the dtypes of activations in turn.
@pytest.mark.parametrize(
    ("shape", "kind", "dtype"),
    [
        *((s, "int4", DTYPES[i % 2]) for i, s in enumerate(BLOCKED_SHAPES)),
        *((s, DTYPES[i // 2 % 2], DTYPES[(i + 1) % 2]) for i, s in enumerate(BLOCKED_SHAPES)),
    ],
    ids=str,
)
def test_products_match_the_oracle(shape, kind, dtype):
    check(shape, kind, dtype)


def _shape(lead, contraction, columns, width, kept, pattern, group) -> SparseShape:
    return SparseShape(
        lead=lead, contraction=contraction, columns=columns, kept=kept, group=group, pattern=pattern, width=width
    )


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"),
    [
        # Two blocks of the contraction, the second ragged.
        (_shape((3,), 2560, 96, 48, 2, 8, 64), "bfloat16", "bfloat16"),
        (_shape((3,), 2560, 96, 48, 2, 8, 320), "int4", "float32"),
        (_shape((2,), 5120, 64, 64, 1, 16, 64), "int4", "bfloat16"),
        (_shape((2,), 8448, 32, 32, 2, 32, 8448), "float32", "float32"),
        # Groups whose planes are as many as they have rows: the chosen of 24 rows, in blocks of 1536.
        (_shape((3,), 768, 48, 48, 3, 8, 48), "int4", "float32"),
        # Groups of a group: every scale belongs to 4 rows.
        (_shape((4,), 512, 32, 16, 2, 32, 32), "int4", "bfloat16"),
        # Two blocks of rows, of several parts, which are chosen from in a loop.
        (_shape((2, 260), 128, 64, 32, 2, 8, 64), "int4", "float32"),
        (_shape((520,), 1024, 48, 48, 2, 8, 64), "float32", "bfloat16"),
        # Tiles that meet three blocks, at other columns each; a block that is a tile and a part of two.
        (_shape((1,), 256, 640, 80, 2, 8, 64), "int4", "float32"),
        (_shape((1,), 256, 600, 200, 2, 8, 64), "float32", "bfloat16"),
    ],
    ids=str,
)
def test_ragged_and_many_blocks(shape, kind, dtype):
    check(shape, kind, dtype, "bfloat16")


def test_two_cores_share_no_result():
    """3 blocks of columns, so that one would be halved if the contraction's two were split over cores."""
    tile = {"rows": 16, "columns": 128, "contraction": 512}
    with use_tiles({("sparse_matmul V:2:8 float32", "float32", name_product_shape(3, 2048, None)): tile}):
        check(_shape((3,), 2048, 384, 128, 2, 8, 2048), "float32", "float32", cores=2)


def test_a_block_takes_what_it_chose_and_nothing_else():
    """What no block chose is not multiplied: there x may be anything."""
    shape = BLOCKED_SHAPES[0]
    (x, values, indices, scale, choices), exact, weight = draw(shape, "float32", "float32")
    read = (np.asarray(choices)[:, 0][:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool).reshape(-1)
    assert read.sum() == shape.contraction // 2
    out = multiply((jnp.where(read, x, jnp.nan), values, indices, scale, choices), shape)
    assert_close(out, exact @ weight, np.abs(exact) @ np.abs(weight), "float32")


def test_choices_of_too_few_or_too_many_are_read_within_their_bounds():
    """What the product then is nobody says, but it is the same each time and stays a number."""
    shape = BLOCKED_SHAPES[1]
    (*operands, choices), *_ = draw(shape, "int4", "float32")
    for odd in (jnp.zeros_like(choices), ~jnp.zeros_like(choices)):
        outs = [multiply((*operands, odd), shape) for _ in range(2)]
        np.testing.assert_array_equal(*outs)
        assert np.isfinite(outs[0]).all()


@pytest.mark.parametrize(("kind", "floating"), [("float32", (0, 1)), ("int4", (0, 3))])
def test_gradients_are_the_references(kind, floating):
    operands, *_ = draw(BLOCKED_SHAPES[1], kind, "float32")
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((3, 48)), jnp.float32)

    def differentiate(implementation):
        product = functools.partial(sparse_matmul, n=1, m=8, implementation=implementation)
        pull = jax.vjp(product, *operands)[1]
        return [np.asarray(pull(cotangent)[i]) for i in floating]

    with interpret_tpu():
        found = differentiate("tpu")
    for gradient, expected in zip(found, differentiate("reference"), strict=True):
        assert np.any(expected != 0)
        np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("m", [8, 16, 32])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 512, None])
@pytest.mark.parametrize("held", [1, 2, 8])
def test_blocks_hold_whole_groups_and_fit_fast_memory(m, n, group, held):
    packing = choose_packing(n, 4, jax.ShapeDtypeStruct((8, 8), "uint32"))
    rows = None if group is None else group * 4 // m
    plan = plan_chosen(packing, m, held, 700, 15360 * 4 // m, 300, rows, LARGEST_BLOCK)
    # The groups of m lie in whole lanes.
    assert plan.contraction % (4 * LANES) == 0 and plan.contraction % (8 * plan.planes) == 0
    assert rows is None or plan.contraction % rows == 0
    assert plan.rows % 16 == 0
    assert plan.rows * plan.contraction * m // 4 <= MOST_ACTIVATIONS
    assert held * plan.rows * plan.contraction <= MOST_CHOSEN


def test_refusals():
    for shape, kind, message in (
        (_shape((1,), 128, 8, 8, 2, 8, 64), "int4", "16 at least, not of 8 columns a block"),
        (_shape((1,), 8448, 16, 16, 2, 8, 4224), "int4", "blocks of up to 8192 positions, not of 4224"),
        (_shape((0,), 128, 16, 16, 2, 8, 64), "int4", r"not empty, not x \(0, 128\)"),
        (BLOCKED_SHAPES[0], "int8", "not int8 values"),
    ):
        operands, *_ = draw(shape, kind, "float32")
        with pytest.raises(NotImplementedError, match=message):
            multiply(operands, shape)
