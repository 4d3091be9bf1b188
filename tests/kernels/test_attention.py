"""attention: every backend against a float64 loop over rows, its gradients, rows that see nothing, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import attention
from hsai_kernels.ops.attention.api import BACKENDS
from hsai_kernels.ops.attention.shapes import SHAPES, AttentionShape
from tests.kernels import oracles
from tests.kernels.refusals import list_wrong_caps, list_wrong_counts, list_wrong_factors
from tests.kernels.slopes import check_gradients
from tests.kernels.tolerances import assert_close

# Those of accelerators have tests of their own, in their interpreters.
IMPLEMENTATIONS = sorted(BACKENDS.keys() - {"gpu", "tpu"})
OPTIONS = (
    {},
    {"window": 3},
    {"softcap": 2.0},
    {"scale": 0.3},
    {"segments": True},
    {"segments": True, "window": 4, "softcap": 5.0, "scale": 0.2},
)
GRADIENT_SHAPE = AttentionShape(batch=2, queries=4, keys=5, heads=4, kv_heads=2, head_dim=6)


def _draw(shape: AttentionShape, dtype: str, segments: bool):
    """q, k, v and the keyword arguments that are arrays; the queries are the last positions of the keys."""
    rng = np.random.default_rng(shape.keys * 100 + shape.head_dim)
    q = jnp.asarray(rng.standard_normal((shape.batch, shape.queries, shape.heads, shape.head_dim)), dtype)
    k, v = (
        jnp.asarray(rng.standard_normal((shape.batch, shape.keys, shape.kv_heads, shape.head_dim)), dtype)
        for _ in range(2)
    )
    kv_positions = np.broadcast_to(np.arange(shape.keys, dtype=np.int32), (shape.batch, shape.keys))
    arrays = {"q_positions": kv_positions[:, shape.keys - shape.queries :], "kv_positions": kv_positions}
    if segments:
        kv_segments = np.sort(rng.integers(0, 3, (shape.batch, shape.keys)), axis=1).astype(np.int32)
        arrays |= {"q_segments": kv_segments[:, shape.keys - shape.queries :], "kv_segments": kv_segments}
    return q, k, v, {name: jnp.asarray(value) for name, value in arrays.items()}


def _ask_oracle(q, k, v, arrays, window=None, softcap=None, scale=None, pull=None):
    """The output, or, of a `pull`, its gradients to q, k and v, with the magnitudes of their terms."""
    exact = [np.asarray(a, np.float64) for a in (q, k, v)]
    at = {name: np.asarray(value) for name, value in arrays.items()}
    ask = oracles.attend if pull is None else functools.partial(oracles.pull_attend, pull=pull)
    return ask(
        *exact,
        at["q_positions"],
        at["kv_positions"],
        at.get("q_segments"),
        at.get("kv_segments"),
        window,
        softcap,
        q.shape[-1] ** -0.5 if scale is None else scale,
    )


def check_attention_gradients(gradients, operands, arrays, options, weights):
    """`check_gradients` of those to q, k and v."""
    oracle = functools.partial(_ask_oracle, arrays=arrays, **options)
    check_gradients(gradients, oracle, lambda *a: oracle(*a[:-1], pull=a[-1]), operands, weights)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle(shape, options):
    options = dict(options)
    segments = options.pop("segments", False)
    for dtype in ("float32", "bfloat16"):
        q, k, v, arrays = _draw(shape, dtype, segments)
        expected = _ask_oracle(q, k, v, arrays, **options)
        for implementation in IMPLEMENTATIONS:
            attend = functools.partial(attention, **options, implementation=implementation)
            out = jax.jit(attend)(q, k, v, **arrays)
            assert out.dtype == dtype
            assert_close(out, expected, float(np.abs(np.asarray(v, np.float64)).max()), dtype)


def test_the_automatic_choice_serves_every_platform():
    q, k, v, arrays = _draw(SHAPES[2], "float32", False)
    assert_close(attention(q, k, v, **arrays), _ask_oracle(q, k, v, arrays), float(np.abs(v).max()), "float32")


def test_rows_of_a_batch_have_their_own_lengths():
    """A cache of 6 slots whose rows are filled up to 2 and 5 positions; empty slots come after every query."""
    q, k, v, _ = _draw(AttentionShape(batch=2, queries=1, keys=6, heads=2, kv_heads=1, head_dim=8), "float32", False)
    lengths = np.array([2, 5])
    slots = np.arange(6)
    arrays = {
        "q_positions": jnp.asarray(lengths[:, None] - 1, jnp.int32),
        "kv_positions": jnp.asarray(np.where(slots < lengths[:, None], slots, 2**30), jnp.int32),
    }
    out = attention(q, k, v, **arrays)
    largest = float(np.abs(v).max())
    assert_close(out, _ask_oracle(q, k, v, arrays), largest, "float32")
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        alone = attention(
            q[one], k[one, :length], v[one, :length], q_positions=positions[:, -1:], kv_positions=positions
        )
        assert_close(out[one], np.asarray(alone, np.float64), largest, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden", ["position", "segment"])
def test_a_row_that_sees_no_key_gives_zeros_and_zero_gradients(hidden, dtype):
    q, k, v, arrays = _draw(GRADIENT_SHAPE, dtype, True)
    if hidden == "position":
        arrays["q_positions"] = arrays["q_positions"].at[0, 1].set(-1)
    else:
        arrays["q_segments"] = arrays["q_segments"].at[0, 1].set(7)

    def loss(q, k, v):
        out = attention(q, k, v, **arrays, softcap=3.0)
        return jnp.sum(jnp.square(out.astype(jnp.float32))), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    assert np.all(np.asarray(out[0, 1]) == 0)
    assert np.all(np.asarray(gradients[0][0, 1]) == 0)
    assert np.any(np.asarray(out[0, 2]) != 0)
    for gradient in gradients:
        assert np.all(np.isfinite(np.asarray(gradient, np.float64)))


def test_a_query_beyond_every_key_of_its_window_gives_zeros():
    q, k, v, arrays = _draw(GRADIENT_SHAPE, "float32", False)
    arrays["q_positions"] = arrays["q_positions"] + 100
    out = attention(q, k, v, **arrays, window=10)
    assert np.all(np.asarray(out) == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_match_finite_differences(options, implementation):
    options = dict(options)
    q, k, v, arrays = _draw(GRADIENT_SHAPE, "float32", options.pop("segments", False))
    rng = np.random.default_rng(5)
    weights = rng.standard_normal(q.shape)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, **arrays, **options, implementation=implementation) * weights)

    check_attention_gradients(jax.grad(loss, argnums=(0, 1, 2))(q, k, v), (q, k, v), arrays, options, weights)


def test_keys_and_values_are_not_repeated_over_query_heads():
    shape = AttentionShape(batch=1, queries=1, keys=64, heads=8, kv_heads=2, head_dim=16)
    q, k, v, arrays = _draw(shape, "float32", False)
    jaxpr = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, **arrays))(q, k, v)
    largest = max(variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars)
    assert largest <= k.size


Q = jnp.ones((2, 3, 4, 8))
K = jnp.ones((2, 5, 2, 8))
CODES = jnp.ones((2, 5, 2, 8), jnp.int8)
SCALE = jnp.ones((2, 5, 2))
INT8 = {"k": CODES, "v": CODES, "k_scale": SCALE, "v_scale": SCALE}
HALVES = jnp.ones((2, 5, 2, 4), jnp.uint8)
HALF_SCALE = jnp.ones((2, 5, 2, 2), jnp.bfloat16)
INT4 = {"k": HALVES, "v": HALVES, "k_scale": HALF_SCALE, "v_scale": HALF_SCALE}
AT_Q = jnp.zeros((2, 3), jnp.int32)
AT_K = jnp.zeros((2, 5), jnp.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": K[:, :, :, :4], "v": K[:, :, :, :4]}, "q has head dim 8, k has head dim 4"),
        ({"v": K[:, :4]}, r"k and v differ in shape: \(2, 5, 2, 8\) and \(2, 4, 2, 8\)"),
        ({"k": K[:1], "v": K[:1]}, "q has batch 2, k has batch 1"),
        ({"q": Q[:, :, :3]}, "3 query heads are no multiple of 2 kv heads"),
        ({"q": Q[0]}, r"\(3, 4, 8\)"),
        ({"k": K.astype(jnp.bfloat16)}, "q, k, v differ in dtype: float32, bfloat16, float32"),
        (
            {"k": CODES},
            "q, k, v differ in dtype: float32, int8, float32; k and v may both be float32 or int8 or uint8 or bfloat16",
        ),
        ({"q": Q.astype(jnp.bfloat16)}, "q, k, v differ in dtype: bfloat16, float32, float32"),
        ({"k": CODES, "v": CODES}, "k is int8 and comes without k_scale"),
        ({"k": CODES, "v": CODES, "k_scale": SCALE}, "v is int8 and comes without v_scale"),
        ({"v_scale": SCALE}, "v is float32 and comes with v_scale"),
        (INT8 | {"k_scale": SCALE[:, :4]}, r"k_scale has shape \(2, 4, 2\), needs \(2, 5, 2\)"),
        (INT8 | {"v_scale": SCALE.astype(jnp.bfloat16)}, "v_scale must be float32, got bfloat16"),
        ({"k": CODES.astype(jnp.uint8), "v": CODES.astype(jnp.uint8)}, r"k has head dim 16 \(uint8\)"),
        ({"k": HALVES, "v": HALVES}, "k is uint8 and comes without k_scale"),
        (INT4 | {"v_scale": SCALE}, r"v_scale has shape \(2, 5, 2\), needs \(2, 5, 2, 2\)"),
        (INT4 | {"k_scale": HALF_SCALE.astype(jnp.float32)}, "k_scale must be bfloat16, got float32"),
        ({"q": Q.astype(jnp.int32)}, "needs floating q, got int32"),
        ({"q_positions": AT_K}, r"q_positions has shape \(2, 5\), needs \(2, 3\)"),
        ({"kv_positions": AT_Q}, r"kv_positions has shape \(2, 3\), needs \(2, 5\)"),
        ({"kv_positions": AT_K.astype(jnp.float32)}, "kv_positions must be int32, got float32"),
        ({"q_positions": AT_Q.astype(jnp.uint32)}, "q_positions must be int32, got uint32"),
        ({"q_positions": AT_Q.astype(jnp.int8)}, "q_positions must be int32, got int8"),
        ({"q_segments": AT_Q.astype(jnp.uint32), "kv_segments": AT_K}, "q_segments must be int32, got uint32"),
        ({"q_segments": AT_Q}, "q_segments given without kv_segments"),
        ({"kv_segments": AT_K}, "kv_segments given without q_segments"),
        ({"q_segments": AT_Q, "kv_segments": AT_Q}, r"kv_segments has shape \(2, 3\), needs \(2, 5\)"),
        *list_wrong_counts("window"),
        *list_wrong_caps("softcap"),
        *list_wrong_factors("scale"),
    ],
)
def test_refusals_name_both_values(changes, message):
    arguments = {"q": Q, "k": K, "v": K, "q_positions": AT_Q, "kv_positions": AT_K} | changes
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **arguments)
