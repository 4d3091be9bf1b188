"""Chooses the next token from logits: the likeliest one, or a draw from a narrowed distribution.

The draw is a function of (seed, step) alone, so that the same seed gives the same text.

B batch, V vocabulary.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from hsai.errors import InputError

LOWEST_TEMPERATURE = 1e-4
"""Below it, logits that are divided by it leave float32; and a draw has long been the likeliest token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen; the narrowings apply in the order of their fields."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""

    top_k: int | None = None
    """Keeps this many of the likeliest tokens; none keeps all."""

    top_p: float | None = None
    """Keeps the likeliest tokens until their probabilities reach this sum (1904.09751); none keeps all."""

    min_p: float | None = None
    """Keeps tokens of at least this fraction of the likeliest one's probability (2407.01082); none keeps all."""

    seed: int = 0
    """Of the draws; has no say at temperature 0."""

    def __post_init__(self) -> None:
        if self.temperature != 0 and not (LOWEST_TEMPERATURE <= self.temperature < math.inf):
            raise InputError(f"temperature={self.temperature} must be 0 (greedy), or at least {LOWEST_TEMPERATURE}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} must be between 0 and {2**32 - 1}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k} must be at least 1, or none")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must be above 0 and at most 1, or none")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p={self.min_p} must be between 0 and 1, or none")
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise InputError(
                    f"{name}={getattr(self, name)} has no effect at temperature=0 (greedy); set a temperature above 0"
                )


class Sampler:
    """Draws tokens as its config says; one compiled program serves every config but the greedy one."""

    def __init__(self, config: SamplingConfig, vocab: int) -> None:
        """Chooses among the first `vocab` of the logits: a model may have more, for which the tokenizer has no text."""
        self.config = config
        self._choose = functools.partial(_choose_greedy, vocab=vocab)
        if config.temperature > 0:
            self._choose = functools.partial(
                _draw,
                key=jax.random.key(config.seed),
                temperature=config.temperature,
                top_k=vocab if config.top_k is None else min(config.top_k, vocab),
                top_p=1.0 if config.top_p is None else config.top_p,
                min_p=0.0 if config.min_p is None else config.min_p,
                vocab=vocab,
            )

    def __call__(self, logits: jax.Array, step: int) -> jax.Array:
        """(B, V) float32 logits of the text's `step`-th new token -> int32 (B,)."""
        return self._choose(logits, step=step)


@functools.partial(jax.jit, static_argnames="vocab")
def _choose_greedy(logits: jax.Array, *, step: jax.Array, vocab: int) -> jax.Array:
    """The likeliest token of each row, of equals the first; `step` is there for `_draw`'s sake."""
    return jnp.argmax(logits[:, :vocab], axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="vocab")
def _draw(
    logits: jax.Array,
    *,
    step: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    vocab: int,
) -> jax.Array:
    """A token of each row, drawn from what the narrowings leave; the likeliest one always stays."""
    ranked, ids = jax.lax.top_k(logits[:, :vocab] / temperature, vocab)
    rank = jnp.arange(vocab)
    ranked = jnp.where(rank < top_k, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # At top_p=1 nothing may fall to rounding: the sum before the last tokens can come out as 1.
    keep = (before < top_p) | (top_p >= 1.0)
    keep = (keep & (probabilities >= min_p * probabilities[:, :1])) | (rank == 0)
    chosen = jax.random.categorical(jax.random.fold_in(key, step), jnp.where(keep, ranked, -jnp.inf), axis=-1)
    return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)
