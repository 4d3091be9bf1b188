"""Compression with calibration: weights that are solved for what text makes of them (GPTQ, SparseGPT, Wanda, joint).

One pass over the layers (`hsai.compress.stream`); the weights of each by `hsai.compress.block_solver`. A row says how
far a weight's outputs moved, and what went wrong; the run goes on. Where a recipe reconstructs, the packed weights of a
layer are then tuned together (`hsai.compress.reconstruct`).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.block_solver import BlockSolver, Packing, is_decided
from hsai.compress.ledger import BlockRow, LayerRow, keep_finite
from hsai.compress.names import name_format
from hsai.compress.reconstruct import Reconstructor
from hsai.compress.resume import SolvedLayer, Workbench
from hsai.compress.solvers import CalibratedConfig, SolverConfig
from hsai.compress.stream import Grams, Progress, Streams, stream_blocks
from hsai.errors import InputError
from hsai.formats import FormatConfig, Weight, stack_layers, to_dense
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer
from hsai.models.transformer import Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolvedLayers:
    """What `solve_layers` returns."""

    weights: Mapping[str, Weight]
    """The packed weights by their names in the model; layers are stacked."""

    rows: tuple[LayerRow, ...]
    """One a layer and weight, and one of the head."""

    blocks: tuple[BlockRow, ...]
    """One a layer, where layers were reconstructed."""


def solve_layers(
    model: Transformer,
    formats: Mapping[str, tuple[Sequence[FormatConfig], SolverConfig]],
    tokens: np.ndarray,
    *,
    batch: int,
    packed: Transformer | None = None,
    reconstructor: Reconstructor | None = None,
    workbench: Workbench | None = None,
    progress: Progress | None = None,
) -> SolvedLayers:
    """Packs the stacked weights of all layers, and the head.

    Args:
      model: with dense weights.
      formats: of weights below `layers`, by their names in the model: the format of each layer, and how it is packed.
        Those that are packed by themselves are not tuned, and the layers behind see their errors. The head may be among
        them, with one format and to be solved; where it is the embedding table too, it is solved as the head.
      tokens: int32 (N, T).
      batch: sequences at a time; see `stream_blocks`.
      packed: the model with tables as they are packed already, whose errors the layers then make up for.
      reconstructor: tunes each layer once its weights are packed.
      workbench: where each layer and the head are kept as soon as they are solved, and those of an earlier run are
        found; if it has all of them, calibration is not run.
      progress: as for `stream_blocks`.
    Raises:
      InputError: see `stream_blocks`, `check_observed` and `BlockSolver.pack`.
    """
    solver = _LayerSolver(model, formats, reconstructor, workbench)
    if not solver.is_done:
        stream_blocks(
            model,
            tokens,
            batch=batch,
            solve=solver.solve_block,
            recall=solver.recall,
            finish=solver.solve_head if solver.heads else None,
            packed=packed,
            follow_dense=reconstructor is not None,
            progress=progress,
        )
    return solver.collect()


class _LayerSolver:
    """What `stream_blocks` calls, and what came of it.

    Attributes:
      heads: formats and solvers of what is solved behind the layers.
    """

    def __init__(
        self,
        model: Transformer,
        formats: Mapping[str, tuple[Sequence[FormatConfig], SolverConfig]],
        reconstructor: Reconstructor | None,
        workbench: Workbench | None,
    ) -> None:
        self._model, self._reconstructor, self._workbench = model, reconstructor, workbench
        self._blocks = {name: found for name, found in formats.items() if name.startswith("layers.")}
        self.heads = {name: found for name, found in formats.items() if name not in self._blocks}
        self._done: dict[int | None, SolvedLayer] = {}
        places: list[int | None] = [*range(model.config.layers)] if self._blocks else []
        self._places = [*places, *([None] if self.heads else [])]
        if workbench is not None:
            shapes = {name: param.get_value().shape for name, param in named_weights(model).items()}
            for place in self._places:
                names = self.heads if place is None else self._blocks
                found = workbench.load_layer(place, {n: shapes[n][0 if place is None else 1 :] for n in names})
                if found is not None:
                    self._done[place] = found

    @property
    def is_done(self) -> bool:
        """Whether an earlier run solved all of it."""
        return all(place in self._done for place in self._places)

    def collect(self) -> SolvedLayers:
        """All of it, in the order of the layers."""
        layers = [self._done[place] for place in self._places]
        weights: dict[str, Weight] = {
            name: stack_layers([layer.weights[name] for layer in layers if name in layer.weights])
            for name in self._blocks
        }
        weights |= {name: self._done[None].weights[name] for name in self.heads}
        return SolvedLayers(
            weights=weights,
            rows=tuple(row for layer in layers for row in layer.rows),
            blocks=tuple(row for layer in layers for row in layer.blocks),
        )

    def recall(self, layer: int, block: Block) -> Block | None:
        """For `stream_blocks`: what is there already."""
        if not self._blocks:
            return block
        return _replace_packed(block, self._done[layer].weights) if layer in self._done else None

    def solve_block(self, layer: int, block: Block, grams: Grams, streams: Streams) -> Block:
        """For `stream_blocks`: packs a layer's weights, and tunes them."""
        check_observed([name for name, (_, how) in self._blocks.items() if isinstance(how, CalibratedConfig)], grams)
        dense = {f"layers.{name}": param.get_value() for name, param in named_weights(block).items()}
        solver = BlockSolver(grams, streams.squares, layer=layer)
        chosen = {name: (formats[layer], how) for name, (formats, how) in self._blocks.items()}
        packings: dict[str, Packing] = {}
        for name, how in chosen.items():
            packing = solver.pack(_inner(name), dense[name], *how)
            if is_decided(*how):
                packing = _tell_idle(packing, streams.counts[_inner(name)])
            packings[name] = packing
        weights = {name: packing.weight for name, packing in packings.items()}
        blocks: tuple[BlockRow, ...] = ()
        tuned = {_inner(name): how[0] for name, how in chosen.items() if is_decided(*how)}
        if self._reconstructor is not None and tuned:
            others = {name: value for name, value in weights.items() if _inner(name) not in tuned}
            given = _replace_packed(block, others)
            start = {name: weights[f"layers.{name}"] for name in tuned}
            changed, row = self._reconstructor.tune(layer, given, start, tuned, streams)
            weights |= {f"layers.{name}": value for name, value in changed.items()}
            blocks = (row,)
        solved = _replace_packed(block, weights)
        held = {f"layers.{name}": param.get_value() for name, param in named_weights(solved).items()}
        rows = tuple(
            make_row(name, layer, chosen[name][0], dense[name], held[name], grams[_inner(name)], packing)
            for name, packing in packings.items()
            if _inner(name) in grams
        )
        self._keep(layer, SolvedLayer(weights=weights, rows=rows, blocks=blocks))
        return solved

    def solve_head(self, gram: jax.Array, squares: jax.Array) -> None:
        """For `stream_blocks`: packs what the last normalization's outputs are multiplied by."""
        weights: dict[str, Weight] = {}
        rows: list[LayerRow] = []
        for name, (formats, how) in self.heads.items():
            w = to_dense(named_weights(self._model)[name].get_value())
            packing = BlockSolver({name: gram}, {name: squares}).pack(name, w, formats[0], how)
            weights[name] = packing.weight
            rows.append(make_row(name, None, formats[0], w, packing.weight, gram, packing))
        self._keep(None, SolvedLayer(weights=weights, rows=tuple(rows), blocks=()))

    def _keep(self, place: int | None, solved: SolvedLayer) -> None:
        self._done[place] = solved
        if self._workbench is not None:
            self._workbench.save_layer(place, solved)


def _inner(name: str) -> str:
    """A weight's name within its block."""
    return name.removeprefix("layers.")


def _replace_packed(block: Block, packed: Mapping[str, Weight]) -> Block:
    """The block with packed weights, by their names in the model, made dense in the place of its own."""
    own = named_weights(block)
    values = {_inner(name): to_dense(value) for name, value in packed.items()}
    return replace_weights(block, {name: w.astype(own[name].get_value().dtype) for name, w in values.items()})


def _tell_idle(packing: Packing, counts: np.ndarray) -> Packing:
    """With a note of experts to which no token went; `counts` (), or (E,), are how many did."""
    if (counts > 0).all():
        return packing
    told = f"no token went to expert {', '.join(map(str, np.flatnonzero(counts == 0)))}"
    return dataclasses.replace(packing, note="; ".join(filter(None, (packing.note, told))))


def make_row(
    name: str,
    layer: int | None,
    format: FormatConfig,
    w: jax.Array,
    held: Weight,
    gram: jax.Array,
    packing: Packing | None = None,
) -> LayerRow:
    """How far the outputs of w (..., D, F) moved, now that it is `held`; and how its solve went, if there was one."""
    return LayerRow(
        weight=name,
        layer=layer,
        format=name_format(format),
        output_error=keep_finite(measure_output(w, to_dense(held).astype(w.dtype), gram)),
        damping=None if packing is None else packing.damping,
        note="" if packing is None else packing.note,
    )


def check_observed(names: Iterable[str], grams: Grams) -> None:
    """Raises `InputError` for a weight of the layers that a block multiplies by nothing."""
    for name in names:
        if _inner(name) not in grams:
            raise InputError(f"{name} cannot be calibrated: no product reads it; give it the nearest solver")


@jax.jit
def measure_output(w: jax.Array, held: jax.Array, gram: jax.Array) -> jax.Array:
    """||X (w - held)|| / ||X w|| over all experts, float32 (), from X^T X (..., D, D) of each."""

    def square(v: jax.Array) -> jax.Array:
        return jnp.maximum(jnp.sum(v * jnp.matmul(gram, v, precision=jax.lax.Precision.HIGHEST)), 0.0)

    wide = w.astype(jnp.float32)
    whole = square(wide)
    return jnp.sqrt(jnp.where(whole > 0, square(wide - held.astype(jnp.float32)) / whole, 0.0))
