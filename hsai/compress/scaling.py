"""Scales for channels, after their activations: AWQ (2306.00978). What is multiplied by much is rounded more finely.

A weight's input channel is made larger by s and the channel itself smaller by as much, in whatever makes it
(`hsai.compress.folds`): the model computes the same function. Rounded with the scales of its groups, the channel's
errors are then smaller by s, and its neighbours' a little larger, for the scale of their group has grown. Which s is
best is searched (section 3.2, eqs. 4 and 5): s = a^alpha, with a the channel's activations and alpha one number for all
that reads the same channels, by the output error of what the recipe's formats make of it.

Here a is the root mean square over calibration, and not the mean magnitude, each token's channels scaled to one norm
as the solvers have them (`hsai.formats.observed.level_rows`), so that with their Gram matrix X^T X everything is known:
the output error of v is tr((w - v)^T X^T X (w - v)).

What is found of a layer is kept (`hsai.compress.resume`): a search that is killed goes on at the layer it was in.

L layers, E experts, D contraction, F outputs, K kv heads, H head dim.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.calibrated import check_observed, measure_output
from hsai.compress.folds import (
    Fold,
    channel_folds,
    read_gain,
    repeat_heads,
    scale_columns,
    scale_rows,
    store_gain,
)
from hsai.compress.ledger import ScaleRow, keep_finite
from hsai.compress.plain import pack_weight
from hsai.compress.resume import Workbench
from hsai.compress.stream import Grams, Progress, Streams, stream_blocks
from hsai.errors import InputError
from hsai.formats import DenseConfig, FormatConfig, to_dense
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import Block

LEAST = 1e-4
"""Activations below this share of a weight's largest are taken for it: dead channels have no logarithm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """How the scales of channels are searched, before any weight is compressed."""

    kind: Literal["scaling"] = "scaling"
    """Names this transform in files."""

    steps: int = 20
    """Exponents 1 / steps, 2 / steps, ..., 1 are tried, and 0, which changes nothing."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"scaling steps={self.steps} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales:
    """What was found."""

    factors: Mapping[str, jax.Array]
    """By which each channel's activations are divided, float32, by the source of the fold: (L, D) of a normalization,
    (D,) of the last one, (L, F) or (L, E, F) of a weight's outputs."""

    rows: tuple[ScaleRow, ...]
    """One a layer and fold."""


def find_scales(
    model: Transformer,
    config: ScalingConfig,
    formats: Mapping[str, Sequence[FormatConfig]],
    tokens: np.ndarray,
    *,
    batch: int,
    workbench: Workbench | None = None,
    progress: Progress | None = None,
) -> Scales:
    """The scales of every fold along which a weight of `formats` reads.

    Args:
      model: with dense weights.
      config: what is tried.
      formats: what weights may become, by their names in the model; of several the one with the fewest bits is tried.
      tokens: int32 (N, T) of calibration.
      batch: sequences at a time.
      workbench: where each layer's scales are kept as soon as they are found, and those of an earlier run are; if it
        has all of them, calibration is not run.
      progress: called with ("scaling channels", layers done, layers in all).
    Raises:
      InputError: no weight of `formats` reads along a fold; see `stream_blocks`.
    """
    shapes = {name: param.get_value().shape for name, param in named_weights(model).items()}
    smallest = {
        name: min(each, key=lambda format: format.invariant_bits(shapes[name][-2])) for name, each in formats.items()
    }
    rounded = {name for name, format in smallest.items() if not isinstance(format, DenseConfig)}
    folds = [fold for fold in channel_folds(model.config) if rounded & set(fold.readers)]
    if not folds:
        raise InputError(
            "scaling has nothing to do: no rule gives a format to a weight that reads scalable channels, such as "
            "layers.attention.q or layers.mlp.down"
        )
    inner = [fold for fold in folds if fold.source.startswith("layers.")]
    last = [fold for fold in folds if fold.source == "final_norm"]
    observed = [name for fold in inner for name in rounded & set(fold.readers)]
    places = [*range(model.config.layers), *(None for _ in last)]
    found: dict[int | None, tuple[Mapping[str, np.ndarray], Sequence[ScaleRow]]] = {}

    def search(layer: int | None, weights: Mapping[str, jax.Array], grams: Grams) -> None:
        factors: dict[str, np.ndarray] = {}
        rows: list[ScaleRow] = []
        for fold in last if layer is None else inner:
            rates = measure_channels(fold, grams[fold.readers[0]], model.config)
            trial = {name: (weights[name], grams[name], smallest[name]) for name in fold.readers if name in rounded}
            errors = []
            for exponent in np.arange(config.steps + 1) / config.steps:
                factor = repeat_channels(fold, _raise(rates, exponent), model.config)
                squares = [_try_scale(w, gram, factor, format) for w, gram, format in trial.values()]
                errors.append(float(sum(squares)))
            best = int(np.argmin(np.nan_to_num(errors, nan=np.inf)))
            factors[fold.source] = jax.device_get(_raise(rates, best / config.steps))
            rows.append(
                ScaleRow(
                    source=fold.source,
                    layer=layer,
                    exponent=best / config.steps,
                    error_before=keep_finite((errors[0] / len(trial)) ** 0.5),
                    error_after=keep_finite((errors[best] / len(trial)) ** 0.5),
                )
            )
        # Held as a later run finds them, in the host's memory: on a mesh too, both then go on with arrays laid alike.
        found[layer] = factors, rows
        if workbench is not None:
            workbench.save_scales(layer, factors, rows)

    def search_block(layer: int, block: Block, grams: Grams, streams: Streams) -> Block:
        check_observed(observed, grams)
        weights = {f"layers.{name}": param.get_value() for name, param in named_weights(block).items()}
        search(layer, weights, {f"layers.{name}": gram for name, gram in grams.items()})
        return block

    def search_head(gram: jax.Array, _: jax.Array) -> None:
        (name,) = last[0].readers
        search(None, {name: named_weights(model)[name].get_value()}, {name: gram})

    def recall(layer: int, block: Block) -> Block | None:
        return block if layer in found else None

    def report(_: str, done: int, total: int) -> None:
        if progress is not None:
            progress("scaling channels", done, total)

    for layer in places:
        like = {fold.source: _outline(fold, shapes) for fold in (last if layer is None else inner)}
        kept = None if workbench is None else workbench.load_scales(layer, like)
        if kept is not None:
            found[layer] = kept
    missing = [layer for layer in places if layer not in found]
    if missing:
        finish = search_head if None in missing else None
        stream_blocks(model, tokens, batch=batch, solve=search_block, recall=recall, finish=finish, progress=report)
    factors = {
        fold.source: jnp.stack([found[layer][0][fold.source] for layer in range(model.config.layers)]) for fold in inner
    }
    factors |= {fold.source: jnp.asarray(found[None][0][fold.source]) for fold in last}
    return Scales(factors=factors, rows=tuple(row for layer in places for row in found[layer][1]))


def measure_channels(fold: Fold, gram: jax.Array, config: TransformerConfig) -> jax.Array:
    """The root mean square of each channel that the source of a fold makes, over level rows and but for a common
    factor: (..., D)."""
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    if fold.source.endswith(".v"):  # query heads of one kv head read its channels each in its own mixture
        heads = squares.reshape(*squares.shape[:-1], config.kv_heads, -1, config.head_dim)
        squares = jnp.mean(heads, axis=-2).reshape(*squares.shape[:-1], -1)
    return jnp.sqrt(squares)


def repeat_channels(fold: Fold, factor: jax.Array, config: TransformerConfig) -> jax.Array:
    """What the source of a fold makes, as its readers see it."""
    return repeat_heads(factor, config) if fold.source.endswith(".v") else factor


def apply_scales(model: Transformer, factors: Mapping[str, jax.Array]) -> Transformer:
    """The same function, with `Scales.factors` moved from what makes the channels into what reads them."""
    config = model.config
    weights: dict[str, jax.Array] = {name: param.get_value() for name, param in named_weights(model).items()}
    for fold in channel_folds(config):
        if fold.source not in factors:
            continue
        factor = factors[fold.source]
        if fold.is_norm:
            weights |= store_gain(weights, fold.source, read_gain(weights, fold.source, config) / factor, config)
        else:
            weights[fold.source] = scale_columns(weights[fold.source], 1.0 / factor)
            if (bias := f"{fold.source}_bias") in weights:
                weights[bias] = (weights[bias].astype(jnp.float32) / factor).astype(weights[bias].dtype)
        seen = repeat_channels(fold, factor, config)
        weights |= {name: scale_rows(weights[name], seen) for name in fold.readers}
    return replace_weights(model, weights)


def _outline(fold: Fold, shapes: Mapping[str, tuple[int, ...]]) -> jax.ShapeDtypeStruct:
    """What a fold's factors are of one layer, for `shapes` of the model's weights: float32 (D,), (F,) or (E, F)."""
    shape = shapes[f"{fold.source}.gain" if fold.is_norm else fold.source]
    shape = shape[1:] if fold.source.startswith("layers.") else shape
    return jax.ShapeDtypeStruct(shape if fold.is_norm else (*shape[:-2], shape[-1]), jnp.float32)


def _raise(rates: jax.Array, exponent: float) -> jax.Array:
    """rates^exponent, (..., D), with the middle of its range at one."""
    largest = jnp.max(rates, axis=-1, keepdims=True)
    powers = jnp.maximum(rates / jnp.where(largest > 0, largest, 1.0), LEAST) ** exponent
    return powers / jnp.sqrt(jnp.max(powers, axis=-1, keepdims=True) * jnp.min(powers, axis=-1, keepdims=True))


@functools.partial(jax.jit, static_argnames="format")
def _try_scale(w: jax.Array, gram: jax.Array, factor: jax.Array, format: FormatConfig) -> jax.Array:
    """The squared error of the output, as a share of it, if w (..., D, F) is rounded in these scales."""
    held = scale_rows(to_dense(pack_weight(scale_rows(w, factor), format)), 1.0 / factor)
    return jnp.square(measure_output(w, held, gram))
