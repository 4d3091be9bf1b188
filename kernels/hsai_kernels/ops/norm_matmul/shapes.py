"""The shapes that every backend of norm_matmul is tested over."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormShape:
    """One product (lead..., D) @ (D, F)."""

    lead: tuple[int, ...]
    """Leading dimensions of the activations."""
    contraction: int
    """D."""
    columns: int
    """F."""


def _shape(lead: tuple[int, ...], contraction: int, columns: int) -> NormShape:
    return NormShape(lead=lead, contraction=contraction, columns=columns)


SHAPES = (
    _shape((), 1, 1),
    _shape((3,), 80, 7),
    _shape((2, 5), 128, 300),  # a ragged block of outputs
    _shape((40,), 256, 128),  # a ragged block of rows
)
"""Ragged, tiny and larger; the last two with a contraction that TPU tiles divide."""

LARGER = _shape((520,), 128, 600)
"""Two of the TPU kernel's own blocks of rows and of outputs, the second ones ragged."""
