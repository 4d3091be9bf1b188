"""The shapes that every backend of rope is tested over: (..., T, N, H)."""

SHAPES = ((1, 1, 2), (2, 5, 3, 8), (1, 17, 2, 80), (3, 4, 1, 128), (2, 1, 9, 4, 64))
"""Tiny, ragged, and the head dims of common models; without, with one and with two leading dimensions."""
