"""What the accelerators' kernels for V:N:M weights share: the bits of choices become positions, and blocks are wide.

Both gather the activations that a block of V columns chose; what is left is a product with an N:4 weight.

Dimensions: D contraction, F output, V columns that choose 4 of every m positions together.
"""

import jax
import jax.numpy as jnp

CHOSEN = 4
"""Positions of a group that a block chooses."""

NARROWEST = 16
"""V at least: each block has activations of its own to gather, which so many columns have to be worth."""


def check_width(columns: int, blocks: int) -> None:
    """Raises NotImplementedError unless blocks have enough columns."""
    if columns // blocks < NARROWEST:
        raise NotImplementedError(
            f"multiplies V:N:M weights whose V is {NARROWEST} at least, not of {columns // blocks} columns a block"
        )


def take_group(word: jax.Array, start: jax.Array, m: int) -> jax.Array:
    """int32: the m bits of uint32 words from bit `start` on, a multiple of m."""
    bits = (word >> start.astype(jnp.uint32)).astype(jnp.int32)
    return bits if m == 32 else bits & (2**m - 1)


def find_places(bits: jax.Array, m: int) -> tuple[jax.Array, ...]:
    """4 times int32, ascending: the places from 0 to m - 1 of the first 4 bits that are set in int32 `bits`.

    Of fewer, which no format makes, the last place stands for the rest.
    """
    places = []
    for _ in range(CHOSEN):
        lowest = bits & -bits
        # As many ones as there are zeros below the lowest bit that is set.
        places.append(jnp.minimum(jax.lax.population_count(lowest - 1), m - 1))
        bits &= bits - 1
    return tuple(places)
