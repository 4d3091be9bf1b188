"""The shapes that every backend of attention is tested over."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Queries (batch, queries, heads, head_dim) over keys (batch, keys, kv_heads, head_dim)."""

    batch: int
    """B."""
    queries: int
    """T."""
    keys: int
    """S."""
    heads: int
    """N."""
    kv_heads: int
    """K."""
    head_dim: int
    """H."""


def _shape(batch: int, queries: int, keys: int, heads: int, kv_heads: int, head_dim: int) -> AttentionShape:
    return AttentionShape(batch=batch, queries=queries, keys=keys, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


SHAPES = (
    _shape(1, 1, 1, 1, 1, 8),
    _shape(2, 7, 7, 4, 4, 16),
    _shape(2, 1, 33, 6, 2, 64),  # decoding over a cache
    _shape(1, 13, 13, 8, 1, 80),  # multi-query
    _shape(1, 5, 17, 3, 3, 128),  # a chunk of a prompt
    _shape(1, 16, 16, 2, 1, 256),
)
"""Ragged, tiny and larger; the head dims of common models."""

HUGE = _shape(1, 1, 32768, 2, 1, 64)
"""Decoding at the end of a long context; for backends that run, not for interpreters."""
