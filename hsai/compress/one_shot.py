"""One-shot compression: every weight by itself, from the weights alone, without data or training.

All that can be wrong with the input is found before the first weight is touched; and no weight leaves without its bytes
having been counted against what its format promises.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from hsai.compress.ledger import Ledger, LedgerRow, name_format
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
    nbytes,
    to_dense,
)
from hsai.formats.storage import named_weights, replace_weights

M = TypeVar("M")
Progress = Callable[[str, int, int], None]


def compress(model: M, recipe: RecipeConfig, *, progress: Progress | None = None) -> tuple[M, Ledger]:
    """A copy of the model whose weights have the formats of the recipe, and the ledger of all its parameters.

    Args:
      model: with dense weights; it is not changed.
      recipe: which weights become what.
      progress: called with ("compressing", weights done, weights in all).
    Raises:
      InputError: see `match_weights`; or a weight holds a NaN or an infinity.
      RuntimeError: a packed weight does not have the bytes that its format promises, a defect of the format.
    """
    formats = match_weights(recipe, model)
    params = named_weights(model)
    for name, param in params.items():
        _check_finite(name, param.get_value())
    values: dict[str, Weight] = {}
    rows: list[LedgerRow] = []
    for name, param in params.items():
        before = param.get_value()
        after, error = before, 0.0
        if name in formats:
            after, missed = compress_weight(before, formats[name])
            check_bytes(name, after, formats[name])
            values[name], error = after, float(missed)
            if progress is not None:
                progress("compressing", len(values), len(formats))
        rows.append(
            LedgerRow(
                weight=name,
                format=name_format(formats[name] if name in formats else after),
                shape=tuple(after.shape),
                bytes=nbytes(after),
                relative_error=error,
            )
        )
    return replace_weights(model, values), Ledger(rows=tuple(rows))


@functools.partial(jax.jit, static_argnames="format")
def compress_weight(w: jax.Array, format: FormatConfig) -> tuple[Weight, jax.Array]:
    """A dense weight (D, F) or (L, D, F) in the given format, and its relative error ||w - packed|| / ||w||, float32.

    The error of a weight that is zero everywhere is zero.
    """
    match format:
        case DenseConfig():
            packed: Weight = format.pack(w)
        case Int8Config():
            packed = round_int8(w, format)
        case Int4Config():
            packed = round_int4(w, format)
        case TernaryConfig():
            packed = map_layers(format.pack, w)
        case NMConfig() | VNMConfig():
            packed = prune(w, format)
        case NMInt4Config() | VNMInt4Config():
            packed = prune_int4(w, format)

    def measure(pair: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
        wide, held = pair[0].astype(jnp.float32), to_dense(pair[1]).astype(jnp.float32)
        return jnp.sum(jnp.square(wide - held)), jnp.sum(jnp.square(wide))

    # Layer by layer as well: a whole stack made dense again would be the largest array of all.
    missed, whole = measure((w, packed)) if w.ndim == 2 else jax.lax.map(measure, (w, packed))
    missed, whole = jnp.sum(missed), jnp.sum(whole)
    return packed, jnp.sqrt(jnp.where(whole > 0, missed / whole, 0.0))


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
