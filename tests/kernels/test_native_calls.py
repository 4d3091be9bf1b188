"""Wrong calls of the native library's FFI targets: each ends in an error status that says why, never in a crash.

What the API refuses before is in test_quantized_matmul.py and test_sparse_matmul.py; attention's targets have a file of
their own, test_native_attention_calls.py.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hsai_kernels import native, pack_words
from tests.kernels.native_calls import INVALID, call, check_missing

X = np.ones((2, 64), np.float32)
WORDS = np.asarray(pack_words(np.zeros((64, 5), np.uint8), 4))
BYTES = np.zeros((64, 5), np.int8)
SCALE = np.ones((2, 5), np.float32)
NO_CHOICES, CHOICES = np.zeros((0, 5), np.uint32), np.full((2, 2), 0x0F0F0F0F, np.uint32)
NO_SCALE = NO_MINIMUM = np.ones((0, 5), np.float32)
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
        ((X, WORDS, SCALE.astype(np.int32)), (2, 5), jnp.float32),
        ((X, WORDS.astype(np.int32), SCALE), (2, 5), jnp.float32),
        ((X.astype(np.float16), WORDS, SCALE), (2, 5), jnp.float16),
        ((np.ones((2, 0), np.float32), WORDS[:0], SCALE), (2, 5), jnp.float32),  # nothing to contract
    ],
)
def test_wrong_quantized_calls_give_an_error(operands, shape, dtype):
    bits = 8 if operands[1].dtype == np.int8 else 4
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        call(
            native.QUANTIZED_MATMUL,
            (*operands, NO_MINIMUM),
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
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        attributes = {"bits": np.int64(bits), "centered": centered, "activation_bits": np.int64(activation_bits)}
        call(native.QUANTIZED_MATMUL, (X, values, SCALE, NO_MINIMUM), (2, 5), **attributes)


@pytest.mark.parametrize(
    ("values", "bits", "centered", "minimum"),
    [
        (WORDS, 4, False, SCALE[0]),
        (WORDS, 4, False, SCALE[:1]),
        (WORDS, 4, False, SCALE[:, :4]),
        (WORDS, 4, False, SCALE.astype(np.float16)),  # another type than the scales'
        (WORDS, 4, True, SCALE),
        (WORDS[:4], 2, False, SCALE),
        (BYTES, 8, False, SCALE),
    ],
)
def test_wrong_minima_give_an_error(values, bits, centered, minimum):
    attributes = {"bits": np.int64(bits), "centered": centered, "activation_bits": np.int64(0)}
    call(native.QUANTIZED_MATMUL, (X, values, SCALE, NO_MINIMUM), (2, 5), **attributes)
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        call(native.QUANTIZED_MATMUL, (X, values, SCALE, minimum), (2, 5), **attributes)


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
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        call(native.SPARSE_MATMUL, (*operands, NO_CHOICES), (len(operands[0]), 5), **attributes)


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
    call(native.SPARSE_MATMUL, (*right.values(), NO_CHOICES), (2, 5), n=np.int64(4), **attributes)
    operands = (*(right | changes).values(), NO_CHOICES)
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        call(native.SPARSE_MATMUL, operands, (2, 5), n=np.int64(n), **attributes)


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
    call(native.SPARSE_MATMUL, (*operands, scale, CHOICES), (2, 32), m=np.int64(8), **attributes)
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        call(native.SPARSE_MATMUL, (*operands, scale, choices), (2, 32), m=np.int64(m), **attributes)


def test_a_weight_without_columns_is_no_work():
    empty = np.zeros((8, 0), np.uint32)
    attributes = {"bits": np.int64(4), "centered": False, "activation_bits": np.int64(0)}
    operands = (X, empty, np.ones((2, 0), np.float32), np.ones((0, 0), np.float32))
    assert call(native.QUANTIZED_MATMUL, operands, (2, 0), **attributes).shape == (2, 0)


QUANTIZED = {"bits": np.int64(4), "centered": False, "activation_bits": np.int64(0)}
SPARSE = {"n": np.int64(2), "m": np.int64(4), "activation_bits": np.int64(0)}
WEIGHTS = {
    native.QUANTIZED_MATMUL: ((WORDS, SCALE, NO_MINIMUM), QUANTIZED),
    native.SPARSE_MATMUL: ((KEPT, INDICES, NO_SCALE, NO_CHOICES), SPARSE),
}
"""The arrays of a weight, and the attributes of a call with it."""
OF_LAYER = {
    native.QUANTIZED_MATMUL: native.QUANTIZED_MATMUL_OF_LAYER,
    native.SPARSE_MATMUL: native.SPARSE_MATMUL_OF_LAYER,
}


@pytest.mark.parametrize("target", WEIGHTS)
def test_a_call_with_an_operand_or_attribute_missing_gives_an_error(target):
    """Also where the weight is that of a layer."""
    weight, attributes = WEIGHTS[target]
    check_missing(target, (X, *weight), (2, 5), attributes, before=1)
    stacks = (np.stack([array, array]) for array in weight)
    check_missing(OF_LAYER[target], (np.int32(1), X, *stacks), (2, 5), attributes, before=2)


OTHER_WORDS = np.asarray(pack_words(np.zeros((64, 7), np.uint8), 4))
OTHER_SCALE, NO_OTHER_SCALE = np.ones((2, 7), np.float32), np.ones((0, 7), np.float32)
TWO = {
    native.QUANTIZED_MATMUL: {"values": OTHER_WORDS, "scale": OTHER_SCALE, "minimum": NO_OTHER_SCALE},
    native.SPARSE_MATMUL: {
        "values": np.ones((32, 7), np.float32),
        "indices": np.zeros((2, 7), np.uint32),
        "scale": NO_OTHER_SCALE,
        "choices": np.zeros((0, 7), np.uint32),
    },
}
"""The second weight of a call."""


@pytest.mark.parametrize(
    ("target", "changes", "shapes", "message"),
    [
        (native.QUANTIZED_MATMUL, {"scale": np.ones((4, 7), np.float32)}, ((2, 5), (2, 7)), "with groups of one size"),
        (native.QUANTIZED_MATMUL, {"scale": OTHER_SCALE.astype(np.float16)}, ((2, 5), (2, 7)), "of one format"),
        (native.QUANTIZED_MATMUL, {"minimum": OTHER_SCALE}, ((2, 5), (2, 7)), "of one format"),
        (native.QUANTIZED_MATMUL, {"values": OTHER_WORDS[:-1]}, ((2, 5), (2, 7)), "the weight contracts over 56"),
        (
            native.SPARSE_MATMUL,
            {"values": np.zeros((4, 7), np.uint32), "scale": OTHER_SCALE},  # integers behind floats
            ((2, 5), (2, 7)),
            "of one format, with groups of one size",
        ),
        (native.SPARSE_MATMUL, {"values": np.ones((32, 7), ml_dtypes.bfloat16)}, ((2, 5), (2, 7)), "of one format"),
        (native.SPARSE_MATMUL, {"values": np.ones((24, 7), np.float32)}, ((2, 5), (2, 7)), "keep 2 of 4"),
        (native.SPARSE_MATMUL, {"indices": np.zeros((1, 7), np.uint32)}, ((2, 5), (2, 7)), "indices"),
        (native.SPARSE_MATMUL, {"choices": np.full((2, 1), 0x0F0F0F0F, np.uint32)}, ((2, 5), (2, 7)), "m=4 takes no"),
        *(
            (target, {}, shapes, message)
            for target, count in ((native.QUANTIZED_MATMUL, 6), (native.SPARSE_MATMUL, 8))
            for shapes, message in (
                (((2, 5), (2, 6)), r"the result has shape \(2,6,\)"),
                (((2, 7), (2, 5)), r"the result has shape \(2,7,\)"),
                (((2, 5),), f"{count} arrays for 1 results: a weight has {count // 2}"),
                (((2, 5), (2, 7), (2, 7)), f"{count} arrays for 3 results"),
            )
        ),
    ],
)
def test_wrong_calls_with_two_weights_give_an_error(target, changes, shapes, message):
    native.load_library()
    weight, attributes = WEIGHTS[target]

    def multiply(two, shapes):
        results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.ffi.ffi_call(target, results)(X, *weight, *two, **attributes)

    for product, columns in zip(multiply(TWO[target].values(), ((2, 5), (2, 7))), (5, 7), strict=True):
        total = -8.0 * 64 if target == native.QUANTIZED_MATMUL else 32.0
        np.testing.assert_array_equal(product, np.full((2, columns), total))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{INVALID}.*{message}"):
        jax.block_until_ready(multiply((TWO[target] | changes).values(), shapes))
