"""The order: every window once an epoch, a pure function of seed and step, and pinned."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.data.order import permute, window_indices


def sequence(seed: int, batch_size: int, count: int, steps: int) -> np.ndarray:
    return np.concatenate([window_indices(seed, step, batch_size, count) for step in range(steps)])


@settings(max_examples=150)
@given(seed=st.integers(), batch_size=st.integers(1, 40), count=st.integers(1, 300))
def test_each_epoch_holds_every_window_once(seed: int, batch_size: int, count: int):
    steps = -(-3 * count // batch_size)
    order = sequence(seed, batch_size, count, steps)
    assert order.dtype == np.int64
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(count=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(count: int, key: int):
    assert sorted(permute(np.arange(count, dtype=np.uint64), count, key)) == list(range(count))


@given(seed=st.integers(0, 2**40), split=st.integers(1, 8))
def test_batch_size_only_groups_the_sequence(seed: int, split: int):
    assert (sequence(seed, split, 101, 40) == sequence(seed, 1, 101, 40 * split)).all()


def test_epochs_and_seeds_differ():
    epochs = sequence(7, 500, 500, 4).reshape(4, 500)
    others = sequence(8, 500, 500, 4).reshape(4, 500)
    rows = [*epochs, *others, np.arange(500)]
    for i, first in enumerate(rows):
        for second in rows[i + 1 :]:
            assert (first == second).sum() < 12  # two random orders agree in one place, on average


@pytest.mark.parametrize("count", [2, 3, 7, 64])
def test_small_epochs_are_uniform(count: int):
    # The first place of 3000 epochs: a chi-square, 4 standard deviations above its mean at most.
    first = np.array([window_indices(0, step * count, 1, count)[0] for step in range(3000)])
    seen = np.bincount(first, minlength=count)
    expected = 3000 / count
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert chi_square < (count - 1) + 4 * np.sqrt(2 * (count - 1)) + 4


def test_neighbours_are_scattered():
    order = sequence(3, 1000, 1000, 1)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.12
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.12


def test_huge_corpora_cost_no_more():
    indices = window_indices(1, 10**15, 64, 2**45 + 3)
    assert len(set(indices.tolist())) == 64 and indices.min() >= 0 and indices.max() < 2**45 + 3


def test_the_order_is_pinned():
    # Another result means that resumed runs see other data: do not adjust, mend.
    assert window_indices(0, 0, 8, 1000).tolist() == [264, 834, 325, 56, 294, 50, 178, 501]
    assert window_indices(42, 123, 8, 37).tolist() == [8, 22, 11, 28, 20, 4, 12, 24]


@pytest.mark.parametrize("step, batch_size, count", [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_senseless_arguments_are_refused(step: int, batch_size: int, count: int):
    with pytest.raises(ValueError, match=f"step={step} .* batch_size={batch_size} and count={count}"):
        window_indices(0, step, batch_size, count)
