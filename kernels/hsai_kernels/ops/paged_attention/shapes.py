"""The shapes that every backend of paged_attention is tested over."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedShape:
    """Queries (B, queries, heads, head_dim) at the ends of rows of these lengths, in pages of `page` tokens."""

    lengths: tuple[int, ...]
    """Tokens of each row; B of them."""
    row_pages: int
    """M."""
    page: int
    """R."""
    queries: int
    """T; of shorter rows the first ones stand before the beginning, and see nothing."""
    heads: int
    """N."""
    kv_heads: int
    """K."""
    head_dim: int
    """H."""


SHAPES = (
    PagedShape(lengths=(1, 16, 37, 0), row_pages=4, page=16, queries=1, heads=6, kv_heads=2, head_dim=64),
    PagedShape(lengths=(70, 200, 129), row_pages=4, page=64, queries=1, heads=2, kv_heads=1, head_dim=20),
    PagedShape(lengths=(23, 5), row_pages=9, page=3, queries=7, heads=4, kv_heads=4, head_dim=8),
    PagedShape(lengths=(131,), row_pages=3, page=64, queries=70, heads=3, kv_heads=1, head_dim=33),
    PagedShape(lengths=(1100, 900), row_pages=5, page=256, queries=2, heads=2, kv_heads=1, head_dim=16),
)
"""Decoding over pages of any size, a row without tokens, chunks of a prompt, long rows."""

LARGER = PagedShape(lengths=(1100, 530), row_pages=18, page=64, queries=520, heads=2, kv_heads=1, head_dim=16)
"""More than a block of queries and of keys as backends cut them by themselves, the last of each kind ragged."""
