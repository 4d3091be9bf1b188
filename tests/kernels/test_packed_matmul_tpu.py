"""The TPU backends of quantized_matmul and sparse_matmul in TPU interpret mode, against the float64 oracles.

That their kernels compile for real chips is shown by test_aot.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import quantized_matmul, sparse_matmul
from hsai_kernels.dispatch import compile_for
from hsai_kernels.interpret import interpret_tpu
from hsai_kernels.ops.quantized_matmul.shapes import SHAPES as QUANTIZED_SHAPES
from hsai_kernels.ops.quantized_matmul.shapes import QuantizedShape
from hsai_kernels.ops.quantized_matmul.tpu import CODES, INT8
from hsai_kernels.ops.quantized_matmul.tpu_product import plan_product
from hsai_kernels.ops.sparse_matmul.shapes import EIGHTHS, SparseShape
from hsai_kernels.ops.sparse_matmul.shapes import SHAPES as SPARSE_SHAPES
from hsai_kernels.tuning import name_product_shape, use_tiles
from tests.kernels import oracles
from tests.kernels.test_quantized_matmul import _draw_minima as draw_minima
from tests.kernels.tolerances import assert_close

DTYPES = ("float32", "bfloat16")
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}


pytestmark = pytest.mark.usefixtures("no_races")


def draw_quantized(shape: QuantizedShape, kind: str, dtype: str, *, centered: bool = False):
    """(x, values, scale), and in float64: the product, and the magnitude of its terms."""
    rng = np.random.default_rng(shape.contraction + shape.columns)
    x = jnp.asarray(rng.standard_normal((*shape.lead, shape.contraction)), dtype)
    scale = jnp.asarray(oracles.draw_scale(rng, shape.contraction // shape.group, shape.columns), jnp.float32)
    bits = BITS[kind]
    codes = rng.integers(0, 2**bits, (shape.contraction, shape.columns))
    levels = codes - oracles.find_zero(bits, centered)
    values = jnp.asarray(levels, jnp.int8) if bits == 8 else jnp.asarray(oracles.pack(codes, bits))
    weight = oracles.scale_rows(levels, np.asarray(scale, np.float64))
    exact = np.asarray(x, np.float64)
    return (x, values, scale), exact @ weight, np.abs(exact) @ np.abs(weight)


def draw_sparse(shape: SparseShape, kind: str, dtype: str):
    """(x, values, indices, scale), and in float64: the product, and the magnitude of its terms."""
    rng = np.random.default_rng(shape.contraction + shape.columns)
    x = jnp.asarray(rng.standard_normal((*shape.lead, shape.contraction)), dtype)
    positions = oracles.draw_positions(rng, shape.contraction, shape.columns, shape.kept, shape.pattern)
    if kind == "int4":
        codes = rng.integers(-8, 8, positions.shape)
        values = jnp.asarray(oracles.pack(codes + 8, 4))
        scale = jnp.asarray(oracles.draw_scale(rng, shape.contraction // shape.group, shape.columns), jnp.float32)
        kept = oracles.scale_rows(codes, np.asarray(scale, np.float64))
    else:
        values, scale = jnp.asarray(rng.standard_normal(positions.shape), kind), None
        kept = np.asarray(values, np.float64)
    weight = oracles.densify(kept, positions, shape.kept, shape.pattern)
    indices = jnp.asarray(oracles.pack(positions, 2 if shape.pattern == 4 else 3))
    exact = np.asarray(x, np.float64)
    return (x, values, indices, scale), exact @ weight, np.abs(exact) @ np.abs(weight)


# Each shape in one of the dtypes; then two blocks of the contraction, the second ragged, and two blocks of rows.
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, DTYPES[i % 2]) for i, shape in enumerate(QUANTIZED_SHAPES)),
        (QuantizedShape(lead=(3,), contraction=1280, columns=140, group=64), "float32"),
        (QuantizedShape(lead=(2, 260), contraction=64, columns=20, group=64), "bfloat16"),
    ],
    ids=str,
)
def test_quantized_products_match_the_oracle(shape, dtype, kind):
    check_quantized(shape, dtype, kind)


@pytest.mark.parametrize(("kind", "centered"), [("int3", False), ("int3", True), ("int2", False), ("int2", True)])
@pytest.mark.parametrize("shape", [QUANTIZED_SHAPES[2], QUANTIZED_SHAPES[8]], ids=str)
def test_products_of_fewer_bits_match_the_oracle(shape, kind, centered):
    check_quantized(shape, "float32", kind, centered=centered)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_from_a_minimum_match_the_oracle(dtype):
    operands, x, weight, largest = draw_minima(QUANTIZED_SHAPES[2], dtype, "float16")
    with interpret_tpu():
        out = np.asarray(quantized_matmul(*operands, implementation="tpu"))
    assert out.dtype == dtype
    assert_close(out, x @ weight, np.abs(x) @ largest, dtype)


def test_two_cores_share_no_result():
    """3 blocks of columns, so that one would be halved if the contraction's two were split over cores."""
    shape = QuantizedShape(lead=(3,), contraction=256, columns=300, group=64)
    key = ("quantized_matmul int8", "float32", name_product_shape(3, 256, 4))
    with use_tiles({key: {"rows": 16, "columns": 128, "contraction": 128}}):
        check_quantized(shape, "float32", "int8", cores=2)


def check_quantized(shape: QuantizedShape, dtype: str, kind: str, *, centered: bool = False, cores: int = 1) -> None:
    operands, product, magnitude = draw_quantized(shape, kind, dtype, centered=centered)
    options = {"bits": BITS[kind] % 8 or 4, "centered": centered}
    with interpret_tpu(cores=cores):
        out = np.asarray(quantized_matmul(*operands, **options, implementation="tpu"))
    assert out.dtype == dtype
    assert_close(out, product, magnitude, dtype)


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"),
    [
        *((s, ("float32", "int4", "bfloat16")[i % 3], DTYPES[i % 2]) for i, s in enumerate(SPARSE_SHAPES)),
        (SPARSE_SHAPES[5], "float32", "float32"),
        (EIGHTHS[1], "int4", "float32"),
        (EIGHTHS[2], "float32", "float32"),
        (EIGHTHS[3], "int4", "bfloat16"),
        (EIGHTHS[6], "bfloat16", "bfloat16"),
        *(
            (SparseShape(lead=(3,), contraction=1280, columns=140, kept=n, group=64), kind, "float32")
            for n, kind in ((2, "int4"), (2, "bfloat16"), (1, "int4"), (3, "float32"))
        ),
    ],
    ids=str,
)
def test_sparse_products_match_the_oracle(shape, kind, dtype):
    operands, product, magnitude = draw_sparse(shape, kind, dtype)
    with interpret_tpu():
        out = np.asarray(sparse_matmul(*operands, n=shape.kept, m=shape.pattern, implementation="tpu"))
    assert out.dtype == dtype
    assert_close(out, product, magnitude, dtype)


@pytest.mark.parametrize("kind", ["int8", "int4", "int4 from a minimum", "2:4 int4"])
def test_gradients_are_the_references(kind):
    """The reference's gradients are held to the oracle by its own tests; here all floating operands have theirs."""
    multiply, floating = quantized_matmul, (0, 2)
    if kind.startswith("2:4"):
        operands, *_ = draw_sparse(SPARSE_SHAPES[4], "int4", "float32")
        multiply, floating = functools.partial(sparse_matmul, n=2, m=4), (0, 3)
    elif "minimum" in kind:
        operands, *_ = draw_minima(QUANTIZED_SHAPES[4], "float32", "float16")
        floating = (0, 2, 3)
    else:
        operands, *_ = draw_quantized(QUANTIZED_SHAPES[4], kind, "float32")
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((3, 257)), jnp.float32)

    def differentiate(implementation):
        pull = jax.vjp(lambda *o: multiply(*o, implementation=implementation), *operands)[1]
        return [np.asarray(pull(cotangent)[i]) for i in floating]

    with interpret_tpu():
        found = differentiate("tpu")
    for gradient, expected in zip(found, differentiate("reference"), strict=True):
        assert np.any(expected != 0)
        np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("group", [8, 16, 32, 40, 64, 96, 128, 256, 512, 1280, None])
@pytest.mark.parametrize("packing", [INT8, CODES[4, False], CODES[3, True], CODES[2, True]])
def test_blocks_hold_whole_planes_and_groups(packing, group):
    plan = plan_product(packing, 5, 15360, 300, group)
    assert plan.contraction % 128 == 0 and plan.contraction % (8 * plan.planes) == 0
    assert plan.planes % packing.period == 0 and plan.contraction <= 4096
    if group is not None:
        assert plan.contraction % group == 0
        # A plane's rows are those of the scales, or eight at a time share one.
        assert plan.planes % group == 0 or group % (8 * plan.planes) == 0
    assert (plan.rows, plan.columns) == (16, 384)


def test_groups_that_no_block_holds_are_refused():
    operands, *_ = draw_quantized(
        QuantizedShape(lead=(1,), contraction=12000, columns=2, group=6000), "int8", "float32"
    )
    with interpret_tpu(), pytest.raises(NotImplementedError, match="blocks of up to 4096 positions, not of 6000"):
        quantized_matmul(*operands, implementation="tpu")


def test_rounded_activations_of_sparse_weights_are_refused():
    (x, values, indices, scale), *_ = draw_sparse(SPARSE_SHAPES[0], "int4", "float32")
    with interpret_tpu(), pytest.raises(NotImplementedError, match="not rounded to 8 bits"):
        sparse_matmul(x, values, indices, scale, n=2, m=4, activation_bits=8, implementation="tpu")


def test_empty_operands_are_refused():
    operands, *_ = draw_quantized(QuantizedShape(lead=(0,), contraction=32, columns=2, group=32), "int8", "float32")
    with interpret_tpu(), pytest.raises(NotImplementedError, match=r"not empty, not x \(0, 32\)"):
        quantized_matmul(*operands, implementation="tpu")


def test_other_platforms_are_refused():
    for multiply, operands in (
        (quantized_matmul, draw_quantized(QUANTIZED_SHAPES[0], "int8", "float32")[0]),
        (functools.partial(sparse_matmul, n=2, m=4), draw_sparse(SPARSE_SHAPES[0], "int4", "float32")[0]),
    ):
        with compile_for("cpu"), pytest.raises(NotImplementedError, match="tpu platform only"):
            multiply(*operands, implementation="tpu")
