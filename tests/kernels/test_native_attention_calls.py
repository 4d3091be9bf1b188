"""Wrong calls of the native attention's FFI targets: each ends in an error status that says why, never in a crash.

What the API refuses before is in test_attention.py and test_paged_attention.py; other targets: test_native_calls.py.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hsai_kernels import native
from tests.kernels.native_calls import INVALID, call, check_missing

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
    operands = [*(ATTENTION | changes).values()]
    options = {"window": np.int64(window), "softcap": np.float32(softcap), "scale": np.float32(1)}
    return call(native.ATTENTION, operands, shape, dtype, **options)


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
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        _attend(changes, **result)


def test_right_attention_calls_give_none():
    assert np.all(np.asarray(_attend({})) == 1)
    assert np.all(np.asarray(_attend(INT4)) == 1)
    assert np.all(np.asarray(_attend(INT8 | {"in_q": AT_Q, "in_k": AT_K}, window=1, softcap=1.0)) == 1)


PAGES = np.ones((2, 3, 4, 2, 8), np.float32)
PAGE_CODES = PAGES.astype(np.int8)
PAGE_SCALE = np.ones((2, 3, 4, 2), np.float32)
PAGE_HALVES = np.full((2, 3, 4, 2, 4), 0x11, np.uint8)
PAGE_HALF_SCALE = np.ones((2, 3, 4, 2, 2), ml_dtypes.bfloat16)
LAYER = np.array(1, np.int32)
TABLE = np.array([[2, 0], [1, 2]], np.int32)
PAGED = {"q": Q, "k": PAGES, "v": PAGES, "layer": LAYER, "table": TABLE, "at_q": AT_Q} | {
    "k_scale": NO_K_SCALE,
    "v_scale": NO_K_SCALE,
}
PAGED_INT8 = {"k": PAGE_CODES, "v": PAGE_CODES, "k_scale": PAGE_SCALE, "v_scale": PAGE_SCALE}
PAGED_INT4 = {"k": PAGE_HALVES, "v": PAGE_HALVES, "k_scale": PAGE_HALF_SCALE, "v_scale": PAGE_HALF_SCALE}


def _attend_pages(changes, shape=(2, 3, 4, 8), dtype=jnp.float32, window=0, softcap=0.0):
    operands = [*(PAGED | changes).values()]
    options = {"window": np.int64(window), "softcap": np.float32(softcap), "scale": np.float32(1)}
    return call(native.PAGED_ATTENTION, operands, shape, dtype, **options)


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        ({"q": Q[0]}, {}),
        ({"q": Q.astype(np.float16)}, {"dtype": jnp.float16}),
        ({}, {"shape": (2, 3, 4, 9)}),
        ({}, {"shape": (2, 3, 4)}),
        ({}, {"dtype": jnp.bfloat16}),
        ({"k": PAGES[0], "v": PAGES[0]}, {}),  # one layer
        ({"k": PAGES[..., :4], "v": PAGES[..., :4]}, {}),  # another head dim
        ({"v": PAGES[:, :2]}, {}),  # fewer pages of values than of keys
        ({"v": PAGE_CODES}, {}),
        ({"k": PAGES.astype(np.float16), "v": PAGES.astype(np.float16)}, {}),
        ({"k": PAGES[:, :, :, :0], "v": PAGES[:, :, :, :0]}, {}),  # no kv heads
        ({"q": Q[:, :, :3]}, {"shape": (2, 3, 3, 8)}),  # 3 heads of 2 kv heads
        ({"k": PAGES[:0], "v": PAGES[:0], "layer": LAYER * 0}, {}),  # no layers
        ({"k": PAGES[:, :0], "v": PAGES[:, :0], "table": TABLE * 0}, {}),  # no pages
        ({"k": PAGES[:, :, :0], "v": PAGES[:, :, :0]}, {}),  # of no tokens
        ({"layer": LAYER[None]}, {}),
        ({"layer": LAYER.astype(np.float32)}, {}),
        ({"layer": LAYER.astype(np.uint32)}, {}),
        ({"layer": LAYER + 1}, {}),  # of 2
        ({"layer": LAYER - 2}, {}),
        ({"table": TABLE[0]}, {}),
        ({"table": TABLE[:1]}, {}),  # another batch
        ({"table": TABLE[:, :0]}, {}),
        ({"table": TABLE.astype(np.uint32)}, {}),
        ({"table": TABLE.astype(np.float32)}, {}),
        ({"table": TABLE + 1}, {}),  # page 3 of 3
        ({"table": TABLE - 3}, {}),
        ({"at_q": AT_Q[:, :2]}, {}),
        ({"at_q": AT_Q[:1]}, {}),
        ({"at_q": AT_Q.astype(np.float32)}, {}),
        ({"at_q": AT_Q + 8}, {}),  # of 2 pages of 4
        ({"at_q": AT_Q + (2**31 - 1)}, {}),
        ({"k": PAGE_CODES, "v": PAGE_CODES}, {}),  # codes without scales
        (PAGED_INT8 | {"v_scale": NO_K_SCALE}, {}),
        (PAGED_INT8 | {"k_scale": PAGE_SCALE[..., :1]}, {}),
        (PAGED_INT8 | {"k_scale": PAGE_SCALE[:1]}, {}),  # of one layer
        (PAGED_INT8 | {"k_scale": PAGE_SCALE.astype(np.int32)}, {}),
        ({"k_scale": PAGE_SCALE, "v_scale": PAGE_SCALE}, {}),  # scales of floats
        ({"k": PAGE_HALVES, "v": PAGE_HALVES}, {}),
        (PAGED_INT4 | {"k": PAGE_CODES.astype(np.uint8), "v": PAGE_CODES.astype(np.uint8)}, {}),  # twice the head
        (PAGED_INT4 | {"k": PAGE_CODES}, {}),
        (PAGED_INT4 | {"k_scale": PAGE_SCALE, "v_scale": PAGE_SCALE}, {}),
        (PAGED_INT4 | {"v_scale": PAGE_HALF_SCALE[..., :1]}, {}),
        (PAGED_INT4 | {"k_scale": PAGE_HALF_SCALE.view(np.uint16)}, {}),  # bits beside numbers
        ({}, {"window": -1}),
        ({}, {"window": 2**31}),
        ({}, {"softcap": -1.0}),
        ({}, {"softcap": np.nan}),
    ],
)
def test_wrong_calls_of_pages_give_an_error(changes, result):
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        _attend_pages(changes, **result)


def test_right_calls_of_pages_give_none():
    bits = np.full(PAGES.shape, 0x3F80, np.uint16)  # ones, as bfloat16
    for changes in ({}, {"at_q": AT_Q + 7}, {"k": bits, "v": bits}, PAGED_INT4):
        np.testing.assert_allclose(_attend_pages(changes), np.ones(Q.shape), rtol=2.0**-20)
    assert np.all(np.asarray(_attend_pages(PAGED_INT8, window=1, softcap=1.0)) == 1)
    nowhere = {"at_q": AT_Q - 1, "table": TABLE - 3}  # who sees nothing looks at no page
    assert np.all(np.asarray(_attend_pages(nowhere)) == 0)


@pytest.mark.parametrize(
    ("target", "operands"), [(native.ATTENTION, ATTENTION), (native.PAGED_ATTENTION, PAGED)], ids=["rows", "pages"]
)
def test_a_call_with_an_operand_or_attribute_missing_gives_an_error(target, operands):
    options = {"window": np.int64(0), "softcap": np.float32(0), "scale": np.float32(1)}
    check_missing(target, [*operands.values()], Q.shape, options)
