"""The shapes that every backend of sparse_matmul is tested over."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseShape:
    """One product (lead..., D) @ (D, F) that keeps n of m, in int4 with a scale for each `group` dense positions."""

    lead: tuple[int, ...]
    """Leading dimensions of the activations; their product is the number of rows."""
    contraction: int
    """D."""
    columns: int
    """F."""
    kept: int
    """n: of m, or of the 4 that a block chooses."""
    group: int
    """Dense positions that share a scale."""
    pattern: int = 4
    """m: 4 or 8; of V:N:M, positions of which a block of columns chooses 4."""
    width: int = 0
    """V: columns of a block, 0 without."""


def _shape(lead: tuple[int, ...], contraction: int, columns: int, kept: int, group: int) -> SparseShape:
    return SparseShape(lead=lead, contraction=contraction, columns=columns, kept=kept, group=group)


SHAPES = (
    _shape((1,), 32, 1, 2, 32),  # the smallest 2:4 product
    _shape((), 64, 7, 1, 32),  # no leading dimension
    _shape((1, 1), 64, 100, 3, 32),  # a scale group of 24 kept elements: one and a half index words
    _shape((2,), 96, 16, 2, 32),
    _shape((3,), 128, 257, 2, 64),
    _shape((2, 2), 256, 31, 1, 128),
    _shape((5,), 192, 65, 3, 64),
    _shape((8,), 512, 500, 2, 512),  # one scale a column
    _shape((1,), 256, 2085, 2, 32),  # several tiles and an overlapping last one
    _shape((4, 6), 64, 33, 2, 16),  # more rows than decoding has
)
"""Ragged, tiny and larger; divisible as packed indices need it."""

EIGHTHS = (
    SparseShape(lead=(1,), contraction=64, columns=1, kept=4, group=64, pattern=8),  # the smallest 4:8 product
    SparseShape(lead=(), contraction=256, columns=7, kept=1, group=64, pattern=8),  # groups of one word of values
    SparseShape(lead=(2, 1), contraction=128, columns=100, kept=2, group=32, pattern=8),
    SparseShape(lead=(3,), contraction=192, columns=257, kept=4, group=48, pattern=8),  # 24 kept elements a group
    SparseShape(lead=(8,), contraction=512, columns=65, kept=2, group=512, pattern=8),  # one scale a column
    SparseShape(lead=(1,), contraction=512, columns=2085, kept=1, group=256, pattern=8),  # several tiles
    SparseShape(lead=(5,), contraction=256, columns=2085, kept=4, group=64, pattern=8),
    SparseShape(lead=(4, 6), contraction=64, columns=33, kept=4, group=16, pattern=8),  # more rows than decoding has
)
"""The same for 8 positions a group."""

BLOCKED_SHAPES = (
    SparseShape(lead=(1,), contraction=128, columns=16, kept=2, group=64, pattern=8, width=16),  # one block
    SparseShape(lead=(3,), contraction=256, columns=48, kept=1, group=128, pattern=8, width=16),
    SparseShape(lead=(2, 2), contraction=512, columns=128, kept=3, group=256, pattern=16, width=64),
    SparseShape(lead=(), contraction=512, columns=96, kept=2, group=512, pattern=32, width=48),
    SparseShape(
        lead=(1,), contraction=256, columns=2112, kept=2, group=64, pattern=8, width=2112
    ),  # a block of several tiles
    SparseShape(lead=(9,), contraction=128, columns=4160, kept=2, group=32, pattern=8, width=32),  # several tiles
    SparseShape(
        lead=(5,), contraction=1280, columns=240, kept=3, group=128, pattern=16, width=80
    ),  # blocks that straddle tiles; groups of one and a half index words
    SparseShape(lead=(17,), contraction=1024, columns=208, kept=1, group=256, pattern=32, width=16),  # more rows
)
"""The same for V:N:M."""

HUGE = (
    _shape((1,), 16384, 128, 2, 16384),
    SparseShape(lead=(1,), contraction=16384, columns=128, kept=4, group=16384, pattern=8),
    SparseShape(lead=(1,), contraction=16384, columns=128, kept=2, group=16384, pattern=8, width=64),
)
"""As long sums as models have, under one scale a column; for backends that run, not for interpreters."""
