"""quantized_matmul with activations rounded to int8, on accelerators: kernels in their interpreters.

Against float64 on the activations that rounding leaves, within the one table of tolerances: what is left to allow for
is float32's sum of the groups, and its rounding of a sum of integers above 2**24. The sums of integers themselves are
exact: where scales and steps are powers of two, or there is one group, results have the bits of exact arithmetic.

That the kernels compile for chips is shown by test_aot.py.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import quantized_matmul
from hsai_kernels.aot.runner import TARGETS
from hsai_kernels.dispatch import compile_for
from hsai_kernels.gpu_product import ProductTile
from hsai_kernels.interpret import interpret_gpu, interpret_tpu
from hsai_kernels.ops.quantized_matmul.gpu import quantized_matmul_gpu
from hsai_kernels.ops.quantized_matmul.rounded import name_kernel
from hsai_kernels.ops.quantized_matmul.shapes import SHAPES, QuantizedShape
from hsai_kernels.ops.quantized_matmul.tpu_rounded import DEEPEST, find_piece, plan_rounded
from hsai_kernels.packing import count_elements
from hsai_kernels.tuning import name_product_shape, use_tiles
from tests.kernels import oracles
from tests.kernels.test_programs import find_products
from tests.kernels.test_quantized_matmul import KINDS
from tests.kernels.test_quantized_matmul import _draw as draw
from tests.kernels.test_quantized_matmul import _draw_minima as draw_minima
from tests.kernels.tolerances import assert_close

DTYPES = ("float32", "bfloat16")
INTERPRET = {"gpu": interpret_gpu, "tpu": interpret_tpu}
SMALL = ProductTile(rows=16, columns=32, units=32)


@pytest.fixture(params=sorted(INTERPRET))
def platform(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each accelerator; no TPU kernel may race."""
    if request.param == "tpu":
        request.getfixturevalue("no_races")
    yield request.param


def multiply(platform: str, kind: str, *operands: Any, **options: Any) -> np.ndarray:
    with INTERPRET[platform]():
        call = functools.partial(quantized_matmul, **KINDS[kind], activation_bits=8, implementation=platform)
        return np.asarray(jax.jit(functools.partial(call, **options))(*operands))


def check(out: np.ndarray, dtype: str, x: np.ndarray, groups: int, weight: np.ndarray, largest: np.ndarray) -> None:
    """`weight` (D, F) in float64, and the largest that its codes can mean."""
    codes, step = oracles.round_rows(x, groups)
    assert out.dtype == dtype
    assert_close(out, (codes * step) @ weight, np.abs(codes * step) @ largest, dtype)
    if codes.size > 100:
        assert np.max(np.abs(np.asarray(out, np.float64) - x @ weight)) > 1e-4  # it does round


# Blocks of the contraction, the last ragged, and of columns; of rows; groups of more positions than a product adds.
LARGER = (
    QuantizedShape(lead=(3,), contraction=1280, columns=140, group=64),
    QuantizedShape(lead=(2, 260), contraction=64, columns=20, group=32),
    QuantizedShape(lead=(5,), contraction=2304, columns=10, group=1152),
    QuantizedShape(lead=(9,), contraction=2100, columns=10, group=2100),
)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("number", range(len(SHAPES) + len(LARGER)))
def test_products_match_the_oracle(platform, number, kind):
    shape, dtype = (*SHAPES, *LARGER)[number], DTYPES[number % 2]
    if kind == "int4" and shape.group % 8:
        shape = QuantizedShape(lead=shape.lead, contraction=2112, columns=shape.columns, group=2112)
    operands, x, weight, largest = draw(shape, kind, dtype)
    check(multiply(platform, kind, *operands), dtype, x, operands[2].shape[0], weight, largest)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("int8", "int4")])
def test_codes_of_every_kind_match_the_oracle(platform, kind):
    operands, x, weight, largest = draw(SHAPES[5], kind, "float32", "bfloat16")
    check(multiply(platform, kind, *operands), "float32", x, operands[2].shape[0], weight, largest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_from_a_minimum_match_the_oracle(platform, dtype):
    operands, x, weight, largest = draw_minima(SHAPES[4], dtype, "float16")
    check(multiply(platform, "int4", *operands), dtype, x, operands[2].shape[0], weight, largest)


def draw_integers(kind: str, rows: int, contraction: int, columns: int, group: int):
    """x of integers whose largest in each group is 127, so that steps are 1, values, and the weight's integers."""
    rng = np.random.default_rng(contraction + columns)
    x = rng.integers(-127, 128, (rows, contraction))
    x[:, ::group] = 127
    bits = KINDS[kind].get("bits", 8)
    codes = rng.integers(0, 2**bits, (contraction, columns))
    levels = codes - int(oracles.find_zero(bits, False))
    values = levels.astype(np.int8) if kind == "int8" else oracles.pack(codes, bits)
    return x, jnp.asarray(values), levels


@pytest.mark.parametrize(
    ("kind", "contraction", "group"),
    [
        ("int8", 480, 40),
        ("int8", 512, 128),
        ("int8", 960, 960),
        ("int4", 480, 40),
        ("int4", 1024, 256),
        ("int2", 512, 32),
        ("int3", 512, 64),
    ],
)
def test_sums_of_integers_are_exact(platform, kind, contraction, group):
    """All sums stay below 2**24, so that float32 adds groups exactly as well."""
    x, values, levels = draw_integers(kind, 3, contraction, 45, group)
    scale = np.full((contraction // group, 45), 2.0**-6, np.float32)
    out = multiply(platform, kind, jnp.asarray(x, jnp.float32), values, scale)
    np.testing.assert_array_equal(out, (x @ levels) * 2.0**-6)


def test_a_sum_above_float32s_integers_is_exact_until_it_is_converted(platform):
    """One group, whose terms are all on one side and add up to 27 bits: its blocks, and the programs that share it, add
    integers, for float32 would round the sums of most of them."""
    rng = np.random.default_rng(0)
    x, levels = rng.integers(120, 128, (2, 8256)), rng.integers(120, 128, (8256, 30))
    x[:, 7] = 127
    scale = rng.uniform(0.01, 0.1, (1, 30)).astype(np.float32)
    out = multiply(platform, "int8", jnp.asarray(x, jnp.float32), jnp.asarray(levels, jnp.int8), scale)
    exact = x @ levels
    assert exact.min() > 2**26
    np.testing.assert_array_equal(out, exact.astype(np.float32) * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "int4", "centered int3"])
def test_with_a_scale_a_column_results_have_the_references_bits(platform, kind, dtype):
    """Of any magnitude: a row of zeros, of float32's largest and smallest normal numbers and of less; an infinity and a
    NaN make their rows NaN, as the reference has it."""
    shape = QuantizedShape(lead=(9,), contraction=576, columns=40, group=576)
    (x, values, scale), *_ = draw(shape, kind, dtype)
    factors = [1.0, 0.0, 2.0**125, 2.0**-120, 2.0**-134, 1e30, 1e-30, 1.0, 1.0]
    x = x * jnp.asarray(factors, jnp.float32)[:, None].astype(dtype)
    x = x.at[7, 3].set(jnp.inf).at[8, 4].set(jnp.nan)
    call = functools.partial(quantized_matmul, **KINDS[kind], activation_bits=8, implementation="reference")
    # As float32, which has all of bfloat16: numpy knows no NaN of the latter.
    wanted = np.asarray(jax.jit(call)(x, values, scale), np.float32)
    out = multiply(platform, kind, x, values, scale).astype(np.float32)
    assert np.all(out[1] == 0) and np.all(np.isnan(out[7:]))
    assert np.all(np.isfinite(out[[0, 3, 5, 6]])) and np.all(np.any(out[[0, 2, 3, 5, 6]] != 0, axis=1))
    np.testing.assert_array_equal(out, wanted)


def test_rows_do_not_touch_each_other(platform):
    """Groups of a row of zeros, and of a row that is not finite, beside others."""
    (x, values, scale), *_ = draw(QuantizedShape(lead=(1,), contraction=512, columns=40, group=32), "int4", "float32")
    rows = jnp.concatenate([x, 0 * x, x * 2.0**100, x.at[0, 40].set(jnp.nan), -x])
    out = multiply(platform, "int4", rows, values, scale)
    assert np.all(out[1] == 0) and np.all(np.isnan(out[3]))
    np.testing.assert_array_equal(out[2], out[0] * np.float32(2.0**100))
    np.testing.assert_array_equal(out[4], -out[0])


@pytest.mark.parametrize(
    ("kind", "group", "bits"),
    [("int8", 128, 8), ("int4", 32, 8), ("int4 from a minimum", 128, 8), ("int8", 128, None), ("int4", 128, None)],
)
def test_a_scale_that_is_no_number_spoils_its_column_only(platform, kind, group, bits):
    """Without rounding too."""
    shape = QuantizedShape(lead=(3,), contraction=256, columns=150, group=group)
    if kind.endswith("minimum"):
        (x, values, *scales), *_ = draw_minima(shape, "float32", "float32")
    else:
        (x, values, *scales), *_ = draw(shape, kind, "float32")
    call = functools.partial(multiply, platform, kind.split()[0], x, values, activation_bits=bits)
    right = call(*scales)
    for i in range(len(scales)):
        found = call(*scales[:i], scales[i].at[1, 5].set(jnp.nan), *scales[i + 1 :])
        assert np.all(np.isnan(found[:, 5]))
        np.testing.assert_array_equal(np.delete(found, 5, axis=1), np.delete(right, 5, axis=1))


@pytest.mark.parametrize("kind", ["int8", "int4", "centered int2", "int4 from a minimum"])
def test_gradients_are_the_references(platform, kind):
    """Those of the product without rounding, whose tests hold them to the oracle."""
    if kind.endswith("minimum"):
        operands, *_ = draw_minima(SHAPES[3], "float32", "float16")
    else:
        operands, *_ = draw(SHAPES[3], kind, "float32")
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((2, 16)), jnp.float32)
    call = functools.partial(quantized_matmul, **KINDS.get(kind, {}), activation_bits=8)

    def differentiate(implementation):
        pull = jax.vjp(functools.partial(call, implementation=implementation), *operands)[1]
        return [np.asarray(found) for i, found in enumerate(pull(cotangent)) if i != 1]

    with INTERPRET[platform]():
        found = differentiate(platform)
    for gradient, expected in zip(found, differentiate("reference"), strict=True):
        assert np.any(expected != 0)
        np.testing.assert_array_equal(gradient, expected)


def test_scan(platform):
    (x, values, scale), *_ = draw(SHAPES[3], "int4", "float32")
    call = functools.partial(quantized_matmul, activation_bits=8, implementation=platform)

    def step(carry, layer):
        return carry, call(x, *layer)

    layers = (jnp.stack([values, values]), jnp.stack([scale, 2 * scale]))
    with INTERPRET[platform]():
        expected = np.asarray(call(x, values, scale))
        scanned = jax.jit(lambda layers: jax.lax.scan(step, 0, layers)[1])(layers)
    np.testing.assert_array_equal(scanned, [expected, 2 * expected])


def test_vmap_on_a_gpu():
    """jax's interpreter of TPU kernels has none of a grid whose axes are parallel."""
    (x, values, scale), *_ = draw(SHAPES[3], "int4", "float32")
    call = functools.partial(quantized_matmul, activation_bits=8, implementation="gpu")
    with interpret_gpu():
        expected = np.asarray(call(x, values, scale))
        mapped = jax.vmap(call, in_axes=(0, None, None))(jnp.stack([x, -x]), values, scale)
    np.testing.assert_array_equal(mapped, [expected, -expected])


def test_the_automatic_choice_takes_them(platform):
    operands, *_ = draw(SHAPES[3], "int8", "float32")
    for groups, chosen in ((3, True), (96, platform == "gpu")):  # of 32 positions; of one
        scale = jnp.ones((groups, 16))
        with compile_for(platform):
            program = str(jax.make_jaxpr(functools.partial(quantized_matmul, activation_bits=8))(*operands[:2], scale))
        assert ("pallas_call" in program) is chosen


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_many_blocks_on_a_gpu(kind):
    """3 ragged blocks of rows, 2 of columns; groups of 2 1/2 blocks, and of a quarter of one."""
    for group in (80, 8):
        shape = QuantizedShape(lead=(35,), contraction=320, columns=45, group=group)
        operands, x, weight, largest = draw(shape, kind, "float32", "bfloat16")
        with interpret_gpu():
            out = jax.jit(functools.partial(quantized_matmul_gpu, activation_bits=8, tile=SMALL))(*operands)
        check(np.asarray(out), "float32", x, operands[2].shape[0], weight, largest)


@pytest.mark.parametrize(
    ("group", "parts"), [(2176, "i32[17,8,20]"), (128, "f32[17,8,20]"), (1088, "f32[2,8,20]")], ids=str
)
def test_a_contraction_that_is_split_on_a_gpu(group, parts):
    """8 rows: 68 blocks, at least 4 a program, by blocks of one group or by groups."""
    shape = QuantizedShape(lead=(8,), contraction=2176, columns=20, group=group)
    operands, x, weight, largest = draw(shape, "int8", "bfloat16")
    call = functools.partial(quantized_matmul_gpu, activation_bits=8, tile=SMALL)
    with interpret_gpu():
        assert parts in str(jax.make_jaxpr(call)(*operands))
        out = np.asarray(jax.jit(call)(*operands))
    check(out, "bfloat16", x, operands[2].shape[0], weight, largest)


def test_two_cores_of_a_tpu_share_no_result(no_races):
    """3 blocks of columns, so that one would be halved if the contraction's two were split over cores."""
    shape = QuantizedShape(lead=(3,), contraction=256, columns=300, group=256)
    operands, x, weight, largest = draw(shape, "int8", "float32")
    tile = {"rows": 16, "columns": 128, "contraction": 128}
    key = (name_kernel(operands[1], 8), "float32", name_product_shape(3, 256, 1))
    with interpret_tpu(cores=2), use_tiles({key: tile}):
        call = functools.partial(quantized_matmul, activation_bits=8, implementation="tpu")
        out = np.asarray(jax.jit(call)(*operands))
    check(out, "float32", x, 1, weight, largest)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group", [8, 16, 32, 40, 64, 96, 128, 192, 256, 512, 1280, 15360])
def test_blocks_of_a_tpu_hold_whole_spans(bits, group):
    piece = find_piece(bits)
    if (span := math.lcm(piece, group)) > 16 * group:
        with pytest.raises(
            NotImplementedError, match=f"up to 16 scale groups in {span} positions, not groups of {group}"
        ):
            plan_rounded(bits, 5, 15360, 300, 15360 // group)
        return
    plan = plan_rounded(bits, 5, 15360, 300, 15360 // group)
    assert plan.contraction % plan.span == 0 and plan.span % piece == 0 and plan.contraction <= 4096
    assert plan.copies <= 16
    if group < 15360:
        assert plan.span % group == 0 and (plan.copies == 1) == (group % piece == 0)
    assert (plan.rows, plan.columns) == (8, 384)
    many = plan_rounded(bits, 700, 15360, 300, 15360 // group)
    assert many.rows % 32 == 0 and many.rows * many.copies <= 544


@pytest.mark.parametrize(
    ("contraction", "group", "depths"),
    [
        (3072, 1536, [1024, 512]),
        (3072, 3072, [1024]),
        (2816, 88, [1024, 384]),
        (256, 128, [128, 128]),
    ],
)
def test_no_product_on_a_tpu_adds_more_than_a_7x_adds_exactly(contraction, group, depths):
    """Its float32 sums of products of 128 * 127 at most."""
    assert 128 * 127 * DEEPEST < 2**24
    shapes = ((4, contraction), (contraction, 8), (contraction // group, 8))
    operands = [jax.ShapeDtypeStruct(*a) for a in zip(shapes, ("float32", "int8", "float32"), strict=True)]
    with compile_for("tpu"):
        call = functools.partial(quantized_matmul, activation_bits=8, implementation="tpu")
        products = find_products(jax.make_jaxpr(call)(*operands))
    assert [product.invars[0].aval.shape[1] for product in products] == depths


@pytest.mark.parametrize("platform", sorted(INTERPRET))
def test_products_are_of_int8_in_every_program(platform):
    """Those that the chips' compilers are given (test_aot.py)."""
    cases = [
        case for case in TARGETS[platform].list_cases(["quantized_matmul"], quick=True) if "rounded" in case.kernel
    ]
    assert {case.kernel.split()[1].strip(",") for case in cases} >= {"int8", "int4"}
    for case in cases:
        with compile_for(platform):
            products = list(find_products(jax.make_jaxpr(case.function)(*case.operands)))
        assert products
        for product in products:
            assert [v.aval.dtype for v in (*product.invars, *product.outvars)] == [jnp.int8, jnp.int8, jnp.int32]


def test_groups_that_no_tpu_block_holds_are_refused():
    x, values = jnp.ones((1, 12000)), jnp.ones((12000, 2), jnp.int8)
    with interpret_tpu():
        for groups, message in (
            (2, "blocks of up to 4096 positions, not of 6000"),
            (3000, "up to 16 scale groups in 128 positions, not groups of 4"),
        ):
            with pytest.raises(NotImplementedError, match=message):
                quantized_matmul(x, values, jnp.ones((groups, 2)), activation_bits=8, implementation="tpu")


def test_empty_operands_are_refused(platform):
    for rows, columns in ((0, 2), (1, 0)):
        x, values, scale = jnp.ones((rows, 32)), jnp.ones((32, columns), jnp.int8), jnp.ones((1, columns))
        with INTERPRET[platform](), pytest.raises(NotImplementedError, match=rf"not x \({rows}, 32\)|empty"):
            quantized_matmul(x, values, scale, activation_bits=8, implementation=platform)


@pytest.mark.slow
def test_words_decode_whatever_their_codes(platform):
    """Every code in every place of a word, of each width and zero, by one position of the activations at a time."""
    for kind, options in KINDS.items():
        if kind == "int8":
            continue
        bits, centered = options["bits"], options.get("centered", False)
        count = count_elements(bits)
        codes = (np.arange(count)[:, None] + np.arange(2**bits)) % 2**bits
        levels = codes - oracles.find_zero(bits, centered)
        x = jnp.eye(count, dtype=jnp.float32) * 127
        out = multiply(platform, kind, x, jnp.asarray(oracles.pack(codes, bits)), jnp.ones((1, 2**bits)))
        np.testing.assert_array_equal(out, 127 * levels)
