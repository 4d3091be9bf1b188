"""Rounding to int8 and int4: to the nearest code, under scales that make the rounding error small.

A scale that reaches the largest weight of its group spends codes on one outlier. For 4 bits the scale is searched: from
that of the largest weight downwards, in small steps, keeping for each group the one of least squared error; what lies
beyond is clipped. That takes 9 to 14 % off the error norm of normal, Laplace and Student-t weights in groups of 32 to
128. For 8 bits the same search ends at the largest weight for all of them, and the plain scale stays.

D contraction, F outputs, L stacked layers.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from hsai.compress import grid
from hsai.formats import Int4, Int4Config, Int8, Int8Config

T = TypeVar("T")

INT4 = grid.Grid(low=-8, high=7, group=None, dtype="bfloat16")
# Of normal weights the best share has the median 0.90 in groups of 32 and 0.84 in groups of 128. The first is 1, which
# wins a tie and keeps representable weights exact.
CLIP_RATIOS = INT4.ratios


def round_int8(w: jax.Array, config: Int8Config) -> Int8:
    """(D, F) or stacked (L, D, F), float -> int8 with the scale of each output's largest weight."""
    return map_layers(config.pack, w)


def round_int4(w: jax.Array, config: Int4Config) -> Int4:
    """(D, F) or stacked (L, D, F), float -> int4 with searched scales."""
    return map_layers(lambda layer: config.pack(layer, search_scale(layer, config.group)), w)


def search_scale(w: jax.Array, group: int) -> jax.Array:
    """The int4 scale of each group that rounds it with the least squared error: (D, F) -> bfloat16 (D / group, F)."""
    groups = w.astype(jnp.float32).reshape(-1, group, w.shape[-1])
    return grid.search_scale(groups, 1.0, INT4)[:, 0]


def map_layers(pack: Callable[[jax.Array], T], w: jax.Array) -> T:
    """`pack` of (D, F), or of each layer of (L, D, F) one after the other: temporaries are those of one layer."""
    return pack(w) if w.ndim == 2 else jax.lax.map(lambda layer: map_layers(pack, layer), w)
