"""Compression with calibration: weights that are solved for what text makes of them (GPTQ, SparseGPT, Wanda, joint).

One pass over the layers (`hsai.compress.stream`); each weight by `hsai.compress.solver`, or by
`hsai.compress.wanda`. A weight whose solve fails, for want of a factor or because its numbers run away, is tried again
with more damping and at last rounded plainly; its row says so, and the run goes on. Where a recipe reconstructs, the
packed weights of a layer are then tuned together (`hsai.compress.reconstruct`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.grid import Pattern, pattern_of
from hsai.compress.ledger import BlockRow, LayerRow, keep_finite
from hsai.compress.limits import check_held
from hsai.compress.names import name_format
from hsai.compress.reconstruct import Reconstructor
from hsai.compress.resume import Workbench
from hsai.compress.solved import Factor, find_factor, pack_solved
from hsai.compress.solvers import (
    CalibratedConfig,
    FeedbackConfig,
    NearestConfig,
    PlainConfig,
    SolverConfig,
    WandaConfig,
)
from hsai.compress.stream import Grams, Streams, stream_blocks
from hsai.compress.wanda import measure_norms, pack_wanda
from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    FormatConfig,
    Weight,
    stack_layers,
    to_dense,
)
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer
from hsai.models.transformer import Block

Progress = Callable[[str, int, int], None]
Compress = Callable[[jax.Array, FormatConfig, PlainConfig], Weight]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """One weight, and how that went."""

    weight: Weight

    damping: float | None = None
    """That the factorization took; None of a weight that needed none, or was packed by itself."""

    note: str = ""
    """Why it was, if the solve failed, or took more damping; and experts that had nothing to be solved for."""


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

    def __init__(self, grams: Grams, plain: Compress, *, layer: int | None = None, raw: Grams | None = None) -> None:
        """Args:
        grams: of the block's products.
        plain: packs a weight (..., D, F) by itself.
        layer: the block's number, to be named in errors; None of a table.
        raw: of rows as they are, by which Wanda's masks go; None where there are none (`goes_by_norms`).
        """
        self._grams = grams
        self._raw = raw
        self._plain = plain
        self._place = "" if layer is None else f"layer {layer}: "
        self._factors: dict[tuple[int, int, float, Pattern | None, str], Factor | str] = {}

    def pack(self, name: str, w: jax.Array, format: FormatConfig, config: SolverConfig) -> Packing:
        """The weight (D, F), or of experts (E, D, F), called `name` within its block. One whose solve fails is packed
        by itself, as are those of which its solver decides nothing (`is_decided`).

        Raises:
          InputError: the format cannot hold the weight by itself either.
        """
        if not isinstance(config, CalibratedConfig):
            return Packing(weight=self._plain(w, format, config))
        if not is_decided(format, config):
            return Packing(weight=self._plain(w, format, NearestConfig()))
        norms = None
        if goes_by_norms(config):
            assert self._raw is not None, f"{config} goes by norms"
            norms = measure_norms(self._raw[name])
        if isinstance(config, WandaConfig):
            assert norms is not None
            return Packing(weight=pack_wanda(w, norms, format))
        gram = self._grams[name]
        if w.ndim == 2:
            return self._solve(name, 0, w, gram, norms, format, config)
        packings = [
            self._solve(name, expert, w[expert], gram[expert], None if norms is None else norms[expert], format, config)
            for expert in range(len(w))
        ]
        weight: Weight = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(packing.weight for packing in packings))
        dampings = [packing.damping for packing in packings if packing.damping is not None]
        notes = [f"expert {expert}: {packing.note}" for expert, packing in enumerate(packings) if packing.note]
        return Packing(weight=weight, damping=max(dampings, default=None), note="; ".join(notes))

    def _solve(
        self,
        name: str,
        expert: int,
        w: jax.Array,
        gram: jax.Array,
        norms: jax.Array | None,
        format: FormatConfig,
        config: FeedbackConfig,
    ) -> Packing:
        """One weight (D, F), by the factor of its inputs."""
        # Of formats, only a pattern makes a difference to the factor: its groups stay together in any order.
        pattern = pattern_of(format) if config.order != "natural" else None
        damping, fault = config.damping, ""
        while True:
            key = (id(self._grams[name]), expert, damping, pattern, config.order)
            if key not in self._factors:
                self._factors[key] = find_factor(gram, format, config, damping)
            found = self._factors[key]
            if isinstance(found, str):
                break
            try:
                weight = pack_solved(w, found, format, config, norms)
            except FloatingPointError as error:
                fault, damping = str(error), 10.0 * found.damping
            else:
                raised = found.damping > config.damping
                why = fault or f"there is no factor with {config.damping:g}"
                note = f"damping was raised to {found.damping:g}: {why}" if raised else ""
                return Packing(weight=weight, damping=found.damping, note=note)
        weight = self._plain(w, format, NearestConfig())
        check_held(f"{self._place}{name}", w, weight)
        return Packing(weight=weight, note=f"rounded plainly: {fault or found}")


def solve_layers(
    model: Transformer,
    formats: Mapping[str, tuple[Sequence[FormatConfig], SolverConfig]],
    tokens: np.ndarray,
    *,
    batch: int,
    plain: Compress,
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
      batch: sequences at a time.
      plain: packs a weight by itself: one that is solved so, or whose solve fails.
      packed: the model with tables as they are packed already, whose errors the layers then make up for.
      reconstructor: tunes each layer once its weights are packed.
      workbench: where each layer is kept as soon as it is solved, and those of an earlier run are found.
      progress: as for `stream_blocks`.
    Raises:
      InputError: see `stream_blocks`, `check_observed` and `BlockSolver.pack`.
    """
    blocks = {name: found for name, found in formats.items() if name.startswith("layers.")}
    heads = {name: found for name, found in formats.items() if name not in blocks}
    inner = {full: full.removeprefix("layers.") for full in blocks}
    solved = [full for full, (_, config) in blocks.items() if isinstance(config, CalibratedConfig)]
    by_norms = any(goes_by_norms(config) for _, config in formats.values())
    parts: dict[str, list[Weight]] = {name: [] for name in formats}
    rows: list[LayerRow] = []
    tuned: list[BlockRow] = []

    def note(full: str, layer: int | None, w: jax.Array, held: jax.Array, gram: jax.Array, pack: Packing) -> None:
        rows.append(
            LayerRow(
                weight=full,
                layer=layer,
                format=name_format(formats[full][0][layer or 0]),
                output_error=keep_finite(measure_output(w, held, gram)),
                damping=pack.damping,
                note=pack.note,
            )
        )

    def solve_block(layer: int, block: Block, grams: Grams, streams: Streams) -> Block:
        check_observed(solved, grams)
        dense, solver = _read_weights(block), BlockSolver(grams, plain, layer=layer, raw=streams.raw)
        chosen = {name: (blocks[full][0][layer], blocks[full][1]) for full, name in inner.items()}
        packings = {name: solver.pack(name, dense[name], *how) for name, how in chosen.items()}
        for name, packing in packings.items():
            if is_decided(*chosen[name]) and (streams.counts[name] == 0).any():
                idle = ", ".join(map(str, np.flatnonzero(streams.counts[name] == 0)))
                told = f"no token went to expert {idle}"
                packings[name] = dataclasses.replace(packing, note="; ".join(filter(None, (packing.note, told))))
        packed = {name: packing.weight for name, packing in packings.items()}
        first = len(rows)
        found: list[BlockRow] = []
        if reconstructor is not None:
            kinds = {inner[full]: chosen[inner[full]][0] for full in solved}
            kinds = {name: format for name, format in kinds.items() if is_decided(*chosen[name])}
            if kinds:
                others = {name: to_dense(value) for name, value in packed.items() if name not in kinds}
                given = replace_weights(block, {name: w.astype(dense[name].dtype) for name, w in others.items()})
                changed, row = reconstructor.tune(layer, given, {name: packed[name] for name in kinds}, kinds, streams)
                packed |= changed
                found = [row]
        held = {name: to_dense(value).astype(dense[name].dtype) for name, value in packed.items()}
        for full, name in inner.items():
            if name in grams:
                note(full, layer, dense[name], held[name], grams[name], packings[name])
            parts[full].append(packed[name])
        tuned.extend(found)
        if workbench is not None:
            workbench.save_layer(layer, replace_weights(block, packed), rows[first:], found)
        return replace_weights(block, held)

    def recall(layer: int, block: Block) -> Block | None:
        if not blocks:
            return block
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

    def solve_head(gram: jax.Array, raw: jax.Array | None) -> None:
        for name, (chosen, config) in heads.items():
            w = named_weights(model)[name].get_value()
            solver = BlockSolver({name: gram}, plain, raw=None if raw is None else {name: raw})
            packing = solver.pack(name, w, chosen[0], config)
            note(name, None, w, to_dense(packing.weight).astype(w.dtype), gram, packing)
            parts[name].append(packing.weight)

    stream_blocks(
        model,
        tokens,
        batch=batch,
        solve=solve_block,
        recall=recall,
        finish=solve_head if heads else None,
        packed=packed,
        follow_dense=reconstructor is not None,
        raw=by_norms,
        progress=progress,
    )
    weights = {name: stack_layers(each) if name in blocks else each[0] for name, each in parts.items()}
    return SolvedLayers(weights=weights, rows=tuple(rows), blocks=tuple(tuned))


def _read_weights(block: Block) -> dict[str, Any]:
    return {name: param.get_value() for name, param in named_weights(block).items()}


def is_decided(format: FormatConfig, config: SolverConfig) -> bool:
    """Whether calibration has a say in what a weight in this format holds: a dense one has nothing to solve, and
    Wanda's masks are of what prunes."""
    if isinstance(config, WandaConfig):
        return pattern_of(format) is not None
    return isinstance(config, FeedbackConfig) and not isinstance(format, DenseConfig)


def goes_by_norms(config: SolverConfig) -> bool:
    """Whether masks are those of Wanda, which has norms of inputs as they are (2306.11695, eq. 1)."""
    return isinstance(config, WandaConfig) or (isinstance(config, FeedbackConfig) and config.mask == "wanda")


def check_observed(names: Iterable[str], grams: Grams) -> None:
    """Raises `InputError` for a weight of the layers that a block multiplies by nothing."""
    for name in names:
        if name.removeprefix("layers.") not in grams:
            raise InputError(f"{name} cannot be calibrated: no product reads it; give it the nearest solver")


@jax.jit
def measure_output(w: jax.Array, held: jax.Array, gram: jax.Array) -> jax.Array:
    """||X (w - held)|| / ||X w|| over all experts, float32 (), from X^T X (..., D, D) of each."""

    def square(v: jax.Array) -> jax.Array:
        return jnp.maximum(jnp.sum(v * jnp.matmul(gram, v, precision=jax.lax.Precision.HIGHEST)), 0.0)

    wide = w.astype(jnp.float32)
    whole = square(wide)
    return jnp.sqrt(jnp.where(whole > 0, square(wide - held.astype(jnp.float32)) / whole, 0.0))
