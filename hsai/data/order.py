"""The order of training windows: a pure function of seed and step, in memory and time that depend on the batch alone.

A shuffled list of all windows would have to be kept, stored with each checkpoint, and agreed on by all hosts. Instead
each epoch applies its own keyed bijection of [0, count): a balanced Feistel network (Luby and Rackoff, "How to
construct pseudorandom permutations from pseudorandom functions", 1988) over the next even number of bits, walked until
it lands inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, section 3).
Any host can compute any step's windows, so resuming is to ask for the next step.

Changing anything here changes the data that a resumed run sees: the tests pin the output.
"""

import numpy as np

# Luby and Rackoff prove 3 rounds for large halves; small domains (a few bits a half) need more to look random.
_ROUNDS = 8
_MASK64 = 2**64 - 1


def window_indices(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """The windows of one training step: positions step*B .. step*B + B - 1 of the endless shuffled sequence.

    Each epoch, `count` positions in a row, holds every window once, in an order of its own; a batch may straddle two.

    Args:
      seed: any integer; another seed is another order.
      step: training step, counted from 0.
      batch_size: B, windows a step over all hosts.
      count: number of windows in the corpus.

    Returns:
      int64 (B,), values in [0, count).
    """
    if step < 0 or batch_size < 1 or count < 1:
        raise ValueError(f"step={step} must be >= 0, batch_size={batch_size} and count={count} >= 1")
    epoch, offset = divmod(step * batch_size, count)
    indices = np.empty(batch_size, np.int64)
    filled = 0
    while filled < batch_size:
        taken = min(batch_size - filled, count - offset)
        positions = np.arange(offset, offset + taken, dtype=np.uint64)
        indices[filled : filled + taken] = permute(positions, count, _mix(_mix(seed) ^ epoch))
        filled += taken
        epoch, offset = epoch + 1, 0
    return indices


def permute(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """Applies the bijection of [0, count) that `key` chooses: uint64 (B,) below `count` to int64 (B,) below `count`."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = [_mix(key + round_ + 1) for round_ in range(_ROUNDS)]
    values = _feistel(positions, half, keys)
    # The network permutes 4**half < 4 * count values; from inside [0, count), its cycle always returns there.
    while (outside := values >= count).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
    """Permutes uint64 values of 2*half bits."""
    mask = np.uint64(2**half - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, left ^ (_mix_array(right ^ np.uint64(key)) & mask)
    return (left << np.uint64(half)) | right


def _mix_array(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix(x: int) -> int:
    """splitmix64 of one integer, taken modulo 2**64."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
