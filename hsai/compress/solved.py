"""One weight solved over calibration, and packed: the factor of what it is multiplied by, what its format keeps apart,
and its outputs some at a time (`hsai.compress.solver`).

D contraction, F outputs.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hsai.compress.factor import factorize
from hsai.compress.grid import grid_of, pattern_of
from hsai.compress.limits import sum_lost
from hsai.compress.solver import order_positions, solve
from hsai.compress.solvers import FeedbackConfig, MaskName
from hsai.formats import FormatConfig, Outliers, OutliersConfig, SparseConfig, Weight, to_dense

COLUMNS = 16384
"""Outputs that are solved at a time, or the next fewer that those with a choice in common divide."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor:
    """What error feedback runs on."""

    upper: jax.Array
    """U (D, D) float32, of `factorize`; of the Gram matrix in `order`."""

    damping: float
    """What it took."""

    order: jax.Array | None
    """In which positions are solved, int32 (D,); None as they stand."""


def pack_solved(
    w: jax.Array, factor: Factor, format: FormatConfig, config: FeedbackConfig, norms: jax.Array | None = None
) -> Weight:
    """One weight (D, F) in its format, solved over the activations whose factor this is; `norms` (D, 1) are those of
    `measure_norms`, where masks go by them.

    Raises:
      FloatingPointError: what was solved holds a NaN or an infinity, as its scales may where feedback runs away.
    """
    # Outputs are solved each for itself; a head's are too many for one program's memory. What is kept apart, all share.
    base = format.base if isinstance(format, OutliersConfig) else format
    shared = base.width if isinstance(base, SparseConfig) else 1
    width = max(COLUMNS // shared, 1) * shared
    columns = jnp.split(w, list(range(width, w.shape[-1], width)), axis=-1)
    index = find_outliers(columns, factor, format) if isinstance(format, OutliersConfig) else None
    parts = []
    for part in columns:
        packed, lost = _pack_columns(part, norms, factor.upper, factor.order, index, format=format, mask=config.mask)
        if lost:
            fault = f"solving gave {lost} values and scales that are NaN or infinite, of {part.size} weights"
            raise FloatingPointError(fault)
        parts.append(packed)
    joined: Weight = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *parts)
    if index is None:
        return joined
    assert isinstance(joined, Outliers)
    return dataclasses.replace(joined, index=index[:, None])


@functools.partial(jax.jit, static_argnames=("format", "mask"))
def _pack_columns(
    w: jax.Array,
    norms: jax.Array | None,
    upper: jax.Array,
    order: jax.Array | None,
    index: jax.Array | None,
    *,
    format: FormatConfig,
    mask: MaskName,
) -> tuple[Weight, jax.Array]:
    """Some outputs of a weight, (D, F), and how many values and scales were lost; `index` (k,) is what a format with
    outliers keeps apart."""
    base = format.base if isinstance(format, OutliersConfig) else format
    apart = None if index is None else jnp.zeros(w.shape[0], bool).at[index].set(True)
    given = None
    if isinstance(base, SparseConfig) and mask != "joint":
        scores = w if norms is None else w * norms
        given = base.mask(scores if apart is None else jnp.where(apart[:, None], 0.0, scores))
    grid, pattern = grid_of(format), pattern_of(format)
    solved = solve(w, upper, grid=grid, pattern=pattern, mask=given, order=order, apart=apart)
    lost = sum_lost((solved.values, solved.scale))
    words = {} if pattern is None else {"mask": solved.mask}
    words |= {} if solved.scale is None else {"scale": solved.scale}
    if index is None or not isinstance(format, OutliersConfig):
        return base.pack(solved.values, **words), lost
    return format.join(solved.values, index, format.base.pack(format.rest(solved.values, index), **words)), lost


def find_outliers(columns: Sequence[jax.Array], factor: Factor, format: OutliersConfig) -> jax.Array:
    """The positions of a weight, given as parts (D, F), whose errors cost most, were they in the base like all others:
    int32 (k,), ascending.

    An error of position i costs e^2 / U_ii^2 of the squared output error (2306.03078, eq. 2), summed over outputs.
    """
    missed = sum(jnp.sum(jnp.square(w - to_dense(format.base.pack(w))), axis=-1) for w in columns)
    diagonal = jnp.diagonal(factor.upper)
    diagonal = diagonal if factor.order is None else diagonal[jnp.argsort(factor.order)]
    return format.find(missed / jnp.square(diagonal))


def find_factor(
    gram: jax.Array, format: FormatConfig, config: FeedbackConfig, damping: float | None = None
) -> Factor | str:
    """The factor of a Gram matrix (D, D) in the order of the solver, or why there is none; `damping` in the place of
    the config's, beyond whose limits it may go."""
    order = order_positions(gram, pattern_of(format)) if config.order == "activations" else None
    try:
        upper, taken = factorize(
            gram if order is None else gram[order][:, order], config.damping if damping is None else damping
        )
    except FloatingPointError as error:
        return str(error)
    return Factor(upper=upper, damping=taken, order=order)
