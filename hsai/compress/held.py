"""What packing a weight would hold, without packing it: for training, which sees it anew in every step.

`pack_weight` makes words and positions; here are only the numbers behind them, from the same masks, scales and
rounding, as elementwise arithmetic that fuses and that a mesh splits.

D contraction, F outputs, G positions that share a scale.
"""

import jax
import jax.numpy as jnp

from hsai.compress.grid import grid_of, search_scale
from hsai.formats import FormatConfig, SparseConfig, TernaryConfig


def find_mask(w: jax.Array, format: FormatConfig) -> jax.Array | None:
    """What the format keeps of w (..., D, F) by magnitude, bool; None of one that keeps all."""
    return format.mask(w) if isinstance(format, SparseConfig) else None


def find_scale(w: jax.Array, format: FormatConfig, mask: jax.Array | None = None) -> jax.Array | None:
    """The scales (..., D / G, F) that the weight alone suggests, as they are stored; None of a format without.

    Of 8 bits the largest weight's, of ternary the mean magnitude, of others the best of a search: as `pack_weight`.
    """
    grid = grid_of(format)
    if grid is None:
        return None
    wide = w.astype(jnp.float32)
    wide = wide if mask is None else jnp.where(mask, wide, 0.0)
    groups = split_groups(wide, grid.group)
    if isinstance(format, TernaryConfig):
        scale = format.absmean_scale(wide)
    elif grid.high >= 127:  # a search would end there as well
        scale = jnp.max(jnp.abs(groups), axis=-2) / grid.high
    else:
        scale = search_scale(groups, 1.0, grid)[..., 0, :]
    return scale.astype(grid.dtype)


def hold(
    w: jax.Array, format: FormatConfig, *, mask: jax.Array | None = None, scale: jax.Array | None = None
) -> jax.Array:
    """The numbers that `format.pack(w, mask, scale)` stands for, float32 (..., D, F).

    Args:
      w: (..., D, F).
      format: which has a mask where one is given, and a scale where one is given.
      mask: bool (..., D, F), what is kept; everything by default.
      scale: (..., D / G, F), as it is stored.
    """
    wide = w.astype(jnp.float32)
    grid = grid_of(format)
    if grid is None:
        held = wide.astype(getattr(format, "dtype", "float32")).astype(jnp.float32)
    else:
        assert scale is not None, f"{format} needs a scale"
        held = grid.round(split_groups(wide, grid.group), scale[..., None, :]).reshape(w.shape)
    return held if mask is None else jnp.where(mask, held, 0.0)


def split_groups(w: jax.Array, group: int | None) -> jax.Array:
    """(..., D, F) -> (..., D / G, G, F); without a group, one of all D."""
    *stack, size, outputs = w.shape
    return w.reshape(*stack, -1, group or size, outputs)
