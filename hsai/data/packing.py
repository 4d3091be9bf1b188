"""From one stream of tokens to rows of equal length.

Documents, each led by the end-of-text token, lie end to end in the stream. Window i covers stream[i*T : i*T + T + 1]:
neighbours share one token, so that every token of the stream but the first is predicted exactly once. A row may hold
the end of one document and the beginning of others; `segments` keep attention inside a document, and `positions`
restart with each.

Dimensions: B batch, T sequence length.
"""

import dataclasses
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What a training or evaluation step reads."""

    tokens: jax.Array
    """int32 (B, T), the input."""

    targets: jax.Array
    """int32 (B, T), the token that follows each input token."""

    segments: jax.Array
    """int32 (B, T), which document of its row a token belongs to, counted from 0."""

    positions: jax.Array
    """int32 (B, T), place of a token inside its document's part of the row, from 0."""

    weights: jax.Array
    """float32 (B, T), 1 where the target counts, 0 in padding."""


def count_windows(length: int, sequence_length: int, *, partial: bool = False) -> int:
    """How many windows a stream of `length` tokens holds; `partial` also counts a last, shorter one."""
    targets = max(0, length - 1)
    return -(-targets // sequence_length) if partial else targets // sequence_length


def pack_windows(stream: np.ndarray, indices: np.ndarray, sequence_length: int, eot: int) -> Batch:
    """Cuts the windows `indices` out of `stream`, in host memory.

    What lies beyond the end of the stream (the rest of the last window, or a whole row) is padding: end-of-text tokens,
    each a document of its own, with weight 0.

    Args:
      stream: unsigned (tokens,), may be memory-mapped: only the windows asked for are read.
      indices: int64 (B,), not negative.
      sequence_length: T.
      eot: id of the end-of-text token.
    """
    windows = np.full((len(indices), sequence_length + 1), eot, np.int32)
    weights = np.zeros((len(indices), sequence_length), np.float32)
    for row, index in enumerate(indices):
        start = int(index) * sequence_length
        found = stream[start : start + sequence_length + 1]
        windows[row, : len(found)] = found
        weights[row, : max(0, len(found) - 1)] = 1
    tokens, targets = windows[:, :-1], windows[:, 1:]
    begins = tokens == eot
    # A row that opens in the middle of a document opens segment 0 all the same.
    begins[:, 0] = True
    offsets = np.arange(sequence_length, dtype=np.int32)
    positions = offsets - np.maximum.accumulate(np.where(begins, offsets, 0), axis=1)
    # NumPy arrays, until the loader has put them on devices.
    fields: dict[str, Any] = {
        "tokens": np.ascontiguousarray(tokens),
        "targets": np.ascontiguousarray(targets),
        "segments": np.cumsum(begins, axis=1, dtype=np.int32) - 1,
        "positions": positions.astype(np.int32),
        "weights": weights,
    }
    return Batch(**fields)
