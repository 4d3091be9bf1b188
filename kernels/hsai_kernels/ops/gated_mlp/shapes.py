"""The shapes that every backend of gated_mlp is tested over."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpShape:
    """Activations (lead..., embed) through a block of `ffn` hidden ones."""

    lead: tuple[int, ...]
    """Leading dimensions of the activations."""
    embed: int
    """D."""
    ffn: int
    """F."""


def _shape(lead: tuple[int, ...], embed: int, ffn: int) -> MlpShape:
    return MlpShape(lead=lead, embed=embed, ffn=ffn)


SHAPES = (
    _shape((), 1, 1),
    _shape((3,), 40, 100),
    _shape((2, 5), 128, 300),  # a ragged block of the hidden activations
    _shape((40,), 256, 384),  # a ragged block of rows
)
"""Ragged, tiny and larger; the last two with an embedding that TPU tiles divide."""

LARGER = _shape((520,), 128, 600)
"""Two of the TPU kernel's own blocks of rows and of hidden activations, the second ones ragged."""
