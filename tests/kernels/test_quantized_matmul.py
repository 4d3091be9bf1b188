"""quantized_matmul: every backend against a float64 oracle over shapes, gradients, and refusals."""

import re
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import count_elements, dequantize_int8, dequantize_words, pack_words, quantized_matmul
from hsai_kernels.interpret import interpret_gpu, interpret_tpu
from hsai_kernels.ops.quantized_matmul.api import BACKENDS
from hsai_kernels.ops.quantized_matmul.shapes import HUGE, SHAPES, QuantizedShape
from tests.kernels import oracles
from tests.kernels.native_cases import EXTREMES
from tests.kernels.tolerances import assert_close

# Those of accelerators have tests of their own, in their interpreters.
IMPLEMENTATIONS = sorted(BACKENDS.keys() - {"gpu", "tpu"})
KINDS = {
    "int8": {},
    "int4": {"bits": 4},
    "int3": {"bits": 3},
    "int2": {"bits": 2},
    "centered int4": {"bits": 4, "centered": True},
    "centered int3": {"bits": 3, "centered": True},
    "centered int2": {"bits": 2, "centered": True},
}
"""How quantized_matmul is told what its values are."""

# Groups of codes fill whole words; others are left to the reference (test_unsupported_groups_fall_back).
CASES = [
    (kind, shape)
    for kind, options in KINDS.items()
    for shape in SHAPES
    if shape.group % count_elements(options.get("bits", 4)) == 0
]


def _draw(shape: QuantizedShape, kind: str, dtype: str, scale_dtype: str = "float32"):
    """x, values, scale, and in float64: x, the dense weight, and the largest weight a code can mean."""
    rng = np.random.default_rng(shape.contraction * 1000 + shape.columns)
    x = jnp.asarray(rng.standard_normal((*shape.lead, shape.contraction)), dtype)
    scale = jnp.asarray(oracles.draw_scale(rng, shape.contraction // shape.group, shape.columns), scale_dtype)
    if kind == "int8":
        levels = rng.integers(-128, 128, (shape.contraction, shape.columns))
        values = jnp.asarray(levels, jnp.int8)
        largest = np.full(levels.shape, 128)
    else:
        bits = KINDS[kind]["bits"]
        codes = rng.integers(0, 2**bits, (shape.contraction, shape.columns))
        values = jnp.asarray(oracles.pack(codes, bits))
        levels = codes - oracles.find_zero(bits, KINDS[kind].get("centered", False))
        # Codes may be summed before the code of zero is taken off, so that errors follow codes of up to 15.
        largest = np.full(codes.shape, 2**bits - 1)
    exact = np.asarray(scale, np.float64)
    return (
        (x, values, scale),
        np.asarray(x, np.float64),
        oracles.scale_rows(levels, exact),
        oracles.scale_rows(largest, np.abs(exact)),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "shape"), CASES, ids=str)
def test_products_match_the_oracle(shape, kind, dtype):
    operands, x, weight, largest = _draw(shape, kind, dtype)
    for implementation in IMPLEMENTATIONS:
        out = quantized_matmul(*operands, **KINDS[kind], implementation=implementation)
        assert out.dtype == dtype
        assert_close(out, x @ weight, np.abs(x) @ largest, dtype)


def _draw_one_sided(kind: str):
    """Of HUGE, levels and values: all of an odd column as far above zero as codes go, of an even one as far below."""
    bits = KINDS[kind].get("bits", 8)
    codes = np.broadcast_to(np.where(np.arange(HUGE.columns) % 2, 2**bits - 1, 0), (HUGE.contraction, HUGE.columns))
    levels = codes - oracles.find_zero(bits, KINDS[kind].get("centered", False))
    return levels, jnp.asarray(levels.astype(np.int8) if kind == "int8" else oracles.pack(codes, bits))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", ["int8", "int4", "centered int3", "centered int2"])
def test_a_huge_sum_on_one_side_is_exact(kind):
    """Every partial sum has at most 24 bits, so that in float32 no order of adding loses one, and nothing overflows."""
    levels, values = _draw_one_sided(kind)
    x = jnp.ones((1, HUGE.contraction), jnp.float32)
    scale = jnp.full((1, HUGE.columns), 2.0**-5)
    for implementation in IMPLEMENTATIONS:
        out = quantized_matmul(x, values, scale, **KINDS[kind], implementation=implementation)
        np.testing.assert_array_equal(out, [levels.sum(axis=0) * 2.0**-5])


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("kind", ["int8", "int4", "centered int3", "centered int2"])
def test_a_huge_product_of_extremes_matches_the_oracle(kind, activation_bits):
    """Largest codes of a column all on one side, times activations of the largest digits."""
    levels, values = _draw_one_sided(kind)
    rng = np.random.default_rng(2)
    x = rng.choice(EXTREMES, (1, HUGE.contraction))
    scale = rng.uniform(0.01, 0.1, (1, HUGE.columns)).astype(np.float32)
    exact = x.astype(np.float64)
    if activation_bits is not None:
        step = np.abs(x).max() / np.float32(127)
        exact = np.rint(x / step) * step.astype(np.float64)
    weight = oracles.scale_rows(levels, scale)
    for implementation in IMPLEMENTATIONS:
        out = quantized_matmul(
            x, values, scale, **KINDS[kind], activation_bits=activation_bits, implementation=implementation
        )
        assert_close(out, exact @ weight, np.abs(exact) @ np.abs(weight), "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_scales(kind):
    operands, x, weight, largest = _draw(SHAPES[4], kind, "float32", "bfloat16")
    for implementation in IMPLEMENTATIONS:
        out = quantized_matmul(*operands, **KINDS[kind], implementation=implementation)
        assert_close(out, x @ weight, np.abs(x) @ largest, "float32")


def _draw_minima(shape: QuantizedShape, dtype: str, scale_dtype: str):
    """(x, words, scale, minimum), and in float64: x, the dense weight, the largest that code and minimum can mean."""
    (x, words, scale), exact, weight, largest = _draw(shape, "int4", dtype, scale_dtype)
    minimum = np.random.default_rng(shape.columns).uniform(-0.8, 0.2, scale.shape)
    minimum = jnp.asarray(minimum, scale_dtype)
    levels = oracles.scale_rows(np.ones(weight.shape), np.asarray(minimum, np.float64))
    eights = oracles.scale_rows(np.full(weight.shape, 8), np.asarray(scale, np.float64))
    return (x, words, scale, minimum), exact, weight + eights + levels, largest + np.abs(levels)


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_codes_from_a_minimum_match_the_oracle(number):
    dtype = ("float32", "bfloat16")[number % 2]
    operands, x, weight, largest = _draw_minima(SHAPES[number], dtype, ("float16", "float32", "bfloat16")[number % 3])
    for implementation in IMPLEMENTATIONS:
        out = quantized_matmul(*operands, implementation=implementation)
        assert out.dtype == dtype
        assert_close(out, x @ weight, np.abs(x) @ largest, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_gradient_of_a_minimum_is_that_of_its_group(implementation):
    (x, words, scale, minimum), exact, weight, largest = _draw_minima(SHAPES[4], "float32", "float32")
    cotangent = np.random.default_rng(1).standard_normal((3, 257)).astype(np.float32)
    multiply = partial(quantized_matmul, implementation=implementation)
    to_x, _, _, to_minimum = jax.jit(jax.vjp(multiply, x, words, scale, minimum)[1])(cotangent)
    assert_close(to_x, cotangent @ weight.T, np.abs(cotangent) @ largest.T, "float32")
    groups, wide = (scale.shape[0], -1, scale.shape[1]), cotangent.astype(np.float64)
    expected, magnitude = (
        (a.T @ b).reshape(groups).sum(axis=1) for a, b in ((exact, wide), (np.abs(exact), np.abs(wide)))
    )
    assert_close(to_minimum, expected, magnitude, "float32")


def test_float16_scales_without_a_full_mantissa():
    """The smallest ones, which bfloat16 and float32 have as plain numbers, and the largest."""
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    scale = np.array([[2.0**-24, 3 * 2.0**-24, 2.0**-14, 65504.0, 0.0]] * 2, np.float16)
    codes = np.random.default_rng(1).integers(0, 16, (64, 5))
    words = oracles.pack(codes, 4)
    exact = x.astype(np.float64)
    weight = oracles.scale_rows(codes - 1, scale)
    largest = oracles.scale_rows(np.full(codes.shape, 16), scale)
    for implementation in IMPLEMENTATIONS:
        out = quantized_matmul(x, words, scale, -scale, implementation=implementation)
        assert_close(out, exact @ weight, np.abs(exact) @ largest, "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_dequantizing_is_exact(kind):
    (_, values, scale), _, weight, _ = _draw(SHAPES[2], kind, "float32", "bfloat16")
    dequantize = dequantize_int8 if kind == "int8" else partial(dequantize_words, **KINDS[kind])
    np.testing.assert_array_equal(dequantize(values, scale), weight.astype(np.float32))
    stacked = jax.vmap(dequantize)(jnp.stack([values, values]), jnp.stack([scale, scale]))
    np.testing.assert_array_equal(dequantize(jnp.stack([values, values]), jnp.stack([scale, scale])), stacked)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["int8", "int4", "centered int3"])
def test_gradients_match_the_oracle(kind, implementation, dtype):
    (x, values, scale), _, weight, largest = _draw(SHAPES[4], kind, dtype)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((3, 257)), dtype)
    multiply = partial(quantized_matmul, **KINDS[kind], implementation=implementation)
    pull = jax.vjp(multiply, x, values, scale)[1]
    to_x, to_values, to_scale = jax.jit(pull)(cotangent)
    exact = np.asarray(cotangent, np.float64)
    assert to_x.dtype == dtype
    assert_close(to_x, exact @ weight.T, np.abs(exact) @ largest.T, dtype)
    assert to_values.dtype == jax.dtypes.float0
    # A scale multiplies the codes of its group: its gradient is that of the weight, summed with them.
    rows, by_group = np.asarray(x, np.float64).T, (scale.shape[0], -1, scale.shape[1])
    steps = oracles.scale_rows(np.ones_like(weight), np.asarray(scale, np.float64))
    expected = ((rows @ exact) * weight / steps).reshape(by_group).sum(axis=1)
    magnitude = (np.abs(rows) @ np.abs(exact) * largest / np.abs(steps)).reshape(by_group).sum(axis=1)
    assert_close(to_scale, expected, magnitude, dtype)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_scan_jit_and_vmap_give_the_same_bits(kind):
    (x, values, scale), *_ = _draw(SHAPES[4], kind, "float32")
    expected = np.asarray(quantized_matmul(x, values, scale, implementation="cpu"))

    def step(carry, layer):
        return carry, quantized_matmul(x, *layer, implementation="cpu")

    layers = (jnp.stack([values, values]), jnp.stack([scale, scale]))
    for out in jax.jit(lambda layers: jax.lax.scan(step, 0, layers)[1])(layers):
        np.testing.assert_array_equal(out, expected)
    mapped = jax.vmap(lambda x: quantized_matmul(x, values, scale, implementation="cpu"))(jnp.stack([x, -x]))
    np.testing.assert_array_equal(mapped, [expected, -expected])


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", [*KINDS, "int4 from a minimum"])
def test_a_scale_that_is_no_number_spoils_its_column_only(kind):
    """As api.py says of what it does not ask; other columns have the very bits that they have without it."""
    if kind == "int4 from a minimum":
        (x, values, *scales), *_ = _draw_minima(SHAPES[4], "float32", "float32")
    else:
        (x, values, *scales), *_ = _draw(SHAPES[4], kind, "float32")
    for implementation in IMPLEMENTATIONS:
        multiply = partial(quantized_matmul, x, values, **KINDS.get(kind, {}), implementation=implementation)
        right = np.array(multiply(*scales))
        for i in range(len(scales)):
            found = np.array(multiply(*scales[:i], scales[i].at[0, 5].set(jnp.nan), *scales[i + 1 :]))
            assert np.all(np.isnan(found[:, 5]))
            np.testing.assert_array_equal(np.delete(found, 5, axis=1), np.delete(right, 5, axis=1))


def _words(rows, columns):
    return pack_words(np.zeros((rows, columns), np.uint8), 4)


@pytest.mark.parametrize(
    ("x", "values", "scale", "message"),
    [
        (jnp.ones((1, 32)), jnp.ones((64, 3), jnp.int8), jnp.ones((1, 3)), "over 32, the weight over 64"),
        (jnp.ones((1, 32)), _words(64, 3), jnp.ones((1, 3)), "over 32, the weight over 64"),
        (jnp.ones((1, 64)), _words(64, 3), jnp.ones((3, 3)), "over 64 does not divide into 3 groups"),
        (jnp.ones((1, 64)), _words(64, 3), jnp.ones((0, 3)), "over 64 does not divide into 0 groups"),
        (jnp.ones((1, 64)), _words(64, 3), jnp.ones((1, 4)), "scale has 4 columns, values have 3"),
        (jnp.ones((1, 64)), _words(64, 3), jnp.ones((3,)), r"must be \(groups of 64 positions, 3\), got \(3,\)"),
        (jnp.ones((1, 64)), _words(64, 3), jnp.ones(()), r"must be \(groups of 64 positions, 3\), got \(\)"),
        (jnp.ones((1, 64)), _words(64, 3)[0], jnp.ones((1, 3)), r"values \(rows, F\), got \(3,\)"),
        (jnp.ones((1, 64)), _words(64, 3), jnp.ones((1, 3), jnp.int32), "not int32"),
        (jnp.ones((1, 64)), jnp.ones((64, 3), jnp.int32), jnp.ones((1, 3)), "not of int32"),
        (jnp.ones((1, 64), jnp.float16), _words(64, 3), jnp.ones((1, 3)), "not of float16"),
        (jnp.ones((), jnp.float32), _words(64, 3), jnp.ones((1, 3)), "got a scalar"),
    ],
)
def test_refusals_name_both_values(x, values, scale, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(quantized_matmul, x, values, scale)


def test_dynamic_int8_from_a_minimum():
    operands, exact, weight, largest = _draw_minima(SHAPES[4], "float32", "float16")
    split = exact.reshape(3, operands[2].shape[0], -1)
    step = np.abs(split).max(axis=-1, keepdims=True) / 127
    rounded = (np.round(split / step) * step).reshape(exact.shape)
    for implementation in IMPLEMENTATIONS:
        out = quantized_matmul(*operands, activation_bits=8, implementation=implementation)
        assert_close(out, rounded @ weight, np.abs(exact) @ largest, "float32")
        assert np.max(np.abs(np.asarray(out, np.float64) - exact @ weight)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dynamic_int8(kind, dtype):
    """Against float64 arithmetic on the activations that `round_activations` says; the gradient ignores rounding."""
    (x, values, scale), exact, weight, largest = _draw(SHAPES[4], kind, dtype)
    groups = scale.shape[0]
    split = exact.reshape(3, groups, -1)
    step = np.abs(split).max(axis=-1, keepdims=True) / 127
    rounded = (np.round(split / step) * step).reshape(exact.shape)
    for implementation in IMPLEMENTATIONS:
        multiply = partial(quantized_matmul, **KINDS[kind], activation_bits=8, implementation=implementation)
        out = multiply(x, values, scale)
        assert_close(out, rounded @ weight, np.abs(exact) @ largest, dtype)
        assert np.max(np.abs(np.asarray(out, np.float64) - exact @ weight)) > 1e-3  # it does round
        ones = jnp.ones(out.shape, dtype)
        grad = jax.vjp(lambda x, multiply=multiply: multiply(x, values, scale), x)[1](ones)[0]
        plain = partial(quantized_matmul, values=values, scale=scale, **KINDS[kind], implementation="reference")
        plain = jax.vjp(plain, x)[1](ones)[0]
        np.testing.assert_array_equal(grad, plain)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_activation_that_is_no_number_spoils_its_row_only(kind, value):
    """Rounded, of rows long enough for XLA's other way to take a maximum, which knows no NaN."""
    shape = QuantizedShape(lead=(9,), contraction=576, columns=5, group=576)
    (x, values, scale), *_ = _draw(shape, kind, "float32")
    for implementation in IMPLEMENTATIONS:
        multiply = partial(quantized_matmul, **KINDS[kind], activation_bits=8, implementation=implementation)
        right, found = np.array(multiply(x, values, scale)), np.array(multiply(x.at[8, 4].set(value), values, scale))
        assert np.all(np.isnan(found[8]))
        np.testing.assert_array_equal(found[:8], right[:8])


@pytest.mark.parametrize(
    ("values", "minimum", "options", "message"),
    [
        (jnp.ones((64, 3), jnp.int8), jnp.ones((1, 3)), {}, "minimum is for words of 4-bit codes .* not for int8"),
        (_words(64, 3), jnp.ones((1, 3)), {"centered": True}, "not for uint32, bits=4, centered=True"),
        (_words(64, 3), jnp.ones((2, 3)), {}, r"minimum is float32\(2, 3\), scale float32\(1, 3\): they must be alike"),
        (_words(64, 3), jnp.ones((1, 3), jnp.float16), {}, r"minimum is float16\(1, 3\), scale float32\(1, 3\)"),
    ],
)
def test_minima_that_fit_nothing_are_refused(values, minimum, options, message):
    with pytest.raises(ValueError, match=message):
        quantized_matmul(jnp.ones((1, 64)), values, jnp.ones((1, 3)), minimum, **options)


def test_bits_that_no_kernel_has_are_refused():
    x, words, scale = jnp.ones((1, 64)), _words(64, 3), jnp.ones((1, 3))
    with pytest.raises(ValueError, match="codes of 2, 3 or 4 bits, not of 5"):
        quantized_matmul(x, words, scale, bits=5)
    with pytest.raises(ValueError, match="words of 3 bits come by threes, and values have 8 rows"):
        quantized_matmul(x, words, scale, bits=3)
    with pytest.raises(ValueError, match="activation_bits=4 is not supported: valid are 8 and None"):
        quantized_matmul(x, words, scale, activation_bits=4)
    with pytest.raises(ValueError, match="centered=True is for words of codes, and values are int8"):
        quantized_matmul(x, jnp.ones((64, 3), jnp.int8), scale, centered=True)


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0, True, "4", np.int64(4)])
def test_bits_that_only_equal_an_int_are_refused(bits):
    x, words, scale = jnp.ones((1, 96)), _words(96, 3), jnp.ones((1, 3))
    with pytest.raises(ValueError, match=f"codes of 2, 3 or 4 bits, not of {re.escape(repr(bits))}"):
        quantized_matmul(x, words, scale, bits=bits)


@pytest.mark.parametrize("bits", [8.0, True, "8"])
def test_activation_bits_that_only_equal_an_int_are_refused(bits):
    with pytest.raises(ValueError, match=f"activation_bits={bits!r} is not supported: valid are 8 and None"):
        quantized_matmul(jnp.ones((1, 64)), _words(64, 3), jnp.ones((1, 3)), activation_bits=bits)


INTERPRET = {"gpu": interpret_gpu, "tpu": interpret_tpu}


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("implementation", sorted(BACKENDS))
def test_int8_values_have_no_choice_of_bits(implementation, activation_bits):
    (x, values, scale), *_ = _draw(QuantizedShape(lead=(2,), contraction=128, columns=16, group=64), "int8", "float32")

    def multiply(**options):
        with INTERPRET.get(implementation, nullcontext)():
            call = partial(quantized_matmul, activation_bits=activation_bits, **options)
            return np.asarray(jax.jit(call)(x, values, scale))

    expected = multiply(implementation=implementation)
    for bits in (8, 4, 3, 2):
        np.testing.assert_array_equal(multiply(bits=bits, implementation=implementation), expected)


@pytest.mark.parametrize("platform", INTERPRET)
def test_the_automatic_choice_keeps_its_kernel_for_int8_values_of_8_bits(platform):
    (x, values, scale), *_ = _draw(QuantizedShape(lead=(2,), contraction=128, columns=16, group=64), "int8", "float32")
    with INTERPRET[platform]():
        assert "pallas_call" in str(jax.make_jaxpr(partial(quantized_matmul, bits=8))(x, values, scale))


def test_unsupported_groups_fall_back():
    x, words = jnp.ones((1, 32)), pack_words(np.full((32, 5), 9, np.uint8), 4)
    scale = jnp.full((8, 5), 0.5)  # groups of 4 positions split a word
    with pytest.raises(NotImplementedError, match="multiples of 8"):
        quantized_matmul(x, words, scale, implementation="cpu")
    np.testing.assert_array_equal(quantized_matmul(x, words, scale), np.full((1, 5), 16.0))
    threes, scale = pack_words(np.full((32, 5), 5, np.uint8), 3), jnp.full((2, 5), 0.5)
    with pytest.raises(NotImplementedError, match="multiples of 32 codes of 3 bits"):
        quantized_matmul(x, threes, scale, bits=3, implementation="cpu")
    np.testing.assert_array_equal(quantized_matmul(x, threes, scale, bits=3), np.full((1, 5), 16.0))
