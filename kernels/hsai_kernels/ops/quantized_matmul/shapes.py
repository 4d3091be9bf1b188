"""The shapes that every backend of quantized_matmul is tested over."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedShape:
    """One product (lead..., D) @ (D, F) whose scales are shared by `group` positions of the contraction."""

    lead: tuple[int, ...]
    """Leading dimensions of the activations; their product is the number of rows."""
    contraction: int
    """D."""
    columns: int
    """F."""
    group: int
    """Positions that share a scale."""


def _shape(lead: tuple[int, ...], contraction: int, columns: int, group: int) -> QuantizedShape:
    return QuantizedShape(lead=lead, contraction=contraction, columns=columns, group=group)


SHAPES = (
    _shape((1,), 8, 1, 8),  # the smallest int4 product
    _shape((), 32, 7, 32),  # no leading dimension
    _shape((1, 1), 64, 100, 32),
    _shape((2,), 96, 16, 32),
    _shape((3,), 128, 257, 64),
    _shape((2, 2), 256, 31, 128),
    _shape((5,), 40, 65, 40),  # blocks that a group does not fill
    _shape((8,), 512, 1000, 512),  # one scale a column
    _shape((1,), 512, 2085, 32),  # several tiles and an overlapping last one
    _shape((4, 6), 64, 33, 16),  # more rows than decoding has
)
"""Ragged, tiny and larger; divisible as int4 needs it."""

HUGE = _shape((1,), 16384, 512, 16384)
"""As long a sum as models have, under one scale a column; for backends that run, not for interpreters."""
