"""packing.py: the layout against its definition, exact round trips, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai_kernels import count_elements, pack_words, unpack_words
from hsai_kernels.packing import find_halves
from tests.kernels import oracles


@given(
    bits=st.sampled_from([2, 3, 4]),
    blocks=st.integers(0, 3),
    columns=st.sampled_from([0, 1, 5]),
    lead=st.sampled_from([(), (1,), (2, 3)]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=25)
def test_unpacking_inverts_packing(bits, blocks, columns, lead, seed):
    rng = np.random.default_rng(seed)
    size = blocks * count_elements(bits)
    values = rng.integers(0, 2**bits, (*lead, size, columns)).astype(np.uint8)
    packed = pack_words(values, bits)
    assert packed.dtype == jnp.uint32 and packed.shape == (*lead, size * bits // 32, columns)
    unpacked = unpack_words(packed, bits)
    assert unpacked.dtype == jnp.uint8
    np.testing.assert_array_equal(unpacked, values)


@given(bits=st.sampled_from([2, 3, 4]), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=10)
def test_packing_inverts_unpacking(bits, seed):
    words = np.random.default_rng(seed).integers(0, 2**32, (2, 6, 5), dtype=np.uint32)
    np.testing.assert_array_equal(pack_words(unpack_words(words, bits), bits), words)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_layout_is_the_documented_one(bits):
    values = np.random.default_rng(0).integers(0, 2**bits, (64, 3)).astype(np.uint8)
    np.testing.assert_array_equal(pack_words(values, bits), oracles.pack(values, bits))


def test_a_shift_and_a_mask_leave_four_consecutive_elements_as_bytes():
    values = np.arange(8, dtype=np.uint8)[:, None]
    word = np.asarray(pack_words(values, 4)).astype("<u4")
    np.testing.assert_array_equal((word & 0x0F0F0F0F).view(np.uint8).ravel(), [0, 1, 2, 3])
    np.testing.assert_array_equal(((word >> 4) & 0x0F0F0F0F).view(np.uint8).ravel(), [4, 5, 6, 7])


def test_two_of_three_words_and_three_masks_leave_a_word_of_4_bits():
    """What the native kernels rely on, for the four words of 4 bits that 32 elements of 3 bits would have."""
    values = np.random.default_rng(0).integers(0, 8, (32, 3)).astype(np.uint8)
    first, second, high = np.asarray(pack_words(values, 3))
    for word, wanted in enumerate(oracles.pack(values, 4)):
        low = (first if word < 2 else second) >> (2 * (word % 2))
        top = high << (2 - word) if word < 2 else high >> (word - 2)
        np.testing.assert_array_equal((low & 0x33333333) | (top & 0x44444444), wanted)


def test_halves_of_3_bits_stand_where_they_are_said_to():
    for element in range(32):
        values = np.zeros((32, 1), np.uint8)
        values[element] = 7
        words = np.zeros(3, np.uint32)
        (low, low_shift), (high, high_shift) = find_halves(element)
        words[low] |= np.uint32(3 << low_shift)
        words[high] |= np.uint32(1 << high_shift)
        np.testing.assert_array_equal(oracles.pack(values, 3)[:, 0], words)


def test_works_under_jit_and_vmap():
    values = np.random.default_rng(0).integers(0, 4, (3, 32, 5)).astype(np.uint8)
    packed = jax.jit(jax.vmap(lambda x: pack_words(x, 2)))(values)
    np.testing.assert_array_equal(packed, pack_words(values, 2))
    np.testing.assert_array_equal(jax.vmap(jax.jit(lambda w: unpack_words(w, 2)))(packed), values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_words(np.zeros((12, 2), np.uint8), 4), "12 elements do not fill words of 8"),
        (lambda: pack_words(np.zeros((24, 2), np.uint8), 2), "24 elements do not fill words of 16"),
        (lambda: pack_words(np.zeros((8, 2), np.uint8), 5), "bits=5.*2, 3, 4"),
        (lambda: pack_words(np.zeros((8, 2), np.uint8), 4.0), "bits=4.0 cannot be packed: valid are 2, 3, 4"),
        (lambda: unpack_words(np.zeros((3, 2), np.uint32), 3.0), "bits=3.0 cannot be packed: valid are 2, 3, 4"),
        (lambda: pack_words(np.zeros((48, 2), np.uint8), 3), "48 elements do not fill words of 32"),
        (lambda: unpack_words(np.zeros((4, 2), np.uint32), 3), "4 words are no multiple of the 3"),
        (lambda: pack_words(np.zeros((8, 2), np.int8), 4), "unsigned integers, got int8"),
        (lambda: pack_words(np.zeros(8, np.uint8), 4), r"\(8,\)"),
        (lambda: unpack_words(np.zeros((8, 2), np.int32), 4), "uint32 words, got int32"),
        (lambda: unpack_words(np.zeros(8, np.uint32), 4), r"\(8,\)"),
    ],
)
def test_refusals_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
