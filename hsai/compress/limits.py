"""What a format cannot hold: numbers too large for its scales, or for the arithmetic that looks for them.

Where a weight alone tells it, it is found before any work (`check_finite`, `check_range`). What a solver makes of a
weight is seen only afterwards, and so is what a program packed, in which the formats' own checks see no numbers
(`check_held`).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hsai.errors import InputError
from hsai.formats import FormatConfig, Int4OffsetConfig, OutliersConfig, Packed, Runs, Weight
from hsai.formats.int4_offset import HIGHEST_FLOAT16, span_groups


def check_range(name: str, w: Weight, formats: Sequence[FormatConfig]) -> None:
    """Refuses a weight that plain rounding to one of the formats could not hold.

    Args:
      name: of the weight in the model; where it is below `layers`, the first axis is that of layers.
      w: (..., D, F); what is packed already passes.
      formats: what it may become.
    Raises:
      InputError: the squares of a matrix, in which errors are measured, add up to more than float32 holds; a group
        needs a scale or a minimum beyond float16 where that is what the format stores.
    """
    if isinstance(w, Packed):
        return
    # A fourfold sum leaves room for the errors of what lies above the weights.
    squares = np.asarray(_measure_squares(w))
    if not np.isfinite(squares).all():
        place = _name_place(name, ~np.isfinite(squares))
        raise InputError(
            f"{place} holds {_find_largest(w):g}, and its squares add up to more than float32 holds (3.4e+38); "
            "compress an earlier checkpoint"
        )
    for format in formats:
        base = format.base if isinstance(format, OutliersConfig) else format
        if isinstance(base, Int4OffsetConfig):
            needed = np.asarray(_measure_span(w, base.group))
            if (needed > HIGHEST_FLOAT16).any():
                raise InputError(
                    f"{_name_place(name, needed > HIGHEST_FLOAT16)}: {base.format} stores scales and minima as "
                    f"float16, at most {HIGHEST_FLOAT16:g}, and this weight needs {float(needed.max()):g}; "
                    "give it another format"
                )


def check_finite(name: str, value: Weight) -> None:
    """Raises `InputError` if a weight of a model holds a NaN or an infinity, naming the first layer that does."""
    bad = count_lost(value)
    if bad:
        layer = _find_layer(name, value)
        raise InputError(
            f"{name}{'' if layer is None else f', layer {layer},'} holds {bad} values that are NaN or infinite, of "
            f"{math.prod(value.shape)}; compress an earlier checkpoint"
        )


def check_held(name: str, w: jax.Array, packed: Weight) -> None:
    """Raises `InputError` if a packed weight holds a NaN or an infinity; w (..., D, F) is what it was packed from,
    below `layers` with an axis of them."""
    lost = count_lost(packed)
    if not lost:
        return
    layer = _find_layer(name, packed)
    if layer is not None:
        name, w = f"{name}, layer {layer}", w[layer]
    raise InputError(
        f"{name}: packing gave {lost} scales or values that are NaN or infinite, of a weight whose largest number is "
        f"{_find_largest(w):g}; give it another format"
    )


def _find_layer(name: str, value: Weight) -> int | None:
    """The first layer of a stack (L, ...) with a number that is NaN or infinite; None of what is no stack."""
    if not name.startswith("layers."):
        return None
    runs = zip(value.starts, value.parts, strict=True) if isinstance(value, Runs) else [(0, value)]
    return next(
        first + layer
        for first, part in runs
        for layer in range(part.shape[0])
        if count_lost(jax.tree.map(lambda leaf, at=layer: leaf[at], part))
    )


def count_lost(value: Any) -> int:
    """How many numbers of a pytree's floating arrays are NaN or infinite."""
    return int(sum_lost(value))


@jax.jit
def sum_lost(value: Any) -> jax.Array:
    """`count_lost` as int32 (), for programs."""
    floating = [leaf for leaf in jax.tree.leaves(value) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum((jnp.sum(~jnp.isfinite(leaf)) for leaf in floating), start=jnp.int32(0))


@jax.jit
def _measure_squares(w: jax.Array) -> jax.Array:
    return 4.0 * jnp.sum(jnp.square(w.astype(jnp.float32)), axis=(-2, -1))


@jax.jit
def _find_largest(w: jax.Array) -> jax.Array:
    """The number of largest magnitude, with its sign, float32 ()."""
    flat = w.reshape(-1).astype(jnp.float32)
    return flat[jnp.argmax(jnp.abs(flat))]


@functools.partial(jax.jit, static_argnames="group")
def _measure_span(w: jax.Array, group: int) -> jax.Array:
    """The largest scale or minimum of each matrix, (...)."""
    return jnp.max(jnp.abs(span_groups(w.astype(jnp.float32), group)), axis=(-2, -1))


def _name_place(name: str, bad: np.ndarray) -> str:
    """The weight, and the first of its layers and experts that is bad, of bool (), (L,), (E,) or (L, E)."""
    first = [int(index) for index in np.argwhere(bad)[0]]
    words = ("layer", "expert") if name.startswith("layers.") else ("expert",)
    return ", ".join([name, *(f"{word} {index}" for word, index in zip(words, first, strict=False))])
