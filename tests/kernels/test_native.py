"""The native library: every instruction set, the same bits every time, and wrong calls that end in an error status."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hsai_kernels import native, pack_words, quantized_matmul, sparse_matmul
from tests.kernels import native_build, oracles
from tests.kernels.tolerances import assert_close


def test_instruction_sets_that_this_machine_lacks_are_refused():
    known = native_build.INSTRUCTION_SETS.get(native_build.PROCESSOR, ("baseline",))
    runnable = native_build.list_runnable()
    assert "baseline" in runnable and native.name_instruction_set() == runnable[-1]
    for name in {*known, "sse9"} - set(runnable):
        with pytest.raises(ValueError, match=name):
            native.use_instruction_set(name)


def _draw(rows, contraction, columns):
    """float64 x, codes -8..7, positions of 2:4, scales of groups of 32."""
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((rows, contraction)).astype(np.float32)
    codes = rng.integers(-8, 8, (contraction, columns))
    positions = oracles.draw_positions(rng, contraction, columns, 2)
    scale = rng.uniform(0.01, 0.1, (contraction // 32, columns)).astype(np.float32)
    return x, codes, positions, scale


@pytest.mark.parametrize("columns", [1, 3, 4, 7, 8, 15, 16, 17, 64, 100, 257, 4133])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 13])
def test_every_instruction_set_matches_the_oracle(instruction_set, rows, columns):
    x, codes, positions, scale = _draw(rows, 64, columns)
    exact = x.astype(np.float64)
    dense = oracles.scale_rows(codes, scale)
    largest = np.abs(exact) @ oracles.scale_rows(np.full(codes.shape, 15), scale)
    words = oracles.pack(codes + 8, 4)
    out = quantized_matmul(x, words, scale, implementation="cpu")
    assert_close(out, exact @ dense, largest, "float32")
    pairs = oracles.pack((codes & 3), 2)
    for centered, zero in ((False, 2), (True, 1.5)):
        out = quantized_matmul(x, pairs, scale, bits=2, centered=centered, implementation="cpu")
        assert_close(out, exact @ oracles.scale_rows((codes & 3) - zero, scale), largest, "float32")
    threes = oracles.pack(codes & 7, 3)
    for centered, zero in ((False, 4), (True, 3.5)):
        out = quantized_matmul(x, threes, scale, bits=3, centered=centered, implementation="cpu")
        assert_close(out, exact @ oracles.scale_rows((codes & 7) - zero, scale), largest, "float32")
    kept = codes[:32]
    indices = oracles.pack(positions, 2)
    large = np.where(codes % 2, 16 * codes + 15, 16 * codes)
    out = quantized_matmul(x, large.astype(np.int8), scale, implementation="cpu")
    assert_close(out, exact @ oracles.scale_rows(large, scale), 17 * largest, "float32")
    sparse = oracles.densify(oracles.scale_rows(kept, scale), positions, 2)
    out = sparse_matmul(x, oracles.pack(kept + 8, 4), indices, scale, n=2, m=4, implementation="cpu")
    assert_close(out, exact @ sparse, np.abs(exact) @ np.abs(sparse), "float32")
    sparse = oracles.densify(oracles.scale_rows(large[:32], scale), positions, 2)
    out = sparse_matmul(x, large[:32].astype(np.int8), indices, scale, n=2, m=4, implementation="cpu")
    assert_close(out, exact @ sparse, np.abs(exact) @ np.abs(sparse), "float32")
    if rows > native.MAX_ROWS:
        return
    plain = oracles.densify(kept, positions, 2)
    for dtype in (jnp.float32, jnp.bfloat16):
        out = sparse_matmul(x, jnp.asarray(kept, dtype), indices, n=2, m=4, implementation="cpu")
        assert_close(out, exact @ plain, np.abs(exact) @ np.abs(plain), "float32")


@pytest.mark.parametrize("columns", [1, 3, 8, 17, 100, 4133])
@pytest.mark.parametrize(("rows", "kept"), [(1, 4), (2, 2), (3, 1), (13, 4)])
def test_eighths_of_every_instruction_set_match_the_oracle(instruction_set, rows, kept, columns):
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((rows, 256)).astype(np.float32)
    positions = oracles.draw_positions(rng, 256, columns, kept, 8)
    indices, exact = oracles.pack(positions, 3), x.astype(np.float64)
    scale = rng.uniform(0.01, 0.1, (4, columns)).astype(np.float32)
    for zero in (8, 128):
        codes = rng.integers(-zero, zero, positions.shape)
        values = oracles.pack(codes + 8, 4) if zero == 8 else codes.astype(np.int8)
        weight = oracles.densify(oracles.scale_rows(codes, scale), positions, kept, 8)
        out = sparse_matmul(x, values, indices, scale, n=kept, m=8, implementation="cpu")
        assert_close(out, exact @ weight, np.abs(exact) @ np.abs(weight), "float32")


def test_results_are_the_same_bits_every_time():
    """Also while several calls share the thread pool: how columns fall to threads must not matter."""
    x, codes, positions, scale = _draw(4, 512, 2085)
    words, indices = oracles.pack(codes + 8, 4), oracles.pack(positions, 2)

    def multiply(x):
        quantized = quantized_matmul(x, words, scale, implementation="cpu")
        return quantized, sparse_matmul(x, words[:32], indices, scale, n=2, m=4, implementation="cpu")

    first = jax.tree.map(np.asarray, jax.jit(multiply)(x))
    devices = jax.devices()
    running = [jax.jit(multiply)(jax.device_put(x, devices[i % len(devices)])) for i in range(40)]
    for out in running:
        jax.tree.map(np.testing.assert_array_equal, out, first)


def test_rows_do_not_influence_each_other():
    x, codes, _, scale = _draw(4, 64, 100)
    words = oracles.pack(codes + 8, 4)
    together = quantized_matmul(x, words, scale, implementation="cpu")
    x[1:] = np.nan
    spoilt = quantized_matmul(x, words, scale, implementation="cpu")
    np.testing.assert_array_equal(spoilt[0], together[0])
    assert np.all(np.isnan(spoilt[1:]))


def _draw_magnitudes(name):
    """Activations (1, 64) that are hard to hold in integers."""
    x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    match name:
        case "tiny":
            return x * np.float32(1e-30)
        case "huge":
            return x * np.float32(1e36)
        case "spike":
            x[0, 17] = 1e6
            return x
        case "zero":
            return x * 0
        case "one":  # the largest of its block is as near to the next power of two as a float comes
            return np.full_like(x, np.nextafter(np.float32(1), np.float32(0)))
        case "below":  # numbers without a full mantissa
            return x * np.float32(1e-39)


@pytest.mark.parametrize("name", ["tiny", "huge", "spike", "zero", "one", "below"])
def test_magnitudes(instruction_set, name):
    x = _draw_magnitudes(name)
    _, codes, positions, scale = _draw(1, 64, 33)
    exact = x.astype(np.float64)
    out = quantized_matmul(x, oracles.pack(codes + 8, 4), scale, implementation="cpu")
    # Below 2^-126 there are fewer digits: what a block's step of at most 2^-126 rounds off.
    floor = 64 * 15 * 0.1 * 2.0**-127 / 2.0**-20
    magnitude = np.abs(exact) @ oracles.scale_rows(np.full(codes.shape, 15), scale) + floor
    assert_close(out, exact @ oracles.scale_rows(codes, scale), magnitude, "float32")
    out = quantized_matmul(x, codes.astype(np.int8), scale, implementation="cpu")
    assert_close(out, exact @ oracles.scale_rows(codes, scale), magnitude, "float32")
    kept = codes[:32]
    sparse = oracles.scale_rows(oracles.densify(kept, positions, 2), scale)
    args = (oracles.pack(kept + 8, 4), oracles.pack(positions, 2), scale)
    out = sparse_matmul(x, *args, n=2, m=4, implementation="cpu")
    assert_close(out, exact @ sparse, magnitude, "float32")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_row_that_holds_no_number_gives_none(instruction_set, value):
    x, codes, positions, scale = _draw(2, 64, 33)
    x[1, 40] = value
    words = oracles.pack(codes + 8, 4)
    for values in (words, codes.astype(np.int8)):
        out = quantized_matmul(x, values, scale, implementation="cpu")
        assert np.all(np.isfinite(out[0])) and np.all(np.isnan(out[1]))
    out = sparse_matmul(x, words[:4], oracles.pack(positions, 2), scale, n=2, m=4, implementation="cpu")
    assert np.all(np.isfinite(out[0])) and np.all(np.isnan(out[1]))


@pytest.mark.parametrize("rows", [1, 2, 11])
def test_dynamic_int8_is_the_references(instruction_set, rows):
    """Both round the same way, and their integers are exact: only the sum over groups may differ."""
    x, codes, positions, scale = _draw(rows, 128, 100)
    magnitude = np.abs(x).astype(np.float64) @ oracles.scale_rows(np.full(codes.shape, 15), scale)
    for values, unit in (((16 * codes).astype(np.int8), 16), (oracles.pack(codes + 8, 4), 1)):
        operands = (x, values, scale)
        expected = quantized_matmul(*operands, activation_bits=8, implementation="reference")
        out = quantized_matmul(*operands, activation_bits=8, implementation="cpu")
        assert_close(out, np.asarray(expected, np.float64), unit * magnitude, "float32")
    operands = (x, operands[1][:8], oracles.pack(positions, 2), scale)
    expected = sparse_matmul(*operands, n=2, m=4, activation_bits=8, implementation="reference")
    out = sparse_matmul(*operands, n=2, m=4, activation_bits=8, implementation="cpu")
    assert_close(out, np.asarray(expected, np.float64), magnitude, "float32")


def _call(target, operands, shape, dtype=jnp.float32, **attributes):
    native.load_library()
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, dtype))
    return jax.block_until_ready(call(*operands, **attributes))


X = np.ones((2, 64), np.float32)
WORDS = np.asarray(pack_words(np.zeros((64, 5), np.uint8), 4))
BYTES = np.zeros((64, 5), np.int8)
SCALE = np.ones((2, 5), np.float32)
NO_CHOICES, CHOICES = np.zeros((0, 5), np.uint32), np.full((2, 2), 0x0F0F0F0F, np.uint32)
NO_SCALE = np.ones((0, 5), np.float32)
KEPT = np.ones((32, 5), np.float32)
INDICES = np.zeros((2, 5), np.uint32)
HALF_WORDS = np.zeros((4, 5), np.uint32)


@pytest.mark.parametrize(
    ("operands", "shape", "dtype"),
    [
        ((X[0], WORDS, SCALE), (2, 5), jnp.float32),  # not a matrix
        ((X, WORDS, SCALE), (10,), jnp.float32),
        ((X, WORDS, SCALE), (2, 6), jnp.float32),  # a result of other columns
        ((X, WORDS, SCALE), (3, 5), jnp.float32),  # a result of other rows
        ((X, WORDS, SCALE), (2, 5), jnp.bfloat16),  # a result of another type
        ((X, WORDS[:-1], SCALE), (2, 5), jnp.float32),  # another contraction
        ((X, BYTES[:-1], SCALE), (2, 5), jnp.float32),
        ((X, WORDS, SCALE[:, :4]), (2, 5), jnp.float32),  # scales of other columns
        ((X, WORDS, np.ones((3, 5), np.float32)), (2, 5), jnp.float32),  # groups that do not divide
        ((X, WORDS, np.ones((16, 5), np.float32)), (2, 5), jnp.float32),  # groups of half a word
        ((X, WORDS, NO_SCALE), (2, 5), jnp.float32),
        ((X, WORDS, SCALE.astype(np.float16)), (2, 5), jnp.float32),
        ((X, WORDS.astype(np.int32), SCALE), (2, 5), jnp.float32),
        ((X.astype(np.float16), WORDS, SCALE), (2, 5), jnp.float16),
        ((np.ones((2, 0), np.float32), WORDS[:0], SCALE), (2, 5), jnp.float32),  # nothing to contract
    ],
)
def test_wrong_quantized_calls_give_an_error(operands, shape, dtype):
    bits = 8 if operands[1].dtype == np.int8 else 4
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT.*hsai_kernels"):
        _call(
            native.QUANTIZED_MATMUL,
            operands,
            shape,
            dtype,
            bits=np.int64(bits),
            centered=False,
            activation_bits=np.int64(0),
        )


@pytest.mark.parametrize(
    ("values", "bits", "activation_bits", "centered"),
    [
        *((WORDS, bits, 0, False) for bits in (8, 3, 2, 5, 0, -4)),
        (BYTES, 4, 0, False),
        (BYTES, 8, 7, False),
        (BYTES, 8, 0, True),
        (WORDS, 4, 7, False),
        (WORDS, 4, -8, False),
    ],
)
def test_wrong_bits_give_an_error(values, bits, activation_bits, centered):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT.*hsai_kernels"):
        attributes = {"bits": np.int64(bits), "centered": centered, "activation_bits": np.int64(activation_bits)}
        _call(native.QUANTIZED_MATMUL, (X, values, SCALE), (2, 5), **attributes)


@pytest.mark.parametrize(
    ("operands", "n"),
    [
        ((X[0], KEPT, INDICES, NO_SCALE), 2),
        ((X, KEPT, INDICES, NO_SCALE), 1),  # n that does not fit the shapes
        ((X, KEPT, INDICES, NO_SCALE), 0),
        ((X, KEPT, INDICES, NO_SCALE), 4),
        ((X[:, :62], KEPT, INDICES, NO_SCALE), 2),
        ((np.ones((9, 64), np.float32), KEPT, INDICES, NO_SCALE), 2),  # too many rows of floats
        ((X, KEPT[:24], INDICES, NO_SCALE), 2),
        ((X, KEPT, INDICES[:1], NO_SCALE), 2),
        ((X, KEPT, INDICES[:, :4], NO_SCALE), 2),
        ((X, KEPT, INDICES.astype(np.int32), NO_SCALE), 2),
        ((X, KEPT, INDICES, SCALE), 2),  # scales of floating values
        ((X, KEPT.astype(np.int16), INDICES, NO_SCALE), 2),
        ((X, KEPT.astype(np.int8), INDICES, NO_SCALE), 2),  # no scales of int8 values
        ((X, KEPT.astype(np.int8), INDICES, np.ones((8, 5), np.float32)), 2),  # groups of 4 kept
        ((X, HALF_WORDS, INDICES, NO_SCALE), 2),  # no scales of int4 values
        ((X, HALF_WORDS, INDICES, np.ones((8, 5), np.float32)), 2),  # groups of half a word
        ((X, HALF_WORDS, INDICES, SCALE[:, :4]), 2),
        ((X, np.zeros((6, 5), np.uint32), np.zeros((3, 5), np.uint32), np.ones((6, 5), np.float32)), 3),  # of 8 kept
    ],
)
def test_wrong_sparse_calls_give_an_error(operands, n):
    attributes = {"n": np.int64(n), "m": np.int64(4), "activation_bits": np.int64(0)}
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT.*hsai_kernels"):
        _call(native.SPARSE_MATMUL, (*operands, NO_CHOICES), (len(operands[0]), 5), **attributes)


@pytest.mark.parametrize(
    ("changes", "n"),
    [
        ({}, 2),
        ({}, 3),
        ({}, 5),
        ({}, 8),
        ({}, 0),
        ({"indices": np.zeros((2, 5), np.uint32)}, 4),  # of 2 bits
        ({"indices": np.zeros((3, 4), np.uint32)}, 4),
        (
            {"words": np.zeros((2, 5), np.uint32), "indices": np.zeros((1, 5), np.uint32)},
            2,
        ),  # of half a unit
        ({"words": np.zeros((32, 5), np.float32), "scale": NO_SCALE}, 4),
    ],
)
def test_wrong_calls_of_eighths_give_an_error(changes, n):
    right = {"x": X, "words": np.zeros((4, 5), np.uint32), "indices": np.zeros((3, 5), np.uint32), "scale": SCALE}
    attributes = {"m": np.int64(8), "activation_bits": np.int64(0)}
    _call(native.SPARSE_MATMUL, (*right.values(), NO_CHOICES), (2, 5), n=np.int64(4), **attributes)
    operands = (*(right | changes).values(), NO_CHOICES)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT.*hsai_kernels"):
        _call(native.SPARSE_MATMUL, operands, (2, 5), n=np.int64(n), **attributes)


@pytest.mark.parametrize(
    ("choices", "m"),
    [
        (NO_CHOICES, 8),
        (CHOICES, 4),
        (CHOICES, 12),
        (CHOICES, 0),
        (CHOICES, -8),
        (CHOICES[:1], 8),
        (CHOICES.astype(np.int32), 8),
        (np.zeros((2, 0), np.uint32), 8),
        (np.zeros((2, 3), np.uint32), 8),  # blocks that do not divide 32 columns
        (np.zeros((2, 4), np.uint32), 8),  # blocks of 8 columns
    ],
)
def test_wrong_choices_give_an_error(choices, m):
    x, words, indices = np.zeros((2, 64), np.float32), np.zeros((2, 32), np.uint32), np.zeros((1, 32), np.uint32)
    operands, scale = (x, words, indices), np.ones((1, 32), np.float32)
    attributes = {"n": np.int64(2), "activation_bits": np.int64(0)}
    _call(native.SPARSE_MATMUL, (*operands, scale, CHOICES), (2, 32), m=np.int64(8), **attributes)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT.*hsai_kernels"):
        _call(native.SPARSE_MATMUL, (*operands, scale, choices), (2, 32), m=np.int64(m), **attributes)


Q = np.ones((2, 3, 4, 8), np.float32)
K = np.ones((2, 5, 2, 8), np.float32)
CODES = K.astype(np.int8)
AT_Q = np.zeros((2, 3), np.int32)
AT_K = np.zeros((2, 5), np.int32)
K_SCALE = np.ones((2, 5, 2), np.float32)
NO_MARK = np.zeros(0, np.int32)
NO_K_SCALE = np.zeros(0, np.float32)
ATTENTION = {"q": Q, "k": K, "v": K, "at_q": AT_Q, "at_k": AT_K, "in_q": NO_MARK, "in_k": NO_MARK} | {
    "k_scale": NO_K_SCALE,
    "v_scale": NO_K_SCALE,
}
INT8 = {"k": CODES, "v": CODES, "k_scale": K_SCALE, "v_scale": K_SCALE}
HALVES = np.full((2, 5, 2, 4), 0x11, np.uint8)
HALF_SCALE = np.ones((2, 5, 2, 2), ml_dtypes.bfloat16)
INT4 = {"k": HALVES, "v": HALVES, "k_scale": HALF_SCALE, "v_scale": HALF_SCALE}


def _attend(changes, shape=(2, 3, 4, 8), dtype=jnp.float32, window=0, softcap=0.0):
    operands = (ATTENTION | changes).values()
    options = {"window": np.int64(window), "softcap": np.float32(softcap), "scale": np.float32(1)}
    return _call(native.ATTENTION, operands, shape, dtype, **options)


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        ({"q": Q[0]}, {}),
        ({"q": Q.astype(np.float16)}, {"dtype": jnp.float16}),
        ({}, {"shape": (2, 3, 4, 9)}),
        ({}, {"shape": (2, 3, 4)}),
        ({}, {"dtype": jnp.bfloat16}),
        ({"k": K[:1]}, {}),  # another batch
        ({"k": K[..., :4], "v": K[..., :4]}, {}),  # another head dim
        ({"k": K[0]}, {}),
        ({"v": K[:, :4]}, {}),  # fewer values than keys
        ({"v": CODES}, {}),
        ({"k": K.astype(np.float16), "v": K.astype(np.float16)}, {}),
        ({"k": K[:, :, :0], "v": K[:, :, :0]}, {}),  # no kv heads
        ({"q": Q[:, :, :3]}, {"shape": (2, 3, 3, 8)}),  # 3 heads of 2 kv heads
        ({"at_q": AT_K}, {}),
        ({"at_k": AT_Q}, {}),
        ({"at_q": AT_Q.astype(np.float32)}, {}),
        ({"at_k": NO_MARK}, {}),
        ({"in_q": AT_Q}, {}),  # segments of one side
        ({"in_k": AT_K}, {}),
        ({"in_q": AT_Q, "in_k": AT_Q}, {}),
        ({"k": CODES, "v": CODES}, {}),  # codes without scales
        (INT8 | {"v_scale": NO_K_SCALE}, {}),
        (INT8 | {"k_scale": K_SCALE[..., :1]}, {}),
        (INT8 | {"k_scale": K_SCALE.astype(np.int32)}, {}),
        ({"k_scale": K_SCALE, "v_scale": K_SCALE}, {}),  # scales of floats
        ({"k": HALVES, "v": HALVES}, {}),
        (INT4 | {"k": CODES.astype(np.uint8)}, {}),  # twice the head
        (INT4 | {"k": CODES}, {}),
        (INT4 | {"k_scale": K_SCALE, "v_scale": K_SCALE}, {}),
        (INT4 | {"v_scale": HALF_SCALE[..., :1]}, {}),
        (INT4 | {"k_scale": HALF_SCALE.astype(np.float32)}, {}),
        ({"k": K[:, :0], "v": K[:, :0], "at_k": AT_K[:, :0]}, {}),  # nothing to see
        ({}, {"window": -1}),
        ({}, {"window": 2**31}),
        ({}, {"softcap": -1.0}),
        ({}, {"softcap": np.nan}),
    ],
)
def test_wrong_attention_calls_give_an_error(changes, result):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT.*hsai_kernels"):
        _attend(changes, **result)


def test_right_attention_calls_give_none():
    assert np.all(np.asarray(_attend({})) == 1)
    assert np.all(np.asarray(_attend(INT4)) == 1)
    assert np.all(np.asarray(_attend(INT8 | {"in_q": AT_Q, "in_k": AT_K}, window=1, softcap=1.0)) == 1)


@pytest.mark.parametrize(
    ("target", "operands", "shape", "attributes"),
    [
        (
            native.QUANTIZED_MATMUL,
            (X, WORDS, SCALE),
            (2, 5),
            {"bits": np.int64(4), "centered": False, "activation_bits": np.int64(0)},
        ),
        (
            native.SPARSE_MATMUL,
            (X, KEPT, INDICES, NO_SCALE, NO_CHOICES),
            (2, 5),
            {"n": np.int64(2), "m": np.int64(4), "activation_bits": np.int64(0)},
        ),
        (
            native.ATTENTION,
            tuple(ATTENTION.values()),
            (2, 3, 4, 8),
            {"window": np.int64(0), "softcap": np.float32(0), "scale": np.float32(1)},
        ),
    ],
)
def test_a_call_with_an_operand_or_attribute_missing_gives_an_error(target, operands, shape, attributes):
    assert _call(target, operands, shape, **attributes).shape == shape
    count = len(operands)
    for i in range(count):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"arguments: expected {count} but got {count - 1}"):
            _call(target, operands[:i] + operands[i + 1 :], shape, **attributes)
    for missing in attributes:
        with pytest.raises(jax.errors.JaxRuntimeError, match="attributes: expected 3 but got 2"):
            _call(target, operands, shape, **{name: value for name, value in attributes.items() if name != missing})
