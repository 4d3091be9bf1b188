"""Products of experts, and weights that look on there, against plain loops over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.formats import Int8Config, project_sorted
from hsai.formats.observed import ROWS, Notes, Observed, Tapped, sum_products_sorted

SIZES = [(3, 0, 5, 1), (0, 0, 0, 0), (0, 0, 12, 0), (1, 1, 1, 1)]


def split(x: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    ends = np.cumsum(sizes)
    return [x[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def draw(rows: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    return rng.standard_normal((rows, shape[1])).astype(np.float32), rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("sizes", [*SIZES, (300, 0, 128, 1), (127, 129, 0, 256)], ids=str)
def test_each_experts_rows_have_a_matrix(sizes: tuple[int, ...]) -> None:
    """Blocks that are full, ragged, empty; and rows behind the last expert's, which are nobody's."""
    x, _ = draw(max(ROWS + 44, sum(sizes) + 7) if sum(sizes) > 20 else 14, 4, 6, 1)
    found = sum_products_sorted(jnp.asarray(x), jnp.asarray(sizes))
    wanted = np.stack([part.T.astype(np.float64) @ part for part in split(x, sizes)])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_are_multiplied_by_their_experts_weight(sizes: tuple[int, ...]) -> None:
    x, w = draw(14, 4, 6, 5)
    x[sum(sizes) :] = 0
    wanted = np.zeros((14, 5))
    wanted[: sum(sizes)] = np.concatenate([part @ w[e] for e, part in enumerate(split(x, sizes))])
    found = project_sorted(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    packed = Int8Config().pack(jnp.asarray(w))
    found = project_sorted(jnp.asarray(x), packed, jnp.asarray(sizes))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.1)


def test_those_that_look_on_note_inputs_and_gradients() -> None:
    sizes = (3, 0, 5, 1)
    x, w = draw(14, 4, 6, 5)
    x[9:] = 0
    rows, groups = jnp.asarray(x), jnp.asarray(sizes)
    plain = project_sorted(rows, jnp.asarray(w), groups)
    notes = Notes(raw=True)
    for name in ("gate", "up"):
        y = project_sorted(rows, Observed(jnp.asarray(w), name, notes), groups)
        np.testing.assert_array_equal(y, plain)
    assert notes.owner == {"gate": 0, "up": 0} and len(notes.raw) == 1, "one input, one matrix"
    np.testing.assert_allclose(notes.raw[0], [part.T @ part for part in split(x, sizes)], rtol=1e-5, atol=1e-5)
    squares = [np.square(part).sum(axis=0) for part in split(x, sizes)]
    np.testing.assert_allclose(notes.squares[0], squares, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(notes.counts[0], sizes)

    def run(sink: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(project_sorted(rows, Tapped(jnp.asarray(w), sink), groups)))

    squares, d_rows = jax.jit(jax.grad(run, argnums=(0, 1)))(jnp.zeros((4, 1, 5)), rows)
    slopes = np.cos(np.asarray(plain, np.float64))
    wanted = np.stack([(part**2).sum(axis=0) for part in split(slopes, sizes)])
    np.testing.assert_allclose(squares[:, 0], wanted, rtol=1e-5, atol=1e-6)
    d_wanted = np.concatenate([part @ w[e].T for e, part in enumerate(split(slopes, sizes))])
    np.testing.assert_allclose(d_rows[:9], d_wanted, rtol=1e-5, atol=1e-5)
