"""A weight in its format, solved: what is kept apart, outputs in parts, and masks of other rules."""

import jax.numpy as jnp
import numpy as np
import pytest

from hsai.compress.grid import grid_of, pattern_of
from hsai.compress.solved import Factor, find_factor, find_outliers, pack_solved
from hsai.compress.solver import solve
from hsai.compress.solvers import FeedbackConfig
from hsai.compress.wanda import measure_norms
from hsai.formats import (
    Int2Config,
    Int4Config,
    Int8Config,
    NMInt4Config,
    OutliersConfig,
    UnstructuredConfig,
    UnstructuredInt4Config,
    VNMConfig,
    to_dense,
)
from tests.compress.problems import draw


@pytest.mark.parametrize(
    ("base", "order"),
    [
        (Int2Config(group=32), "natural"),
        (Int8Config(), "activations"),
        (NMInt4Config(n=2, m=4, group=32), "activations"),
        (UnstructuredInt4Config(density=0.5, block=128, group=64), "natural"),
    ],
    ids=lambda part: getattr(part, "format", part),
)
def test_what_is_kept_apart_costs_next_to_nothing(base, order) -> None:
    """The format holds bit for bit what was solved; the rest has an error as if those positions were not there."""
    w, gram, x = draw(8, 128, 32)
    loud = [3, 40, 41, 99]
    x[:, loud] *= 20
    gram = (x.T @ x).astype(np.float32)
    format, config = OutliersConfig(base=base, share=4 / 128), FeedbackConfig(order=order)
    factor = find_factor(jnp.asarray(gram), format, config)
    assert isinstance(factor, Factor) and (factor.order is None) == (order == "natural")
    assert find_outliers([jnp.asarray(w)], factor, format).tolist() == loud
    packed = pack_solved(jnp.asarray(w), factor, format, config)
    assert packed.index[:, 0].tolist() == loud
    apart = jnp.zeros(128, bool).at[jnp.asarray(loud)].set(True)
    how = {"grid": grid_of(base), "pattern": pattern_of(base), "order": factor.order}
    solved = solve(jnp.asarray(w), factor.upper, **how, apart=apart)
    np.testing.assert_array_equal(to_dense(packed), solved.values)
    plain = solve(jnp.asarray(w), factor.upper, **how)
    # What prunes keeps loud positions anyway: there is less to gain.
    share = 0.8 if pattern_of(base) is None else 0.95
    dense = np.asarray(to_dense(packed))
    errors = [np.linalg.norm(x @ (v - w)) for v in (dense, np.asarray(plain.values))]
    assert errors[0] < share**0.5 * errors[1]
    if order == "natural":  # they make up for errors before them, by little, being loud
        assert (dense[99] != np.asarray(jnp.asarray(w[99], jnp.bfloat16), np.float32)).mean() > 0.2


@pytest.mark.parametrize("columns", [10, 4])
def test_outputs_that_share_a_choice_are_solved_together(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where V does not divide the number that one program takes at a time, or is larger."""
    w, gram, _ = draw(12, 64, 24)
    format, config = VNMConfig(v=8, n=2, m=8, dtype="float32"), FeedbackConfig()
    factor = find_factor(jnp.asarray(gram), format, config)
    assert isinstance(factor, Factor)
    whole = pack_solved(jnp.asarray(w), factor, format, config)
    monkeypatch.setattr("hsai.compress.solved.COLUMNS", columns)
    parts = pack_solved(jnp.asarray(w), factor, format, config)
    np.testing.assert_array_equal(parts.kept(), whole.kept())
    np.testing.assert_allclose(to_dense(parts), to_dense(whole), rtol=1e-4, atol=1e-5)


def test_outputs_that_are_solved_in_parts_keep_the_same_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as one program takes at a time, with the positions of all of them."""
    w, gram, _ = draw(10, 64, 20)
    format, config = OutliersConfig(base=Int4Config(group=32), share=3 / 64), FeedbackConfig()
    factor = find_factor(jnp.asarray(gram), format, config)
    assert isinstance(factor, Factor)
    whole = pack_solved(jnp.asarray(w), factor, format, config)
    monkeypatch.setattr("hsai.compress.solved.COLUMNS", 10)
    parts = pack_solved(jnp.asarray(w), factor, format, config)
    np.testing.assert_array_equal(parts.index, whole.index)
    np.testing.assert_allclose(to_dense(parts), to_dense(whole), rtol=1e-5)


@pytest.mark.parametrize("mask", ["wanda", "magnitude"])
def test_a_mask_of_another_takes_no_place_for_what_is_apart(mask: str) -> None:
    w, gram, _ = draw(9, 128, 16)
    w[10] *= 50
    format = OutliersConfig(base=UnstructuredConfig(density=0.5, block=128, dtype="float32"), share=1 / 128)
    config = FeedbackConfig(mask=mask)  # type: ignore[arg-type]
    factor = find_factor(jnp.asarray(gram), format, config)
    assert isinstance(factor, Factor)
    norms = measure_norms(jnp.asarray(np.diagonal(gram))) if mask == "wanda" else None
    packed = pack_solved(jnp.asarray(w), factor, format, config, norms)
    (apart,) = packed.index[:, 0].tolist()
    rest = np.abs(w if norms is None else w * np.sqrt(np.diagonal(gram))[:, None])
    rest[apart] = -1
    np.testing.assert_array_equal(packed.base.kept(), rest.argsort(axis=0).argsort(axis=0) >= 64)
