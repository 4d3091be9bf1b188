"""One-shot compression: formats for the weights of a model, without training it.

What a recipe's rules leave to the nearest solver is packed here, from the weights alone; what they solve with feedback
is in `hsai.compress.calibrated`.

All that can be wrong with the input is found before the first weight is touched; and no weight leaves without its bytes
having been counted against what its format promises.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.calibrated import FeedbackConfig, solve_layers
from hsai.compress.ledger import LayerRow, Ledger, LedgerRow, name_format
from hsai.compress.prune import prune, prune_int4
from hsai.compress.quantize import map_layers, round_int4, round_int8
from hsai.compress.recipe import RecipeConfig, match_weights
from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    FormatConfig,
    Int4Config,
    Int8Config,
    NMConfig,
    NMInt4Config,
    TernaryConfig,
    VNMConfig,
    VNMInt4Config,
    Weight,
    is_packed_as,
    nbytes,
    to_dense,
)
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer

M = TypeVar("M")
Progress = Callable[[str, int, int], None]


def compress(
    model: M, recipe: RecipeConfig, *, calibration: np.ndarray | None = None, progress: Progress | None = None
) -> tuple[M, Ledger]:
    """A copy of the model whose weights have the formats of the recipe, and the ledger of all its parameters.

    Args:
      model: with dense weights, or packed ones that `match_weights` lets pass; it is not changed.
      recipe: which weights become what.
      calibration: int32 (N, T) tokens, of `draw_windows`; for recipes that ask for one.
      progress: called with ("compressing", weights done, weights in all), and as `stream_blocks` says.
    Raises:
      InputError: see `match_weights`; or a weight holds a NaN or an infinity.
      RuntimeError: a packed weight does not have the bytes that its format promises, a defect of the format.
    """
    rules = match_weights(recipe, model)
    params = named_weights(model)
    for name, param in params.items():
        _check_finite(name, param.get_value())
    # What is in the format that is asked for, as training leaves it, stays as it is.
    held = {name: params[name].get_value() for name in rules}
    values: dict[str, Weight] = {name: held[name] for name in rules if is_packed_as(held[name], rules[name].format)}
    kept = frozenset(values)
    solved = {
        name: (rule.format, rule.solver)
        for name, rule in rules.items()
        if isinstance(rule.solver, FeedbackConfig) and name not in values
    }
    layers: list[LayerRow] = []
    if solved:
        if calibration is None or recipe.calibration is None:
            raise ValueError("this recipe solves with feedback; compress needs the calibration's tokens")
        assert isinstance(model, Transformer)
        batch = recipe.calibration.batch
        packed, layers = solve_layers(model, solved, calibration, batch=batch, plain=pack_weight, progress=progress)
        values |= packed
    rows: list[LedgerRow] = []
    done = 0
    for name, param in params.items():
        before = param.get_value()
        after, error = before, 0.0
        if name in rules:
            if name not in values:
                values[name] = pack_weight(to_dense(before), rules[name].format)
            after = values[name]
            check_bytes(name, after, rules[name].format)
            error = 0.0 if name in kept else float(measure_error(to_dense(before), after))
            done += 1
            if progress is not None:
                progress("compressing", done, len(rules))
        rows.append(
            LedgerRow(
                weight=name,
                format=name_format(rules[name].format if name in rules else after),
                shape=tuple(after.shape),
                bytes=nbytes(after),
                relative_error=error,
            )
        )
    return replace_weights(model, values), Ledger(rows=tuple(rows), layers=tuple(layers))


@functools.partial(jax.jit, static_argnames="format")
def pack_weight(w: jax.Array, format: FormatConfig) -> Weight:
    """A dense weight (D, F) or (L, D, F) in the given format, from the weight alone."""
    match format:
        case DenseConfig():
            return format.pack(w)
        case Int8Config():
            return round_int8(w, format)
        case Int4Config():
            return round_int4(w, format)
        case TernaryConfig():
            return map_layers(format.pack, w)
        case NMConfig() | VNMConfig():
            return prune(w, format)
        case NMInt4Config() | VNMInt4Config():
            return prune_int4(w, format)


@jax.jit
def measure_error(w: jax.Array, packed: Weight) -> jax.Array:
    """||w - packed|| / ||w||, Frobenius norms over all layers, float32 (); of a weight that is zero everywhere, 0."""

    def measure(pair: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
        wide, held = pair[0].astype(jnp.float32), to_dense(pair[1]).astype(jnp.float32)
        return jnp.sum(jnp.square(wide - held)), jnp.sum(jnp.square(wide))

    # Layer by layer as well: a whole stack made dense again would be the largest array of all.
    missed, whole = measure((w, packed)) if w.ndim == 2 else jax.lax.map(measure, (w, packed))
    missed, whole = jnp.sum(missed), jnp.sum(whole)
    return jnp.sqrt(jnp.where(whole > 0, missed / whole, 0.0))


def check_bytes(name: str, value: Weight, format: FormatConfig) -> None:
    """Raises RuntimeError unless the arrays of a packed weight hold exactly the bytes that its format promises."""
    promised = round(format.invariant_bits(value.shape[-2]) * math.prod(value.shape)) / 8
    if nbytes(value) != promised:
        raise RuntimeError(f"{name} of shape {tuple(value.shape)} has {nbytes(value)} bytes, {format} says {promised}")


def _check_finite(name: str, value: Weight) -> None:
    bad = sum(int(jnp.sum(~jnp.isfinite(leaf))) for leaf in jax.tree.leaves(value))
    if bad:
        raise InputError(
            f"{name} holds {bad} values that are NaN or infinite, of {math.prod(value.shape)}; "
            "compress an earlier checkpoint"
        )
