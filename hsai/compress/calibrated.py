"""Compression with calibration: weights that are solved for what text makes of them (GPTQ, SparseGPT, Wanda, joint).

One pass over the layers (`hsai.compress.stream`); each weight by `hsai.compress.solver`. A weight whose solve fails is
rounded plainly, said so in its row, and does not end the run.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.factor import factorize
from hsai.compress.grid import grid_of, pattern_of
from hsai.compress.ledger import LayerRow
from hsai.compress.solver import solve
from hsai.compress.stream import Grams, stream_blocks
from hsai.errors import InputError
from hsai.formats import FormatConfig, NMConfig, NMInt4Config, NMInt8Config, VNMConfig, VNMInt4Config, Weight, to_dense
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer
from hsai.models.transformer import Block

Progress = Callable[[str, int, int], None]
Compress = Callable[[jax.Array, FormatConfig], Weight]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestConfig:
    """Each weight by itself: rounded to the nearest value under searched scales, pruned by magnitude."""

    kind: Literal["nearest"] = "nearest"
    """Names this solver in files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """With error feedback over calibration's activations: GPTQ for a dense format, SparseGPT for a sparse one."""

    kind: Literal["feedback"] = "feedback"
    """Names this solver in files."""

    mask: Literal["joint", "wanda", "magnitude"] = "joint"
    """Of a sparse format: chosen with the values, or beforehand by |w| ||x|| (2306.11695) or by |w|."""

    damping: float = 0.01
    """Share of the mean of H's diagonal that is added to it; raised where that does not do."""

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise InputError(f"solver damping={self.damping} must be above 0 and at most 1")


SolverConfig = NearestConfig | FeedbackConfig


def solve_layers(
    model: Transformer,
    formats: dict[str, tuple[FormatConfig, FeedbackConfig]],
    tokens: np.ndarray,
    *,
    batch: int,
    plain: Compress,
    progress: Progress | None = None,
) -> tuple[dict[str, Weight], list[LayerRow]]:
    """Packs the stacked weights of all layers.

    Args:
      model: with dense weights.
      formats: of weights below `layers`, by their names in the model, and how they are solved.
      tokens: int32 (N, T).
      batch: sequences at a time.
      plain: packs a weight whose solve fails.
      progress: as for `stream_blocks`.
    Returns: the packed weights (L, D, F) by name, and a row a layer and weight.
    Raises:
      InputError: see `stream_blocks`; or a weight that no product of a block uses as a matrix.
    """
    parts: dict[str, list[Weight]] = {name: [] for name in formats}
    rows: list[LayerRow] = []

    def solve_block(layer: int, block: Block, grams: Grams) -> Block:
        params = named_weights(block)
        dense: dict[str, Weight] = {}
        factors: dict[tuple[int, float], tuple[jax.Array, float] | str] = {}
        for full, (format, config) in formats.items():
            name = full.removeprefix("layers.")
            if name not in grams:
                raise InputError(f"{full} cannot be calibrated: it is no plain product; give it the nearest solver")
            w, gram = params[name].get_value(), grams[name]
            key = (id(gram), config.damping)
            if key not in factors:
                factors[key] = _try_factorize(gram, config.damping)
            found = factors[key]
            if isinstance(found, str):
                packed, damping, note = plain(w, format), None, found
            else:
                packed, damping, note = pack_solved(w, gram, found[0], format, config), found[1], ""
            dense[name] = to_dense(packed).astype(w.dtype)
            error = float(_measure(w, dense[name], gram))
            rows.append(LayerRow(weight=full, layer=layer, output_error=error, damping=damping, note=note))
            parts[full].append(packed)
        return replace_weights(block, dense)

    stream_blocks(model, tokens, batch=batch, solve=solve_block, progress=progress)
    return {name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) for name, each in parts.items()}, rows


def pack_solved(
    w: jax.Array, gram: jax.Array, upper: jax.Array, format: FormatConfig, config: FeedbackConfig
) -> Weight:
    """One weight (D, F) in its format, solved over the activations with X^T X = gram and the factor `upper`."""
    pattern = pattern_of(format)
    mask = None
    if (
        isinstance(format, NMConfig | NMInt8Config | NMInt4Config | VNMConfig | VNMInt4Config)
        and config.mask != "joint"
    ):
        norms = jnp.sqrt(jnp.diagonal(gram))[:, None] if config.mask == "wanda" else 1.0
        mask = format.mask(w * norms)
    solved = solve(w, upper, grid=grid_of(format), pattern=pattern, mask=mask)
    words = {} if pattern is None else {"mask": solved.mask}
    words |= {} if solved.scale is None else {"scale": solved.scale}
    packed: Weight = format.pack(solved.values, **words)
    return packed


def _try_factorize(gram: jax.Array, damping: float) -> tuple[jax.Array, float] | str:
    try:
        return factorize(gram, damping)
    except FloatingPointError as error:
        return str(error)


@jax.jit
def _measure(w: jax.Array, held: jax.Array, gram: jax.Array) -> jax.Array:
    """||X (w - held)|| / ||X w||, from X^T X."""

    def square(v: jax.Array) -> jax.Array:
        return jnp.maximum(jnp.sum(v * jnp.matmul(gram, v, precision=jax.lax.Precision.HIGHEST)), 0.0)

    whole = square(w)
    return jnp.sqrt(jnp.where(whole > 0, square(w - held) / whole, 0.0))
