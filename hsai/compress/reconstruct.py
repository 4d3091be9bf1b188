"""Reconstruction, block by block: what a solver packed is tuned until the block gives what the dense model gave.

A solver answers for one product at a time. Here all weights of a block answer together for its output: on what the
packed blocks before it hand on, it shall give what the dense block gave in the dense model, so that it also makes up
for the errors before it (BRECQ, 2102.05426; inputs and targets as in AdaQuant, 2006.10518, section 3.2). Values and
scales are tuned behind the rounding (`hsai.compress.latent`); masks stay those of the solver, or go on from there by
the magnitudes of what is tuned (SR-STE, 2102.04010).

The distance is |y - t|^2 / |t|^2 of a token, averaged over tokens. Without the division the few tokens on which a
trained model parks its attention, whose activations are a hundred times the others', would be all that is fitted.

A part of the windows is kept out of the tuning and decides: a block that does not get better on them stays as the
solver left it.

N windows, B of them in a batch, T tokens each, D embed.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hsai.compress.grid import grid_of, pattern_of
from hsai.compress.latent import Latent, Straight, begin_latent, pack_latent, pull_pruned, see_weight
from hsai.compress.ledger import BlockRow, keep_finite
from hsai.compress.stream import Streams, apply_block
from hsai.errors import InputError
from hsai.formats import FormatConfig, Weight, to_dense
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer
from hsai.models.transformer import Block
from hsai.sharding import lay_out

Ways = tuple[tuple[str, Straight], ...]
"""How each weight of a block, by its name within the block, is seen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """How long and how fast each block is tuned."""

    steps: int = 128
    """Updates of each block, one batch of the calibration each."""

    learning_rate: float = 0.03
    """Of Adam at the start, as a share of what packing changed of each weight (the root mean square of it); falls to
    zero along a cosine. So few bits take the larger steps that they need. Of minima too, where a format has them."""

    scale_rate: float = 0.003
    """The same for the exponents of scales: 0.01 is a step of 0.7 %."""

    held_share: float = 0.125
    """Share of the windows that are not tuned on and decide whether a block got better; at least one batch."""

    masks: Literal["fixed", "learned"] = "fixed"
    """Of formats that prune: the solver's to the end, or chosen anew in each step by magnitudes, from the solver's
    on (SR-STE)."""

    decay: float = 0.0
    """Pull of what learned masks prune towards zero: the share of it that the first step takes; falls as the learning
    rate does. It is no part of the gradient, as SR-STE's is: Adam would make whole steps of it, however small it is."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"reconstruction.steps={self.steps} must be at least 1")
        for name in ("learning_rate", "scale_rate"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"reconstruction.{name}={getattr(self, name)} must be above 0 and below 1")
        if not 0 < self.held_share < 1:
            raise InputError(f"reconstruction.held_share={self.held_share} must be above 0 and below 1")
        if not 0 <= self.decay < 1:
            raise InputError(f"reconstruction.decay={self.decay} must be at least 0 and below 1")
        if self.decay > 0 and self.masks == "fixed":
            raise InputError(
                f"reconstruction.decay={self.decay} pulls what learned masks prune, and masks='fixed' stay as they "
                "are; leave it 0, or set masks='learned'"
            )

    def count_held(self, batches: int) -> int:
        """How many of so many batches are held out."""
        return min(max(round(self.held_share * batches), 1), batches - 1)


class Reconstructor:
    """Tunes the blocks of one model; blocks of the same formats share their programs."""

    def __init__(self, model: Transformer, config: ReconstructionConfig, *, batch: int, seed: int) -> None:
        """Args:
        model: whose blocks they are.
        config: how each is tuned.
        batch: B.
        seed: draws the order of the windows.
        """
        self._config, self._batch, self._seed = config, batch, seed
        schedule = optax.cosine_decay_schedule(1.0, config.steps)
        optimizer = optax.chain(optax.scale_by_adam(b2=0.99), optax.scale_by_learning_rate(schedule))
        self._optimizer, self._schedule = optimizer, schedule

        def measure(
            latents: dict[str, Weight], block: Block, layer: jax.Array, x: jax.Array, target: jax.Array, ways: Ways
        ) -> jax.Array:
            seen: dict[str, Weight] = {name: see_weight(latents[name], how) for name, how in ways}
            y = apply_block(model, replace_weights(block, seen), layer, x).astype(jnp.float32)
            wide = target.astype(jnp.float32)
            missed = jnp.sum(jnp.square(y - wide), axis=-1)
            return jnp.mean(missed / jnp.maximum(jnp.sum(jnp.square(wide), axis=-1), jnp.finfo(jnp.float32).tiny))

        @functools.partial(jax.jit, static_argnames="ways", donate_argnums=(0, 1))
        def step(
            latents: dict[str, Weight],
            state: optax.OptState,
            units: dict[str, Weight],
            block: Block,
            layer: jax.Array,
            x: jax.Array,
            target: jax.Array,
            pull: jax.Array,
            ways: Ways,
        ) -> tuple[dict[str, Weight], optax.OptState]:
            grads = jax.grad(measure)(latents, block, layer, x, target, ways)
            updates, state = optimizer.update(grads, state)
            pulled = {name: pull_pruned(latents[name], how, pull) for name, how in ways}
            return jax.tree.map(lambda p, u, unit: p + u * unit, pulled, updates, units), state

        self._measure = jax.jit(measure, static_argnames="ways")
        self._step = step

    def tune(
        self, layer: int, block: Block, packed: Mapping[str, Weight], formats: Mapping[str, FormatConfig], data: Streams
    ) -> tuple[dict[str, Weight], BlockRow]:
        """The packed weights of a block, tuned, and how far its output was and is from the dense one.

        Args:
          layer: its number.
          block: with dense weights; those that are not in `packed` stay as they are.
          packed: by the weight's name within the block.
          formats: of `packed`; none with outliers, which `plan_recipe` refuses.
          data: what reaches the block, and what it shall give.
        """
        assert data.targets is not None, "the dense stream was not followed"
        ways = tuple((name, self._find_way(format)) for name, format in formats.items())
        dense = {name: param.get_value() for name, param in named_weights(block).items()}
        latents = {name: begin_latent(packed[name], how, dense[name]) for name, how in ways}
        units = {name: self._find_unit(latent, packed[name], dense[name]) for name, latent in latents.items()}
        batches = np.arange(len(data.inputs)).reshape(-1, self._batch)
        held = self._config.count_held(len(batches))
        order = np.random.default_rng((self._seed, layer)).permutation(len(batches))
        tuned_on, held_out = order[held:], order[:held]
        number = jnp.int32(layer)

        def take(index: int) -> tuple[jax.Array, jax.Array]:
            assert data.targets is not None
            rows, axes = batches[index], ("batch", "seq", "embed")
            return lay_out(data.inputs[rows], *axes), lay_out(data.targets[rows], *axes)

        def judge(latents: dict[str, Weight]) -> float:
            errors = [float(self._measure(latents, block, number, *take(i), ways=ways)) for i in held_out]
            return float(np.sqrt(np.mean(errors)))

        before = judge(latents)
        state = self._optimizer.init(latents)
        for count in range(self._config.steps):
            x, target = take(tuned_on[count % len(tuned_on)])
            pull = self._config.decay * self._schedule(count)
            latents, state = self._step(latents, state, units, block, number, x, target, pull, ways=ways)
        after = judge(latents)
        row = BlockRow(
            layer=layer,
            error_solved=keep_finite(before),
            error_tuned=keep_finite(after),
            tuned=math.isfinite(after) and not after >= before,  # any number is better than none
            note=_name_divergence(before, after),
        )
        if not row.tuned:
            return dict(packed), row
        return {name: pack_latent(latents[name], how) for name, how in ways}, row

    def _find_way(self, format: FormatConfig) -> Straight:
        """How a weight of this format is seen while it is tuned."""
        fixed = pattern_of(format) is not None and self._config.masks == "fixed"
        return Straight(format=format, learned=grid_of(format) is not None, fixed=fixed, decay=0)

    def _find_unit(self, latent: Weight, packed: Weight, dense: jax.Array) -> Weight:
        """How large a step is at the start, in the tree of the latent weight."""
        changed = jnp.square(to_dense(packed) - dense.astype(jnp.float32))
        size = self._config.learning_rate * jnp.sqrt(jnp.mean(changed))
        if not isinstance(latent, Latent):
            return size
        minimum, sign = (None if part is None else size for part in (latent.minimum, latent.sign))
        return Latent(size, jnp.float32(self._config.scale_rate), minimum, sign)


def _name_divergence(before: float, after: float) -> str:
    """What a row says of errors that are no numbers."""
    if not math.isfinite(before):
        return f"the block's error is {before:g} as it was solved, and {after:g} after tuning"
    return "" if math.isfinite(after) else f"tuning diverged to {after:g}; the block stays as it was solved"
