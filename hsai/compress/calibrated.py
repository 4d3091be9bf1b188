"""Compression with calibration: weights that are solved for what text makes of them (GPTQ, SparseGPT, Wanda, joint).

One pass over the layers (`hsai.compress.stream`); each weight by `hsai.compress.solver`. A weight whose solve fails is
rounded plainly, said so in its row, and does not end the run. Where a recipe reconstructs, the packed weights of a
layer are then tuned together (`hsai.compress.reconstruct`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.factor import factorize
from hsai.compress.grid import grid_of, pattern_of
from hsai.compress.ledger import BlockRow, LayerRow, name_format
from hsai.compress.reconstruct import Reconstructor
from hsai.compress.resume import Workbench
from hsai.compress.solver import solve
from hsai.compress.stream import Grams, Streams, stream_blocks
from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    FormatConfig,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    VNMConfig,
    VNMInt4Config,
    Weight,
    stack_layers,
    to_dense,
)
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer
from hsai.models.transformer import Block

COLUMNS = 16384
"""Outputs that are solved at a time; a multiple of what V:N:M lets share a choice."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """One weight, and how that went."""

    weight: Weight

    damping: float | None = None
    """That the factorization took; None of a weight that was packed by itself."""

    note: str = ""
    """Why it was, if the factorization failed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolvedLayers:
    """What `solve_layers` returns."""

    weights: Mapping[str, Weight]
    """The packed weights by their names in the model; layers are stacked."""

    rows: tuple[LayerRow, ...]
    """One a layer and weight."""

    blocks: tuple[BlockRow, ...]
    """One a layer, where layers were reconstructed."""


class BlockSolver:
    """Packs the weights of one block; those with the same input share its factor."""

    def __init__(self, grams: Grams, plain: Compress) -> None:
        """Args:
        grams: of the block's products.
        plain: packs a weight (D, F) by itself.
        """
        self._grams = grams
        self._plain = plain
        self._factors: dict[tuple[int, float], tuple[jax.Array, float] | str] = {}

    def pack(self, name: str, w: jax.Array, format: FormatConfig, config: SolverConfig) -> Packing:
        """The weight (D, F) called `name` within its block. One whose factorization fails is packed by itself, as are
        those that are not to be solved, or stay dense."""
        if isinstance(config, NearestConfig) or isinstance(format, DenseConfig):
            return Packing(weight=self._plain(w, format))
        gram = self._grams[name]
        key = (id(gram), config.damping)
        if key not in self._factors:
            self._factors[key] = _try_factorize(gram, config.damping)
        found = self._factors[key]
        if isinstance(found, str):
            return Packing(weight=self._plain(w, format), note=found)
        return Packing(weight=pack_solved(w, gram, found[0], format, config), damping=found[1])


def solve_layers(
    model: Transformer,
    formats: Mapping[str, tuple[Sequence[FormatConfig], FeedbackConfig]],
    tokens: np.ndarray,
    *,
    batch: int,
    plain: Compress,
    reconstructor: Reconstructor | None = None,
    workbench: Workbench | None = None,
    progress: Progress | None = None,
) -> SolvedLayers:
    """Packs the stacked weights of all layers, and the head.

    Args:
      model: with dense weights.
      formats: of weights below `layers`, by their names in the model: the format of each layer, and how it is solved.
        The head may be among them, with one format; where it is the embedding table too, it is solved as the head.
      tokens: int32 (N, T).
      batch: sequences at a time.
      plain: packs a weight whose solve fails.
      reconstructor: tunes each layer once its weights are packed.
      workbench: where each layer is kept as soon as it is solved, and those of an earlier run are found.
      progress: as for `stream_blocks`.
    Raises:
      InputError: see `stream_blocks` and `check_observed`.
    """
    blocks = {name: found for name, found in formats.items() if name.startswith("layers.")}
    heads = {name: found for name, found in formats.items() if name not in blocks}
    inner = {full: full.removeprefix("layers.") for full in blocks}
    parts: dict[str, list[Weight]] = {name: [] for name in formats}
    rows: list[LayerRow] = []
    tuned: list[BlockRow] = []

    def note(full: str, layer: int | None, w: jax.Array, held: jax.Array, gram: jax.Array, pack: Packing) -> None:
        rows.append(
            LayerRow(
                weight=full,
                layer=layer,
                format=name_format(formats[full][0][layer or 0]),
                output_error=float(_measure(w, held, gram)),
                damping=pack.damping,
                note=pack.note,
            )
        )

    def solve_block(layer: int, block: Block, grams: Grams, streams: Streams) -> Block:
        check_observed(blocks, grams)
        dense, solver = _read_weights(block), BlockSolver(grams, plain)
        chosen = {name: (blocks[full][0][layer], blocks[full][1]) for full, name in inner.items()}
        packings = {name: solver.pack(name, dense[name], *how) for name, how in chosen.items()}
        packed = {name: packing.weight for name, packing in packings.items()}
        first = len(rows)
        found: list[BlockRow] = []
        if reconstructor is not None:
            kinds = {name: format for name, (format, _) in chosen.items() if not isinstance(format, DenseConfig)}
            if kinds:
                changed, row = reconstructor.tune(layer, block, {name: packed[name] for name in kinds}, kinds, streams)
                packed |= changed
                found = [row]
        held = {name: to_dense(value).astype(dense[name].dtype) for name, value in packed.items()}
        for full, name in inner.items():
            note(full, layer, dense[name], held[name], grams[name], packings[name])
            parts[full].append(packed[name])
        tuned.extend(found)
        if workbench is not None:
            workbench.save_layer(layer, replace_weights(block, packed), rows[first:], found)
        return replace_weights(block, held)

    def recall(layer: int, block: Block) -> Block | None:
        found = None if workbench is None else workbench.load_layer(layer, block)
        if found is None:
            return None
        packed, dense = _read_weights(found[0]), _read_weights(block)
        for full, name in inner.items():
            parts[full].append(packed[name])
        rows.extend(found[1])
        tuned.extend(found[2])
        return replace_weights(
            block, {name: to_dense(packed[name]).astype(dense[name].dtype) for name in inner.values()}
        )

    def solve_head(gram: jax.Array) -> None:
        for name, (chosen, config) in heads.items():
            w = named_weights(model)[name].get_value()
            packing = BlockSolver({name: gram}, plain).pack(name, w, chosen[0], config)
            note(name, None, w, to_dense(packing.weight).astype(w.dtype), gram, packing)
            parts[name].append(packing.weight)

    stream_blocks(
        model,
        tokens,
        batch=batch,
        solve=solve_block,
        recall=recall,
        finish=solve_head if heads else None,
        follow_dense=reconstructor is not None,
        progress=progress,
    )
    weights = {name: stack_layers(each) if name in blocks else each[0] for name, each in parts.items()}
    return SolvedLayers(weights=weights, rows=tuple(rows), blocks=tuple(tuned))


def _read_weights(block: Block) -> dict[str, Any]:
    return {name: param.get_value() for name, param in named_weights(block).items()}


def check_observed(names: Iterable[str], grams: Grams) -> None:
    """Raises `InputError` for a weight of the layers that no product of a block uses as a matrix."""
    for name in names:
        if name.removeprefix("layers.") not in grams:
            raise InputError(f"{name} cannot be calibrated: it is no plain product; give it the nearest solver")


def pack_solved(
    w: jax.Array, gram: jax.Array, upper: jax.Array, format: FormatConfig, config: FeedbackConfig
) -> Weight:
    """One weight (D, F) in its format, solved over the activations with X^T X = gram and the factor `upper`."""
    if w.shape[-1] > COLUMNS:  # outputs are solved each for itself; a head's are too many for one program's memory
        parts = [
            pack_solved(part, gram, upper, format, config)
            for part in jnp.split(w, list(range(COLUMNS, w.shape[-1], COLUMNS)), axis=-1)
        ]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *parts)
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
