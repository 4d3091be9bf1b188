"""The weights of one block, each solved over what it is multiplied by (`hsai.compress.solved`, `hsai.compress.wanda`).

A weight whose solve fails, for want of a factor or because its numbers run away, is tried again with more damping and
at last rounded plainly.

D contraction, F outputs, E experts.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hsai.compress.grid import Pattern, pattern_of
from hsai.compress.limits import check_held
from hsai.compress.plain import pack_weight
from hsai.compress.solved import Factor, find_factor, pack_solved
from hsai.compress.solvers import CalibratedConfig, FeedbackConfig, SolverConfig, WandaConfig
from hsai.compress.stream import Grams
from hsai.compress.wanda import measure_norms, pack_wanda
from hsai.formats import DenseConfig, FormatConfig, Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """One weight, and how that went."""

    weight: Weight

    damping: float | None = None
    """That the factorization took; None of a weight that needed none, or was packed by itself."""

    note: str = ""
    """Why it was, if the solve failed, or took more damping; and experts that had nothing to be solved for."""


class BlockSolver:
    """Packs the weights of one block; those with the same input share its factor."""

    def __init__(self, grams: Grams, squares: Mapping[str, jax.Array], *, layer: int | None = None) -> None:
        """Args:
        grams: of the block's products.
        squares: of the same rows as they are (`Streams.squares`); for Wanda's masks.
        layer: the block's number, to be named in errors; None of a table.
        """
        self._grams = grams
        self._squares = squares
        self._place = "" if layer is None else f"layer {layer}: "
        self._factors: dict[tuple[int, int, float, Pattern | None, str], Factor | str] = {}

    def pack(self, name: str, w: jax.Array, format: FormatConfig, config: SolverConfig) -> Packing:
        """The weight (D, F), or of experts (E, D, F), called `name` within its block. One whose solve fails is packed
        by itself, as are those of which its solver decides nothing (`is_decided`).

        Raises:
          InputError: the format cannot hold the weight by itself either.
        """
        if not isinstance(config, CalibratedConfig):
            return Packing(weight=pack_weight(w, format, config))
        if not is_decided(format, config):
            return Packing(weight=pack_weight(w, format))
        if isinstance(config, WandaConfig):
            return Packing(weight=pack_wanda(w, measure_norms(self._squares[name]), format))
        norms = measure_norms(self._squares[name]) if config.mask == "wanda" else None
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
        weight = pack_weight(w, format)
        check_held(f"{self._place}{name}", w, weight)
        return Packing(weight=weight, note=f"rounded plainly: {fault or found}")


def is_decided(format: FormatConfig, config: SolverConfig) -> bool:
    """Whether calibration has a say in what a weight in this format holds: a dense one has nothing to solve, and
    Wanda's masks are of what prunes."""
    if isinstance(config, WandaConfig):
        return pattern_of(format) is not None
    return isinstance(config, FeedbackConfig) and not isinstance(format, DenseConfig)
