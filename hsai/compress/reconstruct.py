"""Reconstruction: the weights of a solved block, tuned together until the block gives what the dense one gives.

A solver sees one weight at a time. Here all that were solved in a block are trained at once, on what the blocks before
it make of the calibration text: latent values and scales straight-through (`hsai.compress.latent`), masks as they are,
by Adam. In the spirit of BRECQ (2102.05426) and OmniQuant (2308.13137), which reconstruct blocks by rounding variables
and by clipping.

N sequences, B of them in a batch, T tokens, D embed, F outputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hsai.compress.latent import Latent, Straight, begin_latent, pack_latent, see_weight
from hsai.errors import InputError
from hsai.formats import FormatConfig, Weight, to_dense
from hsai.formats.storage import replace_weights
from hsai.models.transformer import Block

Apply = Callable[[Block, jax.Array, jax.Array], jax.Array]
"""(block with dense weights, number of the layer, (B, T, D)) -> (B, T, D)."""

Plan = tuple[tuple[str, Straight], ...]
Latents = dict[str, Weight]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """How long a block is tuned, and how fast."""

    steps: int = 100
    """Updates a block, each on a batch of the calibration; they go over it in turns, in random order."""

    learning_rate: float = 2e-3
    """Of Adam, falling to zero: a share of the root mean square of a weight's values, and of a scale."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"reconstruction.steps={self.steps} must be at least 1")
        if not 0 < self.learning_rate <= 1:
            raise InputError(f"reconstruction.learning_rate={self.learning_rate} must be above 0 and at most 1")


class Reconstructor:
    """Tunes one block after the other; those with the same formats share a program."""

    def __init__(self, apply: Apply, config: ReconstructionConfig, *, batch: int, seed: int) -> None:
        """Args:
        apply: the forward pass of a block.
        config: how long, and how fast.
        batch: B.
        seed: draws the order of batches.
        """
        self._apply = apply
        self._steps = config.steps
        self._batch = batch
        self._seed = seed
        falling = optax.cosine_decay_schedule(config.learning_rate, config.steps)
        # The loss is a share of the block's output, and its gradients may be far below the usual eps.
        self._optimizer = optax.chain(optax.scale_by_adam(b2=0.99, eps=1e-15), optax.scale_by_learning_rate(falling))

    def tune(
        self,
        layer: int,
        dense: Block,
        packed: Mapping[str, Weight],
        formats: Mapping[str, FormatConfig],
        hidden: np.ndarray,
    ) -> tuple[dict[str, Weight], float, float]:
        """The packed weights that come closest to the dense block, and the error of the block before and behind.

        The error is ||y - y'|| / ||y - x||, of what the dense and the packed block give for their input x. Where tuning
        does not lower it, the weights stay as they were.

        Args:
          layer: its number.
          dense: the block as it was.
          packed: its solved weights (D, F), by their names within the block.
          formats: theirs.
          hidden: (N, T, D), what the block reads.
        """
        hows = {name: _make_how(value, formats[name]) for name, value in packed.items()}
        latents = {name: begin_latent(packed[name], how) for name, how in hows.items()}
        units = {name: _find_unit(latent) for name, latent in latents.items()}
        number, plan = jnp.int32(layer), tuple(hows.items())
        before = self._measure(plan, latents, dense, number, hidden)
        tuned, state = latents, self._optimizer.init(latents)
        for start in self._draw_starts(layer, len(hidden)):
            x = jnp.asarray(hidden[start : start + self._batch])
            tuned, state = self._step(plan, tuned, state, units, dense, number, x)
        after = self._measure(plan, tuned, dense, number, hidden)
        if not after < before:
            return dict(packed), before, before
        return {name: pack_latent(tuned[name], how) for name, how in hows.items()}, before, after

    def _draw_starts(self, layer: int, count: int) -> np.ndarray:
        """The first sequence of each step's batch: all batches in random order, and again."""
        draw, batches = np.random.default_rng((self._seed, layer)), count // self._batch
        rounds = [draw.permutation(batches) for _ in range(-(-self._steps // batches))]
        return np.concatenate(rounds)[: self._steps] * self._batch

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _step(
        self,
        plan: Plan,
        latents: Latents,
        state: optax.OptState,
        units: Latents,
        dense: Block,
        layer: jax.Array,
        x: jax.Array,
    ) -> tuple[Latents, optax.OptState]:
        def lose(latents: Latents) -> jax.Array:
            missed, whole = self._compare(plan, latents, dense, layer, x)
            return missed / whole

        updates, state = self._optimizer.update(jax.grad(lose)(latents), state)
        return jax.tree.map(lambda w, update, unit: w + unit * update, latents, updates, units), state

    def _measure(self, plan: Plan, latents: Latents, dense: Block, layer: jax.Array, hidden: np.ndarray) -> float:
        sums = np.zeros(2)
        for start in range(0, len(hidden), self._batch):
            x = jnp.asarray(hidden[start : start + self._batch])
            sums += np.asarray(self._compare(plan, latents, dense, layer, x), np.float64)
        return float(np.sqrt(sums[0] / sums[1]))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _compare(
        self, plan: Plan, latents: Latents, dense: Block, layer: jax.Array, x: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """||y - y'||^2 and ||y - x||^2 of a batch."""
        seen = replace_weights(dense, {name: see_weight(latents[name], how) for name, how in plan})
        wanted = jax.lax.stop_gradient(self._apply(dense, layer, x)).astype(jnp.float32)
        found = self._apply(seen, layer, x).astype(jnp.float32)
        whole = jnp.sum(jnp.square(wanted - x.astype(jnp.float32)))
        return jnp.sum(jnp.square(wanted - found)), jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)


def _make_how(value: Weight, format: FormatConfig) -> Straight:
    """Scales are learned where there are some, and masks stay."""
    return Straight(format=format, learned=hasattr(value, "scale"), fixed=hasattr(format, "mask"), decay=0.0)


def _find_unit(latent: Weight) -> Weight:
    """What a learning rate of one would add: the root mean square of the values that are not pruned, and to the
    exponent of a scale one."""
    values = to_dense(latent)
    kept = jnp.maximum(jnp.sum(values != 0), 1)
    unit = jnp.sqrt(jnp.sum(jnp.square(values)) / kept)
    return Latent(unit, jnp.ones(())) if isinstance(latent, Latent) else unit
