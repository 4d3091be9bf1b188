"""From token files to global batches on a mesh.

Step k's batch is a pure function of the corpus, the seed and k. So resuming needs no state but the step, and each
process reads only the rows that its own devices hold.

Dimensions: B batch over all processes, T sequence length.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from hsai.data.corpus import Corpus, DataConfig
from hsai.data.order import window_indices
from hsai.data.packing import Batch, count_windows, pack_windows
from hsai.data.prefetch import prefetch
from hsai.errors import InputError


class Loader:
    """Batches of a corpus for one sharding.

    Attributes:
      window_count: windows of T targets in the training tokens: one epoch.
    """

    def __init__(
        self, corpus: Corpus, config: DataConfig, *, batch_size: int, sharding: jax.sharding.Sharding, seed: int
    ):
        """Prepares; reads no tokens.

        Args:
          corpus: what `build_corpus` gave.
          config: `sequence_length` and `prefetch` are read.
          batch_size: B.
          sharding: of an array (B, T).
          seed: of the order of training windows.

        Raises:
          InputError: the training tokens do not fill one window, or B and T do not divide over the devices.
        """
        self.window_count = count_windows(len(corpus.train), config.sequence_length)
        if self.window_count == 0:
            raise InputError(
                f"data.sequence_length={config.sequence_length} does not fit: the corpus has {len(corpus.train)} "
                f"training tokens, so at most {len(corpus.train) - 1} is valid"
            )
        _check_divides((batch_size, config.sequence_length), sharding)
        self._corpus = corpus
        self._config = config
        self._batch_size = batch_size
        self._sharding = sharding
        self._seed = seed

    def batch(self, step: int) -> Batch:
        """The batch of training step `step` (from 0): global arrays (B, T) with the loader's sharding."""
        indices = window_indices(self._seed, step, self._batch_size, self.window_count)
        return self._place(self._corpus.train, indices)

    def iterate(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Batches of steps start_step .. stop_step - 1, each read while the one before is used.

        Starting at k gives what a run that started at 0 would see from step k on.
        """
        if not 0 <= start_step <= stop_step:
            raise ValueError(f"start_step={start_step} must be between 0 and stop_step={stop_step}")
        return prefetch((self.batch(step) for step in range(start_step, stop_step)), self._config.prefetch)

    def evaluation_batches(self, max_tokens: int | None = None) -> Iterator[Batch]:
        """The held-out tokens once, in order, in full batches; padding has weight 0.

        Args:
          max_tokens: stop after this many targets. Held-out files lie in a random order, so a part is a fair sample.
        """
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens} must be at least 1")
        stream = self._corpus.heldout if max_tokens is None else self._corpus.heldout[: max_tokens + 1]
        windows = count_windows(len(stream), self._config.sequence_length, partial=True)
        starts = range(0, windows, self._batch_size)
        # Indices past the last window are rows of padding.
        rows = (np.arange(start, start + self._batch_size, dtype=np.int64) for start in starts)
        return prefetch((self._place(stream, indices) for indices in rows), self._config.prefetch)

    def _place(self, stream: np.ndarray, indices: np.ndarray) -> Batch:
        """Windows `indices` (B,) of `stream` as global arrays."""
        shape = (self._batch_size, self._config.sequence_length)
        packed: dict[tuple[int, int], Batch] = {}

        def rows(start: int, stop: int) -> Batch:
            if (start, stop) not in packed:
                windows = indices[start:stop]
                packed[start, stop] = pack_windows(stream, windows, shape[1], self._corpus.tokenizer.eot)
            return packed[start, stop]

        def place(name: str) -> jax.Array:
            def read(index: tuple[slice, ...] | None) -> np.ndarray:
                by_row, by_column = index or (slice(None), slice(None))
                start, stop, _ = by_row.indices(shape[0])
                return getattr(rows(start, stop), name)[:, by_column]

            return jax.make_array_from_callback(shape, self._sharding, read)

        return Batch(**{field.name: place(field.name) for field in dataclasses.fields(Batch)})


def _check_divides(shape: tuple[int, int], sharding: jax.sharding.Sharding) -> None:
    """Refuses a global (B, T) that the sharding cannot cut into equal parts, naming the numbers."""
    if shape[0] < 1:
        raise InputError(f"batch_size={shape[0]} must be at least 1")
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return
    for name, size, axes in zip(("batch_size", "data.sequence_length"), shape, sharding.spec, strict=False):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        parts = int(np.prod([sharding.mesh.shape[axis] for axis in names], dtype=np.int64))
        if size % parts:
            raise InputError(f"{name}={size} does not divide over the {parts} parts of mesh axes {', '.join(names)}")
