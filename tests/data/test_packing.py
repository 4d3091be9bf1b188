"""Packing: rows restore the stream, and keep documents apart."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hsai.data.packing import count_windows, pack_windows

EOT = 0
streams = st.lists(st.integers(0, 5), min_size=2, max_size=200).map(lambda ids: np.array([EOT, *ids], np.uint16))
lengths = st.integers(1, 40)


@given(stream=streams, length=lengths)
def test_full_windows_restore_the_stream(stream: np.ndarray, length: int):
    count = count_windows(len(stream), length)
    batch = pack_windows(stream, np.arange(count), length, EOT)
    assert (batch.tokens.reshape(-1) == stream[: count * length]).all()
    assert (batch.targets.reshape(-1) == stream[1 : count * length + 1]).all()
    assert (batch.weights == 1).all()
    assert 0 <= len(stream) - 1 - count * length < length


@given(stream=streams, length=lengths, more=st.integers(0, 3))
def test_padded_windows_hold_every_target_once(stream: np.ndarray, length: int, more: int):
    count = count_windows(len(stream), length, partial=True)
    batch = pack_windows(stream, np.arange(count + more), length, EOT)
    counted = batch.weights == 1
    assert (batch.targets[counted] == stream[1:]).all()
    assert (batch.tokens[counted] == stream[:-1]).all()
    assert (batch.weights[~counted] == 0).all()


@given(stream=streams, length=lengths)
def test_segments_and_positions_against_a_loop(stream: np.ndarray, length: int):
    batch = pack_windows(stream, np.arange(count_windows(len(stream), length)), length, EOT)
    for row in range(len(batch.tokens)):
        segment, position = 0, 0
        for column, token in enumerate(batch.tokens[row]):
            if token == EOT and column > 0:
                segment, position = segment + 1, 0
            assert (batch.segments[row, column], batch.positions[row, column]) == (segment, position)
            position += 1


def test_an_example():
    stream = np.array([0, 5, 6, 0, 7, 8, 9, 0, 4], np.uint16)
    batch = pack_windows(stream, np.array([1, 0, 2]), 4, EOT)
    assert batch.tokens.tolist() == [[7, 8, 9, 0], [0, 5, 6, 0], [4, 0, 0, 0]]
    assert batch.targets.tolist() == [[8, 9, 0, 4], [5, 6, 0, 7], [0, 0, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 1, 2, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_types_and_pytree():
    batch = pack_windows(np.arange(20, dtype=np.uint16), np.array([0, 1]), 8, EOT)
    leaves = jax.tree.leaves(batch)
    assert [leaf.dtype.name for leaf in leaves] == ["int32"] * 4 + ["float32"]
    assert all(leaf.shape == (2, 8) for leaf in leaves)
    doubled = jax.jit(lambda b: jax.tree.map(lambda x: 2 * x, b))(batch)
    assert (doubled.targets == 2 * batch.targets).all()


def test_counts():
    assert [count_windows(n, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]
    assert [count_windows(n, 4, partial=True) for n in (0, 1, 2, 5, 6)] == [0, 0, 1, 1, 2]
