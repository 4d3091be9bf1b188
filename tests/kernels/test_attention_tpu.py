"""The TPU backend of attention in TPU interpret mode: numbers, gradients, blocks that are passed over, and no races.

That its kernels compile for real chips is shown by test_aot.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import attention
from hsai_kernels.dispatch import compile_for
from hsai_kernels.interpret import interpret_tpu
from hsai_kernels.ops.attention import tpu_blocks
from hsai_kernels.ops.attention.shapes import SHAPES, AttentionShape
from hsai_kernels.ops.attention.tpu_blocks import choose_blocks
from tests.kernels import oracles
from tests.kernels.tolerances import assert_close

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 3},
    {"softcap": 2.0},
    {"segments": True, "window": 40, "softcap": 5.0, "scale": 0.2},
    {"segments": True},
    {"scale": 0.3},
)
# Three blocks of rows (2 query heads a kv head) and three of keys, the last ones ragged.
LONG = AttentionShape(batch=1, queries=150, keys=300, heads=2, kv_heads=1, head_dim=8)
SHORT = AttentionShape(batch=2, queries=7, keys=29, heads=6, kv_heads=2, head_dim=64)
# A head that is not whole registers, two blocks of keys.
PADDED = AttentionShape(batch=1, queries=9, keys=140, heads=2, kv_heads=1, head_dim=80)
# Two blocks of rows and of keys, of whole registers.
WIDE, WIDER = (
    AttentionShape(batch=1, queries=70, keys=150, heads=2, kv_heads=1, head_dim=head_dim) for head_dim in (128, 256)
)


@pytest.fixture
def small_blocks(monkeypatch):
    blocks = dict.fromkeys(tpu_blocks.LARGEST_BLOCKS, ((128, 128),) * 2)
    monkeypatch.setattr(tpu_blocks, "LARGEST_BLOCKS", blocks)


pytestmark = pytest.mark.usefixtures("no_races")


def draw(shape: AttentionShape, dtype: str, segments: bool) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
    """q, k, v; and positions and segments. In longer ones one query sees nothing, and one row of the batch has gaps."""
    rng = np.random.default_rng(shape.keys * 100 + shape.head_dim)
    q_shape = (shape.batch, shape.queries, shape.heads, shape.head_dim)
    k_shape = (shape.batch, shape.keys, shape.kv_heads, shape.head_dim)
    operands = tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in (q_shape, k_shape, k_shape))
    at_k = np.tile(np.arange(shape.keys), (shape.batch, 1))
    at_q = at_k[:, shape.keys - shape.queries :].copy()
    if shape.queries > 2:
        at_q[0, shape.queries // 2] = -1
    if shape.keys > 2:
        at_k[-1, -shape.keys // 4 :] = 2**30
    at = {"q_positions": at_q, "kv_positions": at_k}
    if segments:
        at["kv_segments"] = np.sort(rng.integers(0, 3, at_k.shape), axis=1)
        at["q_segments"] = at["kv_segments"][:, shape.keys - shape.queries :]
    return operands, {name: jnp.asarray(value, jnp.int32) for name, value in at.items()}


def ask_oracle(operands, at, window=None, softcap=None, scale=None) -> np.ndarray:
    at = {name: np.asarray(value) for name, value in at.items()}
    return oracles.attend(
        *(np.asarray(x, np.float64) for x in operands),
        at["q_positions"],
        at["kv_positions"],
        at.get("q_segments"),
        at.get("kv_segments"),
        window,
        softcap,
        operands[0].shape[-1] ** -0.5 if scale is None else scale,
    )


def check_output(shape: AttentionShape, dtype: str, options: dict[str, Any], cores: int = 1) -> None:
    options = dict(options)
    operands, at = draw(shape, dtype, options.pop("segments", False))
    with interpret_tpu(cores=cores):
        out = jax.jit(functools.partial(attention, **options, implementation="tpu"))(*operands, **at)
        out = np.asarray(out)
    assert out.dtype == dtype
    largest = float(np.abs(np.asarray(operands[2], np.float64)).max())
    assert_close(out, ask_oracle(operands, at, **options), largest, dtype)
    if shape.queries > 2:
        assert np.all(out[0, shape.queries // 2] == 0)


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        *((shape, "float32", options) for shape, options in zip(SHAPES, OPTIONS, strict=True)),
        (SHAPES[2], "bfloat16", {"softcap": 3.0}),
        (SHAPES[3], "bfloat16", {"segments": True}),
    ],
    ids=str,
)
def test_matches_the_oracle(shape, dtype, options):
    check_output(shape, dtype, options)


@pytest.mark.parametrize(("dtype", "options"), [("float32", OPTIONS[3]), ("bfloat16", {})], ids=str)
def test_several_blocks_match_the_oracle(small_blocks, dtype, options):
    check_output(LONG, dtype, options)


@pytest.mark.slow
def test_two_cores_share_no_result(small_blocks):
    check_output(LONG, "float32", {"window": 50}, cores=2)


def differentiate(operands, at, grad, implementation, **options) -> tuple[jax.Array, ...]:
    """The gradients of q, k and v."""

    @jax.jit
    def pull(operands):
        return jax.vjp(lambda *o: attention(*o, **at, **options, implementation=implementation), *operands)[1](grad)

    return jax.block_until_ready(pull(operands))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        (LONG, "float32", {"segments": True, "window": 90, "softcap": 1.5}),
        (SHORT, "float32", {"softcap": 3.0, "scale": 0.3}),
        (PADDED, "bfloat16", {"softcap": 3.0}),
        (WIDE, "bfloat16", {"segments": True}),
        (WIDER, "float32", {}),
    ],
    ids=str,
)
def test_gradients_are_the_references(small_blocks, shape, dtype, options):
    """On two cores, none of which may have a part of the other's sums: of the longest, whose 3 blocks of rows and of
    keys they share, one would be halved."""
    options = dict(options)
    operands, at = draw(shape, dtype, options.pop("segments", False))
    grad = jnp.asarray(np.random.default_rng(1).standard_normal(operands[0].shape), dtype)
    with interpret_tpu(cores=2):
        found = differentiate(operands, at, grad, "tpu", **options)
    # The reference is itself held to finite differences of the oracle, by test_attention.py.
    exact = tuple(x.astype(jnp.float32) for x in operands)
    wanted = differentiate(exact, at, grad.astype(jnp.float32), "reference", **options)
    for name, array, expected in zip("qkv", found, wanted, strict=True):
        assert array.dtype == dtype, name
        exact_gradient = np.asarray(expected, np.float64)
        # A gradient sums rounded terms of this size, over the keys or queries that see one another.
        assert_close(array, exact_gradient, 4 * np.abs(exact_gradient).max(), dtype)
    assert np.all(np.asarray(found[0][0, shape.queries // 2]) == 0)
    for array in found[1:]:
        assert np.all(np.asarray(array[-1, -shape.keys // 4 :]) == 0)  # keys that no query sees


def test_what_nobody_sees_is_not_computed(small_blocks):
    """Keys after all queries, before all windows, and of other documents, in blocks of their own, hold NaN."""
    (q, k, v), at = draw(
        AttentionShape(batch=1, queries=3, keys=640, heads=2, kv_heads=1, head_dim=8), "float32", False
    )
    at["q_positions"] = jnp.asarray([[300, 310, 320]], jnp.int32)
    at["q_segments"] = jnp.full((1, 3), 1, jnp.int32)
    at["kv_segments"] = jnp.where(jnp.arange(640) < 256, 0, 1)[None]
    hidden = (jnp.arange(640) < 256) | (jnp.arange(640) >= 384)
    poisoned = [jnp.where(hidden[None, :, None, None], jnp.nan, x) for x in (k, v)]
    with interpret_tpu():
        for cut in ({"q_segments": at.pop("q_segments"), "kv_segments": at.pop("kv_segments")}, {"window": 40}):
            found = attention(q, *poisoned, **at, **cut, implementation="tpu")
            wanted = attention(q, k, v, **at, **cut, implementation="reference")
            assert_close(found, np.asarray(wanted, np.float64), 4.0, "float32")


def test_the_automatic_choice_on_a_tpu_is_this_backend():
    operands, at = draw(SHORT, "float32", False)
    with interpret_tpu():
        text = str(jax.make_jaxpr(lambda *o: attention(*o, **at))(*operands))
    assert "attention_forward" in text
    with compile_for("cpu"):
        assert "attention_forward" not in str(jax.make_jaxpr(lambda *o: attention(*o, **at))(*operands))


def test_blocks_fill_whole_tiles_and_waste_less_than_one():
    for dtype in ("float32", "bfloat16"):
        for rows in (1, 7, 16, 100, 129, 520, 5000):
            for keys in (1, 128, 1300, 32768):
                for block_rows, block_keys in choose_blocks(rows, keys, 128, dtype):
                    assert block_rows % (16 if rows <= 128 else 128) == 0 and block_keys % 128 == 0
                    for length, block in ((rows, block_rows), (keys, block_keys)):
                        assert -(-length // block) * block - length < 128 * -(-length // block)
    assert choose_blocks(4, 32768, 128, "bfloat16")[0] == (16, 1024)  # decoding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "float32 or bfloat16, not of float16"),
        ({"head_dim": 512}, "head dims up to 256, not 512"),
        ({"keys": 0, "queries": 0}, r"not empty, not q \(1, 0, 1, 8\)"),
    ],
)
def test_refusals_say_what_is_supported(changes, message):
    sizes = {
        "batch": 1,
        "queries": 2,
        "keys": 3,
        "heads": 1,
        "kv_heads": 1,
        "head_dim": 8,
        "dtype": "float32",
    } | changes
    dtype = sizes.pop("dtype")
    operands, at = draw(AttentionShape(**sizes), dtype, False)
    with interpret_tpu(), pytest.raises(NotImplementedError, match=message):
        attention(*operands, **at, implementation="tpu")


def test_other_platforms_are_refused():
    operands, at = draw(SHORT, "float32", False)
    with compile_for("cpu"), pytest.raises(NotImplementedError, match="tpu platform only"):
        attention(*operands, **at, implementation="tpu")
