"""The shapes that every backend of cross_entropy is tested over."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropyShape:
    """Tokens (lead..., tokens, embed) against a vocabulary (embed, vocab)."""

    lead: tuple[int, ...]
    """Leading dimensions, which blocks of tokens do not cross."""
    tokens: int
    """T."""
    embed: int
    """D."""
    vocab: int
    """V."""


def _shape(lead: tuple[int, ...], tokens: int, embed: int, vocab: int) -> CrossEntropyShape:
    return CrossEntropyShape(lead=lead, tokens=tokens, embed=embed, vocab=vocab)


SHAPES = (
    _shape((), 1, 1, 1),  # one token, one word: the loss is zero
    _shape((), 5, 7, 3),
    _shape((2, 1), 9, 16, 50),
    _shape((3,), 33, 64, 257),
    _shape((), 40, 128, 384),  # whole tiles of vocabulary
    _shape((2,), 17, 256, 1000),  # several blocks of tokens and vocabulary, the last ones ragged
)
"""Ragged, tiny and larger; the last two with an embedding that TPU tiles divide."""

HUGE = _shape((), 600, 16, 20000)
"""More than a block of tokens and of vocabulary as backends cut them by themselves; not for interpreters."""
