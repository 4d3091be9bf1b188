"""Wanda: the mask from calibration, and what it keeps as it was (Sun et al., "A simple and effective pruning approach
for large language models", 2306.11695).

A weight's score is |w_ij| ||x_i||_2 (eq. 1), by how much its own product moves an output over the calibration tokens,
each as large as it is (other solvers count all tokens the same: `hsai.formats.observed.level_rows`), and scores compete
within one output: those of a format's group of positions, or, of V outputs that share a choice, by their sums. They
take the place of the magnitudes that a format goes by, and nothing else changes: kept weights are rounded to what the
format holds them as. No other weight makes up for what is pruned, so there is nothing to factorize and nothing that
could fail.

D contraction, F outputs, E experts.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.compress.factor import DEAD
from hsai.compress.plain import pack_to_mask
from hsai.formats import FormatConfig, OutliersConfig, Packed, SparseConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandaConfig:
    """Of a sparse format: the mask by |w| ||x|| over calibration's activations; what is kept is only rounded."""

    kind: Literal["wanda"] = "wanda"
    """Names this solver in files."""


@functools.partial(jax.jit, static_argnames="format")
def pack_wanda(w: jax.Array, norms: jax.Array, format: FormatConfig) -> Packed:
    """A weight (D, F) in a format that prunes, by `measure_norms` (D, 1) of what it is multiplied by; or experts
    (E, D, F), each by its own (E, D, 1).

    Scales are those that the kept weights alone suggest, as of the nearest solver. Of a format with outliers those
    positions are kept apart whose scores have the largest sum of squares, and take no place in the mask.
    """
    if w.ndim > 2:  # one after the other: temporaries are those of one
        packed: Packed = jax.lax.map(lambda expert: pack_wanda(*expert, format), (w, norms))
        return packed
    w = w.astype(jnp.float32)
    scores = w * norms
    if isinstance(format, OutliersConfig):
        index = format.find_largest(scores)
        base = format.base
        assert isinstance(base, SparseConfig), f"{base} prunes nothing"
        rest = pack_to_mask(format.rest(w, index), base, base.mask(format.rest(scores, index)))
        assert isinstance(rest, Packed)
        return format.join(w, index, rest)
    assert isinstance(format, SparseConfig), f"{format} prunes nothing"
    kept = pack_to_mask(w, format, format.mask(scores))
    assert isinstance(kept, Packed)
    return kept


def measure_norms(squares: jax.Array) -> jax.Array:
    """||x_i||_2 of each position, float32 (..., D, 1), from the sums of its squares (..., D).

    Positions that calibration never excited get next to nothing, as `factorize` has it: they are the first to be
    pruned, among themselves by magnitude. Where none was excited, magnitudes alone decide.
    """
    largest = jnp.max(squares, axis=-1, keepdims=True)
    least = jnp.where(largest > 0, DEAD * largest, 1.0)
    return jnp.sqrt(jnp.where(squares > 0, squares, least))[..., None]
