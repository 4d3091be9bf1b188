"""Latent weights: float32 values behind what a format holds of them, and how gradients come back to both.

What is held is a step function of the latent values, whose derivative is of no use; it is replaced:

  - rounding passes the gradient on as it is (straight-through). Where scales are found anew in each step they follow
    the weights, so that nothing stays clipped, and the same holds for what lies beyond the largest level (BitNet,
    2402.17764);
  - a learned scale is LSQ's (1902.08153, eqs. 3 and 5): what is clipped passes nothing to its weight and the level to
    the scale; what is not passes all to its weight and its rounding error to the scale. The gradient of the scale is
    divided by sqrt(G * highest level) (section 2.2). Levels that count from a minimum move with it, so that what is
    clipped passes all to the minimum, and what is not nothing (LSQ+, 2004.09576, eq. 6);
  - a mask that follows magnitudes passes the gradient to pruned weights as well, and pulls them towards zero (SR-STE,
    2102.04010, eq. 10), so that the choice settles; a fixed mask passes them nothing.

A scale is learned as its exponent, a logarithm: a step of an adaptive optimizer has the size of its learning rate,
whatever the gradient's, and must be a share of the scale (1903.08066, section 3.3 and appendix B). Between powers of
two it is taken as linear, which every program and every machine computes to the same bit; so the scale that is packed
is the one that was trained.

Which weights a fixed mask keeps needs no memory of its own: the others are exactly zero, and no update moves them.

L layers, D contraction, F outputs, G positions that share a scale.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from hsai.compress.grid import Grid, grid_of
from hsai.compress.held import find_mask, find_scale, hold, split_groups
from hsai.formats import FormatConfig, Packed, SparseConfig, Weight, is_packed_as, to_dense
from hsai.formats.packed import invert_scale

BARELY = 1e-30
"""In the place of a kept latent value of zero, where zeros say what is pruned: it rounds to zero, and can grow."""

BELOW = 0.9
"""Of the smallest magnitude that is kept of a group, what the largest that is pruned may have at the start, where
magnitudes then decide: below it, so that the first mask is the given one, and within reach of the first steps. Where
a zero was kept, all begin next to zero."""

SMALLEST_SCALE = 1e-30
"""Of a group of zeros: what has no scale has no exponent."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latent(Packed):
    """values float32 (..., D, F); exponent float32 (..., D / G, F), of the scale's magnitude (`to_scale`); minimum
    float32 (..., D / G, F), of a format that has minima; sign float32 (..., D / G, F), 1 or -1, of one whose scales may
    be negative, which stays what it was: its derivative is none."""

    values: jax.Array
    exponent: jax.Array
    minimum: jax.Array | None = None
    sign: jax.Array | None = None

    @classmethod
    def from_scale(cls, values: jax.Array, scale: jax.Array, grid: Grid, minimum: jax.Array | None = None) -> "Latent":
        """With a scale of the grid as it is stored, and a minimum, which `find_parts` then gives back."""
        sign = jnp.where(scale < 0, -1.0, 1.0).astype(jnp.float32) if grid.is_signed else None
        low = None if minimum is None else minimum.astype(jnp.float32)
        return cls(values, to_exponent(jnp.abs(scale)), low, sign)

    @property
    def scale(self) -> jax.Array:
        """Float32 (..., D / G, F)."""
        scale = to_scale(self.exponent)
        return scale if self.sign is None else self.sign * scale

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dense(self) -> jax.Array:
        return self.values


def to_scale(exponent: jax.Array) -> jax.Array:
    """2^floor(e) * (1 + e - floor(e)), float32: a power of two where e is whole, and linear in between."""
    whole = jnp.floor(exponent)
    return (1.0 + (exponent - whole)) * _power_of_two(whole)


def to_exponent(scale: jax.Array) -> jax.Array:
    """The inverse, exact for a scale of bfloat16 or float16."""
    mantissa, above = jnp.frexp(jnp.maximum(scale.astype(jnp.float32), SMALLEST_SCALE))
    return (above - 1).astype(jnp.float32) + (2.0 * mantissa - 1.0)


def _power_of_two(whole: jax.Array) -> jax.Array:
    bits = (jnp.clip(whole, -126, 127).astype(jnp.int32) + 127) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Straight:
    """How a latent weight is seen."""

    format: FormatConfig
    """What would hold it."""

    learned: bool
    """Whether scales are learned; otherwise they are found anew in every step."""

    fixed: bool
    """Whether what is zero stays pruned; otherwise magnitudes decide."""

    decay: float
    """Pull of pruned weights, where magnitudes decide."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """values float32 (..., D, F); mask bool (..., D, F), None where all is kept; scale (..., D / G, F) as it is stored,
    or (..., D / G, 2 F) with minima behind (`Grid.has_minimum`), None of a format without."""

    values: jax.Array
    mask: jax.Array | None
    scale: jax.Array | None


def begin_latent(value: Weight, how: Straight, dense: jax.Array | None = None) -> Weight:
    """A latent weight, float32 (..., D, F) or `Latent`, from a dense or packed one.

    What is packed in the format already hands on its scales where they are learned, and its mask where that is fixed:
    what is seen first is then what was packed. Otherwise they are found. Given the `dense` weight (..., D, F), a mask
    that magnitudes choose begins as the packed one too: behind what is pruned then stand dense values, as large as that
    allows (`_seed_pruned`), where zeros could not compete.
    """
    values = to_dense(value).astype(jnp.float32)
    solved = is_packed_as(value, how.format)
    seeds = dense if isinstance(how.format, SparseConfig) and not how.fixed else None
    if how.fixed or seeds is not None:
        mask = value.kept() if solved and isinstance(value, Packed) else find_mask(values, how.format)
        assert mask is not None, f"{how.format} prunes nothing"
        values = jnp.where(mask, jnp.where(values == 0, BARELY, values), 0.0)
        if seeds is not None:
            values = _seed_pruned(values, mask, seeds, how.format)
    if not how.learned:
        return values
    grid = grid_of(how.format)
    assert grid is not None, f"{how.format} has no scales"
    if solved:
        scale = getattr(value, "scale")  # noqa: B009 (of which class is not known here)
        return Latent.from_scale(values, scale, grid, getattr(value, "minimum", None))
    found = find_scale(values, how.format, _find_mask(values, how))
    assert found is not None
    scale, *minimum = jnp.split(found, 2, axis=-1) if grid.has_minimum else (found,)
    return Latent.from_scale(values, scale, grid, *minimum)


def find_parts(latent: Weight, how: Straight) -> Parts:
    """What `how.format.pack` is given for a latent weight: an array, or a `Latent` with its scale."""
    values = latent.values if isinstance(latent, Latent) else latent
    assert isinstance(values, jax.Array)
    mask = _find_mask(values, how)
    if isinstance(latent, Latent):
        grid = grid_of(how.format)
        assert grid is not None, f"{how.format} has no scales"
        scale = latent.scale
        if latent.minimum is not None:
            scale = jnp.concatenate([scale, latent.minimum], axis=-1)
        return Parts(values, mask, scale.astype(grid.dtype))
    return Parts(values, mask, find_scale(values, how.format, mask))


def _find_mask(values: jax.Array, how: Straight) -> jax.Array | None:
    return values != 0 if how.fixed else find_mask(values, how.format)


def _seed_pruned(kept: jax.Array, mask: jax.Array, dense: jax.Array, format: FormatConfig) -> jax.Array:
    """kept (..., D, F), not zero where the mask is, with dense values where it is not, of which those of a group are
    scaled down as one, just so far that `format.mask` of the result is the mask."""
    assert isinstance(format, SparseConfig)
    values = _lower(jnp.where(mask, kept, dense.astype(jnp.float32)), mask, format.counts[1], 1)
    if format.width == 1:
        return values
    # Before an output chooses, its block does, by sums: whatever no output of the block keeps must stay below as well.
    *stack, size, outputs = mask.shape
    used = jnp.any(mask.reshape(*stack, size, -1, format.width), axis=-1)
    return _lower(values, jnp.repeat(used, format.width, axis=-1), format.counts[1], format.width)


def _lower(values: jax.Array, firm: jax.Array, m: int, width: int) -> jax.Array:
    """values (..., D, F), those that are not firm (of `width` outputs all or none) scaled down: of every m positions,
    magnitudes summed over these outputs, their largest is then at most `BELOW` times the smallest of the firm ones."""
    *stack, size, outputs = values.shape
    blocks = (*stack, size // m, m, outputs // width, width)
    sums, stays = jnp.sum(jnp.abs(values.reshape(blocks)), axis=-1), firm.reshape(blocks)[..., 0]
    limit = BELOW * jnp.min(sums, axis=-2, keepdims=True, where=stays, initial=jnp.inf)
    most = jnp.max(sums, axis=-2, keepdims=True, where=~stays, initial=0.0)
    share = jnp.where(most > limit, limit / jnp.maximum(most, jnp.finfo(jnp.float32).tiny), 1.0)
    return jnp.where(firm, values, (values.reshape(blocks) * share[..., None]).reshape(values.shape))


def pull_pruned(latent: Weight, how: Straight, share: jax.Array | float) -> Weight:
    """The latent weight with what magnitudes prune of it nearer to zero by a share of itself; of a fixed mask, and of a
    format that keeps all, as it is."""
    values = latent.values if isinstance(latent, Latent) else latent
    assert isinstance(values, jax.Array)
    mask = None if how.fixed else find_mask(values, how.format)
    if mask is None:
        return latent
    pulled = jnp.where(mask, values, (1.0 - share) * values)
    return dataclasses.replace(latent, values=pulled) if isinstance(latent, Latent) else pulled


@functools.partial(jax.jit, static_argnames="how")
def pack_latent(latent: Weight, how: Straight) -> Weight:
    """The weight packed: of what `see_weight` gives, not a number changes."""

    def pack(parts: Parts) -> Weight:
        if parts.values.ndim > 2:  # layer by layer, as temporaries are larger than what is packed
            stacked: Weight = jax.lax.map(pack, parts)
            return stacked
        given = {"mask": parts.mask, "scale": parts.scale}
        packed: Weight = how.format.pack(parts.values, **{key: x for key, x in given.items() if x is not None})
        return packed

    return pack(find_parts(latent, how))


def see_weight(latent: Weight, how: Straight) -> jax.Array:
    """What the format holds of a latent weight, float32 (..., D, F); its derivative is the module's."""
    return _see(how, latent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _see(how: Straight, latent: Weight) -> jax.Array:
    parts = find_parts(latent, how)
    return hold(parts.values, how.format, mask=parts.mask, scale=parts.scale)


def _see_forward(how: Straight, latent: Weight) -> tuple[jax.Array, tuple[Weight, Parts]]:
    parts = find_parts(latent, how)
    return hold(parts.values, how.format, mask=parts.mask, scale=parts.scale), (latent, parts)


def _see_backward(how: Straight, saved: tuple[Weight, Parts], grad: jax.Array) -> tuple[Weight]:
    latent, parts = saved
    mask, d_values, learned = parts.mask, grad, None
    if isinstance(latent, Latent):
        grid = grid_of(how.format)
        assert grid is not None and parts.scale is not None
        kept = grad if mask is None else jnp.where(mask, grad, 0.0)
        d_kept, d_scale, d_minimum = _pull_back(kept, parts.values, parts.scale, grid)
        d_exponent = d_scale * _power_of_two(jnp.floor(latent.exponent))
        d_sign = None if latent.sign is None else jnp.zeros_like(latent.sign)
        learned = d_exponent if latent.sign is None else latent.sign * d_exponent, d_minimum, d_sign
        d_values = d_kept if mask is None else jnp.where(mask, d_kept, grad)
    if mask is not None:
        pruned = 0.0 if how.fixed else d_values + how.decay * parts.values
        d_values = jnp.where(mask, d_values, pruned)
    return (d_values if learned is None else Latent(d_values, *learned),)


_see.defvjp(_see_forward, _see_backward)


def _pull_back(
    grad: jax.Array, values: jax.Array, scale: jax.Array, grid: Grid
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """LSQ: the gradients of values (..., D, F), of scales (..., D / G, F), and of minima where there are any."""
    wide, start = scale.astype(jnp.float32)[..., None, :], jnp.float32(0)
    groups, by_group = split_groups(values, grid.group), split_groups(grad, grid.group)
    held = grid.round(groups, wide)
    if grid.has_minimum:
        wide, start = jnp.split(wide, 2, axis=-1)
    levels, level = (groups - start) * invert_scale(wide), (held - start) * invert_scale(wide)
    inside = (levels >= grid.low) & (levels <= grid.high)
    share = 1.0 / math.sqrt(groups.shape[-2] * grid.high)
    d_scale = share * jnp.sum(by_group * (level - jnp.where(inside, levels, 0.0)), axis=-2)
    d_minimum = share * jnp.sum(jnp.where(inside, 0.0, by_group), axis=-2) if grid.has_minimum else None
    return jnp.where(inside, by_group, 0.0).reshape(values.shape), d_scale, d_minimum
