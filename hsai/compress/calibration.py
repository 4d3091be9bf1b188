"""Which tokens calibration reads: windows drawn at random from a text, the same ones for the same seed."""

import dataclasses
import hashlib
import math

import numpy as np

from hsai.errors import InputError
from hsai.sharding import count_pieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How much text the solvers see."""

    tokens: int = 65_536
    """In all; a multiple of sequence_length."""

    sequence_length: int = 512
    """Tokens of a window; at most the model's longest text."""

    batch: int = 4
    """Windows that a layer is tuned on together, and that are on the devices at a time (a mesh: see `widen_batch`)."""

    seed: int = 0
    """Draws where windows begin."""

    def __post_init__(self) -> None:
        for name in ("tokens", "sequence_length", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"calibration.{name}={getattr(self, name)} must be at least 1")
        if self.tokens % self.sequence_length:
            raise InputError(
                f"calibration.tokens={self.tokens} must be a multiple of "
                f"calibration.sequence_length={self.sequence_length}"
            )
        if self.tokens // self.sequence_length % self.batch:
            raise InputError(
                f"calibration.batch={self.batch} must divide the {self.tokens // self.sequence_length} windows of "
                f"calibration.tokens={self.tokens}"
            )


def draw_windows(stream: np.ndarray, config: CalibrationConfig) -> np.ndarray:
    """Windows that do not overlap, int32 (N, T), from a stream of token ids.

    Raises:
      InputError: the stream is shorter than what is asked for.
    """
    available = len(stream) // config.sequence_length
    count = config.tokens // config.sequence_length
    if available < count:
        raise InputError(
            f"calibration.tokens={config.tokens} exceeds the text, which has {len(stream)} tokens "
            f"({available} windows of {config.sequence_length}); give more text, or ask for less"
        )
    chosen = np.sort(np.random.default_rng(config.seed).permutation(available)[:count])
    windows = np.stack([stream[i * config.sequence_length : (i + 1) * config.sequence_length] for i in chosen])
    return windows.astype(np.int32)


def widen_batch(batch: int, windows: int) -> int:
    """How many of `windows` are on the devices at a time: `batch`, or on a mesh its least multiple that the devices
    share evenly. Where the windows do not go into such batches, it stays, and every device works on all of it."""
    wide = math.lcm(batch, count_pieces("batch"))
    return batch if windows % wide else wide


def digest_windows(windows: np.ndarray) -> str:
    """SHA-256 of the calibration tokens, for the ledger."""
    return hashlib.sha256(np.ascontiguousarray(windows, "<i4").tobytes()).hexdigest()
