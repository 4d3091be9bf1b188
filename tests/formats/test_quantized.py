"""Int8, codes and Ternary against plain numpy: exact where a weight is representable, else within half a step."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.formats import Int2Config, Int3Config, Int4Config, Int8Config, TernaryConfig
from hsai.formats.codes import group_absmax, round_to_codes

SEEDS = st.integers(0, 2**32 - 1)


def draw_scales(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Powers of two: products with small integers are exact in every float format."""
    return 2.0 ** rng.integers(-12, 3, shape).astype(np.float32)


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, stack=st.sampled_from([(), (2, 2)]), size=st.sampled_from([1, 7]))
def test_int8_holds_its_codes_exactly(seed: int, stack: tuple[int, ...], size: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (*stack, size, 5)).astype(np.float32)
    scale = draw_scales(rng, (*stack, 1, 5))
    packed = Int8Config().pack(jnp.asarray(codes * scale), jnp.asarray(scale))
    np.testing.assert_array_equal(packed.values, codes)
    np.testing.assert_array_equal(packed.dense(), codes * scale)


LEVELS = {Int4Config: np.arange(-8, 8), Int3Config: np.arange(-4, 4) + 0.5, Int2Config: np.arange(-2, 2) + 0.5}
"""What each config of codes can hold, in units of the scale."""


@settings(deadline=None, max_examples=20)
@given(
    seed=SEEDS,
    stack=st.sampled_from([(), (3,)]),
    make=st.sampled_from(list(LEVELS)),
    group=st.sampled_from([32, 64, 128]),
)
def test_codes_are_held_exactly(seed: int, stack: tuple[int, ...], make: type, group: int) -> None:
    rng = np.random.default_rng(seed)
    levels = rng.choice(LEVELS[make], (*stack, 256, 3)).astype(np.float32)
    scale = draw_scales(rng, (*stack, 256 // group, 3))
    w = levels * np.repeat(scale, group, axis=-2)
    packed = make(group=group).pack(jnp.asarray(w), jnp.asarray(scale))
    np.testing.assert_array_equal(packed.dense(), w)
    np.testing.assert_array_equal(packed.scale.astype(jnp.float32), scale)


GROUPS = st.sampled_from([32, 64, 128, None])


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, stack=st.sampled_from([(), (3,)]), group=GROUPS)
def test_ternary_holds_its_codes_exactly(seed: int, stack: tuple[int, ...], group: int | None) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 2, (*stack, 256, 3)).astype(np.float32)
    scale = draw_scales(rng, (*stack, 256 // (group or 256), 3))
    w = codes * np.repeat(scale, group or 256, axis=-2)
    packed = TernaryConfig(group=group).pack(jnp.asarray(w), jnp.asarray(scale))
    np.testing.assert_array_equal(packed.dense(), w)
    np.testing.assert_array_equal(packed.scale.astype(jnp.float32), scale)


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, group=GROUPS)
def test_ternary_is_absmean_rounding(seed: int, group: int | None) -> None:
    """Equations 1 to 3 of BitNet b1.58, a group at a time, for the scale as it is stored."""
    w = np.random.default_rng(seed).standard_t(3, (256, 4)).astype(np.float32)
    packed = TernaryConfig(group=group).pack(jnp.asarray(w))
    dense, steps = np.asarray(packed.dense()), np.asarray(packed.scale, np.float32)
    size = group or 256
    for at, part in enumerate(np.split(w, 256 // size)):
        np.testing.assert_allclose(steps[at], np.abs(part).mean(0), rtol=2**-8)
        wanted = np.clip(np.rint(part * (np.float32(1) / steps[at])), -1, 1) * steps[at]
        np.testing.assert_array_equal(dense[at * size : (at + 1) * size], wanted)


def test_ternary_never_takes_the_fourth_code() -> None:
    w = jnp.asarray([[-100.0], [100.0], [0.0], [-1e-3]] * 8)
    for scale in (None, jnp.ones((1, 1))):
        packed = TernaryConfig(group=32).pack(w, scale)
        step = float(packed.scale[0, 0])
        assert packed.dense()[:4, 0].tolist() == [-step, step, 0.0, 0.0]
        assert {int(word) >> shift & 3 for word in packed.words[:, 0] for shift in range(0, 32, 2)} == {1, 2, 3}


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, make=st.sampled_from(list(LEVELS)))
def test_the_scale_of_representable_weights_is_found(seed: int, make: type) -> None:
    rng = np.random.default_rng(seed)
    high = LEVELS[make].max()
    levels = rng.choice(LEVELS[make][LEVELS[make] >= -high], (128, 3)).astype(np.float32)
    levels[[0, 64]] = rng.choice([-high, high], (2, 3))  # each group reaches its largest level
    w = levels * np.repeat(draw_scales(rng, (2, 3)), 64, axis=0)
    np.testing.assert_array_equal(make(group=64).pack(jnp.asarray(w)).dense(), w)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, make=st.sampled_from(list(LEVELS)))
def test_codes_are_those_of_the_nearest_levels(seed: int, make: type) -> None:
    """By the definition, all levels tried: also beyond the outer ones, and for scales that are no powers of two."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(2, (64, 4)).astype(np.float32)
    packed = make(group=32).pack(jnp.asarray(w), jnp.asarray(rng.uniform(0.05, 1.0, (2, 4)), jnp.float32))
    step = np.repeat(np.asarray(packed.scale, np.float64), 32, axis=0)
    values = step * LEVELS[make][:, None, None]
    missed = np.abs(np.asarray(packed.dense(), np.float64) - w)
    np.testing.assert_allclose(missed, np.abs(values - w).min(axis=0), rtol=1e-5, atol=1e-6)
    assert np.isin(np.asarray(packed.dense()), values.astype(np.float32)).all()


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, heavy=st.booleans())
def test_rounding_misses_by_half_a_step_at_most(seed: int, heavy: bool) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_t(2, (128, 4)) if heavy else rng.normal(size=(128, 4))
    w = jnp.asarray(w.astype(np.float32))
    eight = Int8Config().pack(w)
    assert (np.abs(eight.dense() - w) <= 0.5001 * np.asarray(eight.scale)).all()
    for make in LEVELS:
        packed = make(group=32).pack(w)
        # A scale is rounded to bfloat16, and may then not reach the largest weight by half a step of that.
        step = np.repeat(np.asarray(packed.scale.astype(jnp.float32)), 32, axis=0)
        assert (np.abs(packed.dense() - w) <= 0.5001 * step + LEVELS[make].max() * step * 2**-8).all()


def test_int8_is_the_textbook_formula() -> None:
    w = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    scale = np.abs(w).max(0, keepdims=True) / np.float32(127)
    packed = Int8Config().pack(jnp.asarray(w))
    np.testing.assert_allclose(packed.scale, scale, rtol=2e-7)
    np.testing.assert_array_equal(packed.values, np.rint(w / scale))
    assert packed.scale.shape == (1, 6) and packed.scale.dtype == jnp.float32
    assert np.abs(packed.values).max(0).tolist() == [127] * 6


def test_codes_make_up_for_the_rounded_scale() -> None:
    # 1/3 is not a bfloat16; codes are chosen for the stored 0.333984375, not for the scale that was asked for.
    scale = jnp.full((1, 1), 1 / 3, jnp.float32)
    packed = Int4Config(group=32).pack(jnp.full((32, 1), 0.5009, jnp.float32), scale)
    assert float(packed.scale[0, 0]) == 0.333984375
    assert float(packed.dense()[0, 0]) == 0.333984375
    assert int(round_to_codes(jnp.full((32, 1), 0.5009), scale, 4)[0, 0]) == 10


def test_what_lies_beyond_the_scale_is_clipped() -> None:
    w = jnp.asarray([[100.0], [-100.0]] * 16)
    dense = Int4Config(group=32).pack(w, jnp.ones((1, 1))).dense()
    assert dense[:2, 0].tolist() == [7.0, -8.0]
    assert Int3Config(group=32).pack(w, jnp.ones((1, 1))).dense()[:2, 0].tolist() == [3.5, -3.5]
    assert Int2Config(group=32).pack(w, jnp.ones((1, 1))).dense()[:2, 0].tolist() == [1.5, -1.5]
    assert Int8Config().pack(w * 10, jnp.ones((1, 1))).dense()[:2, 0].tolist() == [127.0, -127.0]


def test_groups_run_along_the_contraction() -> None:
    w = jnp.concatenate([jnp.full((32, 2), 3.0), jnp.full((32, 2), -5.0)])
    np.testing.assert_array_equal(group_absmax(w, 32), [[3.0, 3.0], [5.0, 5.0]])


@pytest.mark.parametrize("row", range(8))
def test_int4_words_are_laid_out_as_packing_says(row: int) -> None:
    w = np.zeros((32, 1), np.float32)
    w[row] = 7.0
    word = int(Int4Config(group=32).pack(jnp.asarray(w), jnp.ones((1, 1))).words[0, 0])
    others = word ^ (0xF << (at := 8 * (row % 4) + 4 * (row // 4)))
    assert (word >> at) & 0xF == 15
    assert all((others >> shift) & 0xF == 8 for shift in range(0, 32, 4) if shift != at)
