"""sparse_matmul: every backend against a float64 oracle over shapes, gradients, and refusals."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import densify_nm, pack_words, sparse_matmul
from hsai_kernels.ops.sparse_matmul.api import BACKENDS
from hsai_kernels.ops.sparse_matmul.shapes import BLOCKED_SHAPES, EIGHTHS, HUGE, SHAPES, SparseShape
from tests.kernels import oracles
from tests.kernels.tolerances import assert_close

# Those of accelerators have tests of their own, in their interpreters.
IMPLEMENTATIONS = sorted(BACKENDS.keys() - {"gpu", "tpu"})
KINDS = ("float32", "bfloat16", "int8", "int4")
INTEGERS = KINDS[2:]


def _draw(shape: SparseShape, kind: str, dtype: str, scale_dtype: str = "float32"):
    """(x, values, indices, scale), for V:N:M with choices, and in float64: x and the dense weight."""
    m = 4 if shape.width else shape.pattern
    rng = np.random.default_rng(shape.contraction * 1000 + shape.columns)
    x = jnp.asarray(rng.standard_normal((*shape.lead, shape.contraction)), dtype)
    positions = oracles.draw_positions(rng, shape.contraction * m // shape.pattern, shape.columns, shape.kept, m)
    indices = jnp.asarray(oracles.pack(positions, 2 if m == 4 else 3))
    if kind in INTEGERS:
        zero = 8 if kind == "int4" else 128
        codes = rng.integers(-zero, zero, positions.shape)
        values = jnp.asarray(oracles.pack(codes + 8, 4) if kind == "int4" else codes.astype(np.int8))
        scale = jnp.asarray(oracles.draw_scale(rng, shape.contraction // shape.group, shape.columns), scale_dtype)
        kept = oracles.scale_rows(codes, np.asarray(scale, np.float64))
    else:
        values, scale = jnp.asarray(rng.standard_normal(positions.shape), kind), None
        kept = np.asarray(values, np.float64)
    operands, weight = (x, values, indices, scale), oracles.densify(kept, positions, shape.kept, m)
    if shape.width:
        choices = oracles.draw_choices(rng, shape.contraction, shape.columns // shape.width, shape.pattern)
        operands = (*operands, jnp.asarray(oracles.pack_choices(choices, shape.pattern)))
        weight = oracles.spread(weight, choices, shape.pattern)
    return operands, np.asarray(x, np.float64), weight


def _implementations(shape: SparseShape, kind: str):
    if shape.pattern == 8 and kind not in INTEGERS:
        return ["reference"]
    return [name for name in IMPLEMENTATIONS if name != "cpu" or kind in INTEGERS or np.prod(shape.lead) <= 8]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", (*SHAPES, *EIGHTHS), ids=str)
def test_products_match_the_oracle(shape, kind, dtype):
    operands, x, weight = _draw(shape, kind, dtype)
    for implementation in _implementations(shape, kind):
        if implementation == "cpu" and kind in INTEGERS and shape.group * shape.kept // shape.pattern % 8:
            continue
        out = sparse_matmul(*operands, n=shape.kept, m=shape.pattern, implementation=implementation)
        assert out.dtype == dtype
        assert_close(out, x @ weight, np.abs(x) @ np.abs(weight), dtype)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("shape", HUGE, ids=str)
def test_a_huge_sum_on_one_side_is_exact(shape, kind):
    """Every partial sum has at most 24 bits, so that in float32 no order of adding loses one, and nothing overflows."""
    (x, _, indices, scale, *choices), _, _ = _draw(shape, kind, "float32")
    zero, kept = (8 if kind == "int4" else 128), shape.contraction * shape.kept // shape.pattern
    levels = np.broadcast_to(np.where(np.arange(shape.columns) % 2, zero - 1, -zero), (kept, shape.columns))
    values = jnp.asarray(oracles.pack(levels + 8, 4) if kind == "int4" else levels.astype(np.int8))
    operands = (jnp.ones_like(x), values, indices, jnp.full_like(scale, 2.0**-5), *choices)
    for implementation in IMPLEMENTATIONS:
        out = sparse_matmul(*operands, n=shape.kept, m=shape.pattern, implementation=implementation)
        np.testing.assert_array_equal(out, [levels.sum(axis=0) * 2.0**-5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", HUGE, ids=str)
def test_huge_products_match_the_oracle(shape, kind):
    operands, x, weight = _draw(shape, kind, "float32")
    for implementation in _blocked_implementations(kind) if shape.width else _implementations(shape, kind):
        out = sparse_matmul(*operands, n=shape.kept, m=shape.pattern, implementation=implementation)
        assert_close(out, x @ weight, np.abs(x) @ np.abs(weight), "float32")


def _blocked_implementations(kind: str):
    return IMPLEMENTATIONS if kind in INTEGERS else ["reference"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", BLOCKED_SHAPES, ids=str)
def test_blocked_products_match_the_oracle(shape, kind, dtype):
    operands, x, weight = _draw(shape, kind, dtype)
    for implementation in _blocked_implementations(kind):
        out = sparse_matmul(*operands, n=shape.kept, m=shape.pattern, implementation=implementation)
        assert out.dtype == dtype
        assert_close(out, x @ weight, np.abs(x) @ np.abs(weight), dtype)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("shape", BLOCKED_SHAPES[:3], ids=str)
def test_blocked_products_of_every_instruction_set(shape, kind):
    operands, x, weight = _draw(shape, kind, "float32")
    out = sparse_matmul(*operands, n=shape.kept, m=shape.pattern, implementation="cpu")
    assert_close(out, x @ weight, np.abs(x) @ np.abs(weight), "float32")


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("shape", BLOCKED_SHAPES, ids=str)
def test_blocked_products_of_rounded_activations_match_the_oracle(shape, kind):
    """Sums of integers are exact: what is left to allow for is float32's sum of the groups."""
    operands, x, weight = _draw(shape, kind, "float32")
    groups = shape.contraction // shape.group
    codes, step = oracles.round_rows(x, groups)
    split = (codes * step).reshape(*shape.lead, groups, 1, shape.group)
    sums = (split @ weight.reshape(groups, shape.group, shape.columns))[..., 0, :]
    for implementation in IMPLEMENTATIONS:
        out = sparse_matmul(*operands, n=shape.kept, m=shape.pattern, activation_bits=8, implementation=implementation)
        assert_close(out, sums.sum(axis=-2), np.abs(sums).sum(axis=-2), "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_blocked_densifying_is_exact(kind):
    shape = BLOCKED_SHAPES[2]
    (_, values, indices, scale, choices), _, weight = _draw(shape, kind, "float32")
    weights = (values, indices, scale, choices)

    def densify(values, indices, scale, choices):
        return densify_nm(values, indices, scale, shape.kept, shape.pattern, shape.contraction, choices)

    np.testing.assert_array_equal(densify(*weights), weight.astype(np.float32))
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), weights)
    np.testing.assert_array_equal(densify(*twice), np.stack([weight, weight]).astype(np.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocked_gradients_to_activations(implementation):
    shape = BLOCKED_SHAPES[1]
    (x, *weight), exact_x, dense = _draw(shape, "int4", "float32")
    pull = np.random.default_rng(1).standard_normal((3, shape.columns)).astype(np.float32)
    multiply = lambda x: sparse_matmul(x, *weight, n=shape.kept, m=shape.pattern, implementation=implementation)  # noqa: E731
    (to_x,) = jax.vjp(multiply, x)[1](jnp.asarray(pull))
    exact = pull.astype(np.float64)
    assert_close(to_x, exact @ dense.T, np.abs(exact) @ np.abs(dense).T, "float32")


def test_choices_of_too_few_or_too_many_are_read_within_their_bounds():
    """What the product then is nobody says, but it is the same each time and stays a number."""
    shape = BLOCKED_SHAPES[1]
    (x, values, indices, scale, choices), *_ = _draw(shape, "int4", "float32")
    for odd in (jnp.zeros_like(choices), ~jnp.zeros_like(choices)):
        outs = [sparse_matmul(x, values, indices, scale, odd, n=1, m=8, implementation="cpu") for _ in range(2)]
        np.testing.assert_array_equal(*outs)
        assert np.isfinite(outs[0]).all()


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_of_groups_of_more_than_four_the_first_members_are_taken(instruction_set, rows):
    """Where machines can, 64 positions are taken at once: only if all their groups are as they should be."""
    rng = np.random.default_rng(rows)
    size, blocks, width = 512, 3, 64
    positions = oracles.draw_positions(rng, size // 2, blocks * width, 2)
    codes = rng.integers(-8, 8, positions.shape)
    choices = oracles.draw_choices(rng, size, blocks, 8)
    weight = oracles.spread(oracles.densify(codes.astype(np.float64), positions, 2, 4), choices, 8)
    words = oracles.pack_choices(choices, 8)
    for group, block in ((0, 0), (9, 1), (10, 1), (40, 0), (63, 2)):
        after = 8 * group + int(choices[4 * group + 3, block]) + 1
        if after % 8:
            words[after // 32, block] |= np.uint32(1) << np.uint32(after % 32)
    assert not np.array_equal(words, oracles.pack_choices(choices, 8))
    x = rng.standard_normal((rows, size)).astype(np.float32)
    operands = (x, oracles.pack(codes + 8, 4), oracles.pack(positions, 2), np.ones((1, blocks * width), np.float32))
    out = sparse_matmul(*map(jnp.asarray, (*operands, words)), n=2, m=8, implementation="cpu")
    exact = x.astype(np.float64)
    assert_close(out, exact @ weight, np.abs(exact) @ np.abs(weight), "float32")


def test_every_native_shape_is_tested():
    """The condition above must not hide a shape that decoding has."""
    few = [shape for shape in (*SHAPES, *EIGHTHS) if np.prod(shape.lead) <= 8]
    assert all(shape.group * shape.kept // shape.pattern % 8 == 0 for shape in few)


def test_bfloat16_scales():
    operands, x, weight = _draw(SHAPES[4], "int4", "float32", "bfloat16")
    for implementation in IMPLEMENTATIONS:
        out = sparse_matmul(*operands, n=2, m=4, implementation=implementation)
        assert_close(out, x @ weight, np.abs(x) @ np.abs(weight), "float32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", (*SHAPES[:4], *EIGHTHS[:3]), ids=str)
def test_densifying_is_exact(shape, kind):
    (_, values, indices, scale), _, weight = _draw(shape, kind, "float32")
    dense = densify_nm(values, indices, scale, shape.kept, shape.pattern, shape.contraction)
    assert dense.dtype == jnp.float32
    np.testing.assert_array_equal(dense, weight.astype(np.float32))
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), (values, indices, scale))
    np.testing.assert_array_equal(
        densify_nm(*twice, shape.kept, shape.pattern, shape.contraction), jnp.stack([dense, dense])
    )


def test_densifying_refuses_another_count():
    (_, values, indices, scale), *_ = _draw(SHAPES[3], "float32", "float32")
    with pytest.raises(ValueError, match="48 kept elements do not make 2:4 of 100"):
        densify_nm(values, indices, scale, 2, 4, 100)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_the_oracle(kind, implementation):
    (x, values, indices, scale), exact_x, weight = _draw(SHAPES[4], kind, "float32")
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((3, 257)), jnp.float32)
    pull = jax.vjp(lambda *a: sparse_matmul(*a, n=2, m=4, implementation=implementation), x, values, indices, scale)[1]
    to_x, to_values, to_indices, to_scale = jax.jit(pull)(cotangent)
    exact = np.asarray(cotangent, np.float64)
    assert_close(to_x, exact @ weight.T, np.abs(exact) @ np.abs(weight).T, "float32")
    assert to_indices.dtype == jax.dtypes.float0
    if kind in INTEGERS:
        assert to_values.dtype == jax.dtypes.float0
        by_group = (scale.shape[0], -1, scale.shape[1])
        steps = oracles.scale_rows(np.ones_like(weight), np.asarray(scale, np.float64))
        expected = ((exact_x.T @ exact) * weight / steps).reshape(by_group).sum(axis=1)
        magnitude = (np.abs(exact_x).T @ np.abs(exact) * np.abs(weight) / np.abs(steps)).reshape(by_group).sum(axis=1)
        assert_close(to_scale, expected, magnitude, "float32")
    else:
        # The dense weight's gradient at the kept positions.
        positions = oracles.unpack(np.asarray(indices), 2)
        rows = 4 * (np.arange(positions.shape[0]) // 2)[:, None] + positions
        expected = np.take_along_axis(exact_x.T @ exact, rows, axis=0)
        magnitude = np.take_along_axis(np.abs(exact_x).T @ np.abs(exact), rows, axis=0)
        assert_close(to_values, expected, magnitude, kind)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("shape", (SHAPES[4], EIGHTHS[1], BLOCKED_SHAPES[1]), ids=str)
def test_a_scale_that_is_no_number_spoils_its_column_only(shape, kind):
    (x, values, indices, scale, *choices), *_ = _draw(shape, kind, "float32")
    for implementation in IMPLEMENTATIONS:
        how: dict[str, Any] = {"n": shape.kept, "m": shape.pattern, "implementation": implementation}
        scales = (scale.at[0, 5].set(jnp.nan), scale)
        found, right = (np.array(sparse_matmul(x, values, indices, s, *choices, **how)) for s in scales)
        assert np.all(np.isnan(found[..., 5]))
        np.testing.assert_array_equal(np.delete(found, 5, axis=-1), np.delete(right, 5, axis=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_scan_and_vmap_give_the_same_bits(kind):
    (x, *weight), *_ = _draw(SHAPES[4], kind, "float32")
    expected = np.asarray(sparse_matmul(x, *weight, n=2, m=4, implementation="cpu"))

    def step(carry, layer):
        return carry, sparse_matmul(x, *layer, n=2, m=4, implementation="cpu")

    layers = jax.tree.map(lambda a: jnp.stack([a, a]), tuple(weight))
    for out in jax.jit(lambda layers: jax.lax.scan(step, 0, layers)[1])(layers):
        np.testing.assert_array_equal(out, expected)
    # Of int8 values the sums of digits are rounded, and those of -x are other digits: not the other sign of the same.
    negated = np.asarray(sparse_matmul(-x, *weight, n=2, m=4, implementation="cpu"))
    mapped = jax.vmap(lambda x: sparse_matmul(x, *weight, n=2, m=4, implementation="cpu"))(jnp.stack([x, -x]))
    np.testing.assert_array_equal(mapped, [expected, negated])


X = jnp.ones((1, 64))
DENSE = jnp.ones((32, 3))
INT4 = pack_words(np.zeros((32, 3), np.uint8), 4)
CHOICES = jnp.full((2, 3), 0x0F0F0F0F, jnp.uint32)
INDICES = pack_words(np.zeros((32, 3), np.uint8), 2)


@pytest.mark.parametrize(
    ("operands", "n", "m", "message"),
    [
        ((X, DENSE, INDICES), 2, 16, "m=16 is not supported: valid are 4 and 8 without choices"),
        ((X, DENSE, INDICES), 3, 8, "n=3 of m=8 is not supported: valid are 1, 2, 4"),
        ((X, DENSE, INDICES), 4, 8, "indices hold 21.3333 positions of 3 bits a column, values 32"),
        ((X, DENSE, INDICES, None, CHOICES), 2, 4, "m=4 is not supported"),
        ((X, DENSE, INDICES, None, CHOICES), 4, 8, "n=4 of m=8"),
        ((X, DENSE[:16], INDICES[:1], None, CHOICES[:1]), 2, 8, "choices hold 32 positions, x contracts over 64"),
        ((X, DENSE[:16], INDICES[:1], None, CHOICES[:, :2]), 2, 8, "3 columns do not divide into the 2 blocks"),
        ((X, DENSE[:16], INDICES[:1], None, CHOICES.astype(jnp.int32)), 2, 8, r"not int32\(2, 3\)"),
        ((X, DENSE, INDICES), 4, 4, "n=4 of m=4"),
        ((X, DENSE, INDICES), 1, 4, r"over 64, but 32 kept elements \(1:4\) make 128"),
        ((X[:, :60], DENSE, INDICES), 2, 4, r"over 60, but 32 kept elements \(2:4\) make 64"),
        ((X, DENSE, INDICES[:1]), 2, 4, "indices hold 16 positions of 2 bits a column, values 32"),
        ((X, DENSE, INDICES[:, :2]), 2, 4, "indices have 2 columns, values have 3"),
        ((X, DENSE, INDICES.astype(jnp.int32)), 2, 4, "not int32"),
        ((X, DENSE.astype(jnp.int16), INDICES), 2, 4, "not of int16"),
        ((X, DENSE.astype(jnp.int8), INDICES), 2, 4, "values of int8 need scale"),
        ((X.astype(jnp.float16), DENSE, INDICES), 2, 4, "not of float16"),
        ((X, DENSE[0], INDICES), 2, 4, r"\(3,\) and \(2, 3\)"),
        ((X, DENSE, INDICES, jnp.ones((1, 3))), 2, 4, "values of float32 take no scale"),
        ((X, INT4, INDICES), 2, 4, "values of uint32 need scale"),
        ((X, INT4, INDICES, jnp.ones((3, 3))), 2, 4, "over 64 does not divide into 3 groups"),
        ((X, INT4, INDICES, jnp.ones((2, 5))), 2, 4, "scale has 5 columns, values have 3"),
        ((X, INT4, INDICES, jnp.ones((32, 3))), 2, 4, "groups of 2 positions are no multiple of m=4"),
        *(
            ((X, INT4, INDICES, jnp.ones(shape)), 2, 4, re.escape(f"must be (groups of 64 positions, 3), got {shape}"))
            for shape in ((), (1,), (3,), (2, 2, 2))
        ),
        *(
            ((X, DENSE, INDICES), n, 4, re.escape(f"n={n!r} of m=4 is not supported: valid are 1, 2, 3"))
            for n in (2.0, True, "2", np.int64(2))
        ),
        *(
            ((X, DENSE, INDICES), 2, m, re.escape(f"m={m!r} is not supported: valid are 4 and 8 without choices"))
            for m in (4.0, "4", np.int64(4))
        ),
        ((X, DENSE[:16], INDICES[:1], None, CHOICES), 2, 8.0, "m=8.0 is not supported: valid are 4 and 8 without"),
        ((X, DENSE[:16], INDICES[:1], None, CHOICES), True, 8, "n=True of m=8 is not supported: valid are 1, 2, 3"),
    ],
)
def test_refusals_name_both_values(operands, n, m, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *a: sparse_matmul(*a, n=n, m=m), *operands)


@pytest.mark.parametrize(
    ("values", "bits", "message"),
    [
        (DENSE, 8, "activation_bits=8 is for integers, not for values of float32"),
        (DENSE.astype(jnp.bfloat16), 8, "activation_bits=8 is for integers, not for values of bfloat16"),
        (INT4, 4, "activation_bits=4 is not supported: valid are 8 and None"),
        (INT4, 8.0, "activation_bits=8.0 is not supported: valid are 8 and None"),
        (INT4, True, "activation_bits=True is not supported: valid are 8 and None"),
    ],
)
def test_activation_bits_that_fit_nothing_are_refused(values, bits, message):
    scale = jnp.ones((1, 3)) if values is INT4 else None
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *a: sparse_matmul(*a, n=2, m=4, activation_bits=bits), X, values, INDICES, scale)


def test_unsupported_groups_fall_back():
    scale = jnp.ones((8, 3))  # groups of 8 positions: 4 kept elements split a word
    with pytest.raises(NotImplementedError, match="multiples of 8"):
        sparse_matmul(X, INT4, INDICES, scale, n=2, m=4, implementation="cpu")
    np.testing.assert_array_equal(sparse_matmul(X, INT4, INDICES, scale, n=2, m=4), np.full((1, 3), 32 * -8.0))


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [(0, "float32", "integers only"), (1, "int4", "multiple of 16"), (1, "int8", "multiple of 16")],
)
def test_native_blocked_products_say_what_they_need(shape, kind, message):
    shape = BLOCKED_SHAPES[shape]
    (x, values, indices, scale, choices), *_ = _draw(shape, kind, "float32")
    if kind in INTEGERS:
        choices = jnp.repeat(choices, 2, axis=1)  # blocks of 8 columns
    with pytest.raises(NotImplementedError, match=message):
        sparse_matmul(x, values, indices, scale, choices, n=shape.kept, m=8, implementation="cpu")
