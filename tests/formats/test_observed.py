"""What Gram matrices are sums over: rows of one norm, so that no token decides for the others."""

import jax.numpy as jnp
import numpy as np
import pytest

from hsai.compress.block_solver import BlockSolver
from hsai.compress.solvers import FeedbackConfig
from hsai.formats import Int4Config, project, to_dense
from hsai.formats.observed import Notes, Observed, level_rows, sum_products


def draw_rows(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(len(shape))
    return (rng.standard_normal(shape) * np.exp(2 * rng.standard_normal((*shape[:-1], 1)))).astype(np.float32)


@pytest.mark.parametrize("shape", [(7, 5), (3, 11, 16), (1, 1, 1)], ids=str)
def test_rows_have_a_root_mean_square_of_one(shape: tuple[int, ...]) -> None:
    x = draw_rows(*shape).astype(np.float64)
    found = level_rows(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True)), rtol=1e-5)


def test_rows_of_zeros_stay_and_count_for_nothing() -> None:
    x = draw_rows(6, 8)
    padded = np.concatenate([x, np.zeros((3, 8), np.float32)])
    found = np.asarray(level_rows(jnp.asarray(padded)))
    np.testing.assert_array_equal(found[6:], 0)
    np.testing.assert_allclose(found[:6], level_rows(jnp.asarray(x)), rtol=1e-6)
    np.testing.assert_array_equal(level_rows(jnp.zeros((4, 3))), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_not_finite_is_seen_in_the_sums(bad: float) -> None:
    """1e30 has no square: a row whose norm is infinite must not pass for one of zeros."""
    x = draw_rows(6, 8)
    x[2, 3] = bad
    assert not np.isfinite(sum_products(level_rows(jnp.asarray(x)))).all()


@pytest.mark.parametrize("raw", [True, False])
def test_notes_are_sums_over_level_rows(raw: bool) -> None:
    """And over rows as they are, where these are asked for; their squares are always there."""
    x, w = draw_rows(4, 9, 8), draw_rows(8, 5)
    notes = Notes(raw=raw)
    y = project(jnp.asarray(x), Observed(jnp.asarray(w), "up", notes), out_axes=(None, None, None))
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)
    found = {"level": (level_rows(jnp.asarray(x)), notes.grams)} | ({"raw": (x, notes.raw)} if raw else {})
    for rows, grams in found.values():
        flat = np.asarray(rows, np.float64).reshape(-1, 8)
        np.testing.assert_allclose(grams[0], flat.T @ flat, rtol=0, atol=1e-5 * (flat.T @ flat).max())
    assert len(notes.raw) == raw
    np.testing.assert_allclose(notes.squares[0], np.square(x, dtype=np.float64).sum(axis=(0, 1)), rtol=1e-5)


def test_one_enormous_token_does_not_decide_for_all() -> None:
    """A weight is solved over 255 tokens of one size and one that is a thousand times as large."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((256, 64)) @ rng.standard_normal((64, 64))).astype(np.float32)
    x[17] = 1000 * rng.standard_normal(64)
    w = rng.standard_normal((64, 96)).astype(np.float32)
    others = np.delete(x, 17, axis=0).astype(np.float64)
    errors = []
    for rows in (level_rows(jnp.asarray(x)), jnp.asarray(x)):
        solver = BlockSolver({"up": sum_products(rows)}, {})
        held = to_dense(solver.pack("up", jnp.asarray(w), Int4Config(group=32), FeedbackConfig()).weight)
        errors.append(np.linalg.norm(others @ (w - np.asarray(held, np.float64))))
    assert errors[0] < 0.8 * errors[1], errors
