"""AdamW with warm-up, decay and clipping, assembled from optax."""

import dataclasses
from typing import Any, Literal

import jax
import optax
from flax import nnx

from hsai.compress.latent import Latent
from hsai.errors import InputError
from hsai.models.layers import is_matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (1711.05101) and its learning-rate schedule."""

    learning_rate: float = 3e-4
    """Peak learning rate, reached at the end of the warm-up."""

    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from zero."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to the last step."""

    final_fraction: float = 0.1
    """The learning rate at the last step, as a fraction of the peak; `constant` does not use it."""

    b1: float = 0.9
    """Decay of the running mean of gradients."""

    b2: float = 0.95
    """Decay of the running mean of squared gradients."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    weight_decay: float = 0.1
    """Pull of matrices towards zero, times the learning rate; gains of normalizations and scales are left out."""

    clip_norm: float = 1.0
    """Gradients whose global norm exceeds this are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip_norm"):
            if getattr(self, name) <= 0:
                raise InputError(f"optim.{name}={getattr(self, name)} must be positive")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optim.{name}={getattr(self, name)} must be in [0, 1)")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            name = "warmup_steps" if self.warmup_steps < 0 else "weight_decay"
            raise InputError(f"optim.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.final_fraction <= 1:
            raise InputError(f"optim.final_fraction={self.final_fraction} must be in [0, 1]")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step for a run of `steps` steps; step 0 already moves."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    falling = max(steps - config.warmup_steps - 1, 1)  # the first step after the warm-up has the peak, the last the end
    match config.schedule:
        case "cosine":
            fall = optax.cosine_decay_schedule(peak, falling, config.final_fraction)
        case "linear":
            fall = optax.linear_schedule(peak, final, falling)
        case "constant":
            fall = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return fall
    rise = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([rise, fall], [config.warmup_steps])


def matrix_mask(params: Any) -> Any:
    """True for the values of every matrix, False for its learned scales and minima and for gains, in the tree's own
    structure."""

    def mark(param: nnx.Variable) -> nnx.Variable:
        marks: nnx.Variable = jax.tree.map(lambda _: is_matrix(param), param)
        if not isinstance(param.get_value(), Latent):
            return marks
        mark: Any = marks.get_value()
        rest = {name: None if getattr(mark, name) is None else False for name in ("minimum", "sign")}
        return marks.replace(dataclasses.replace(mark, exponent=False, **rest))

    return jax.tree.map(mark, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip, AdamW, schedule: what `OptimizerConfig` says, for a run of `steps` steps."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=matrix_mask),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )
