"""packing.py: the layout against its definition, exact round trips, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai_kernels import pack_words, unpack_words
from tests.kernels import oracles


@given(
    bits=st.sampled_from([2, 4]),
    words=st.integers(0, 3),
    columns=st.sampled_from([0, 1, 5]),
    lead=st.sampled_from([(), (1,), (2, 3)]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=25)
def test_unpacking_inverts_packing(bits, words, columns, lead, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**bits, (*lead, words * 32 // bits, columns)).astype(np.uint8)
    packed = pack_words(values, bits)
    assert packed.dtype == jnp.uint32 and packed.shape == (*lead, words, columns)
    unpacked = unpack_words(packed, bits)
    assert unpacked.dtype == jnp.uint8
    np.testing.assert_array_equal(unpacked, values)


@given(bits=st.sampled_from([2, 4]), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=10)
def test_packing_inverts_unpacking(bits, seed):
    words = np.random.default_rng(seed).integers(0, 2**32, (2, 3, 5), dtype=np.uint32)
    np.testing.assert_array_equal(pack_words(unpack_words(words, bits), bits), words)


@pytest.mark.parametrize("bits", [2, 4])
def test_layout_is_the_documented_one(bits):
    values = np.random.default_rng(0).integers(0, 2**bits, (64, 3)).astype(np.uint8)
    np.testing.assert_array_equal(pack_words(values, bits), oracles.pack(values, bits))


def test_a_shift_and_a_mask_leave_four_consecutive_elements_as_bytes():
    values = np.arange(8, dtype=np.uint8)[:, None]
    word = np.asarray(pack_words(values, 4)).astype("<u4")
    np.testing.assert_array_equal((word & 0x0F0F0F0F).view(np.uint8).ravel(), [0, 1, 2, 3])
    np.testing.assert_array_equal(((word >> 4) & 0x0F0F0F0F).view(np.uint8).ravel(), [4, 5, 6, 7])


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
        (lambda: pack_words(np.zeros((8, 2), np.uint8), 3), "bits=3.*2, 4"),
        (lambda: pack_words(np.zeros((8, 2), np.int8), 4), "unsigned integers, got int8"),
        (lambda: pack_words(np.zeros(8, np.uint8), 4), r"\(8,\)"),
        (lambda: unpack_words(np.zeros((8, 2), np.int32), 4), "uint32 words, got int32"),
        (lambda: unpack_words(np.zeros(8, np.uint32), 4), r"\(8,\)"),
    ],
)
def test_refusals_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
