"""Chooses the next token of each row from its logits, on the device: the likeliest one, or a draw.

A draw is a function of a row's logits, its seed and its step alone: neither its place among the rows nor what they ask
for has a say. Nothing here sorts: on a CPU sorting the logits of one token of a vocabulary of 49,152 takes longer than
a model of 135M parameters takes to make them. What is kept is all above a threshold, found by bisection of the floats'
bit patterns; and the draw is a race of the tokens, whose noise a draft model shares (speculation.py).

B rows, V tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hsai.infer.request import MOST_LOGPROBS
from hsai.infer.sampling import SamplingConfig

Kind = Literal["greedy", "drawn", "full"]
"""What a program has: the likeliest token only; draws too; or also penalties, masks and probabilities."""

KEEP_ALL = 2**31 - 1
"""As top_k: more than any vocabulary has."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """What the rows ask for, and where they stand; arrays of numpy where they are made, of jax inside of a program."""

    temperature: jax.Array
    """float32 (B,); 0 takes the likeliest."""

    top_k: jax.Array
    """int32 (B,); V or more keeps all."""

    top_p: jax.Array
    """float32 (B,); 1 keeps all."""

    min_p: jax.Array
    """float32 (B,); 0 keeps all."""

    penalty: jax.Array
    """float32 (B,); 1 does nothing."""

    seed: jax.Array
    """uint32 (B,)."""

    step: jax.Array
    """int32 (B,): which of its new tokens a row is to get, from 0."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extras:
    """What only the full kind reads."""

    seen: jax.Array
    """bool (B, V): tokens that the prompt or the text has."""

    allowed: jax.Array
    """uint32 (B, ceil(V / 32)): a bit for each token that may be chosen, the lowest first."""

    probable: jax.Array
    """bool (): whether any row wants to know probabilities."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """What was chosen, and of the full kind how likely it was, as the model has it: zeros if nobody wants to know."""

    token: jax.Array
    """int32 (B,)."""

    logprob: jax.Array | None = None
    """float32 (B,)."""

    top_tokens: jax.Array | None = None
    """int32 (B, MOST_LOGPROBS), likeliest first; -1 beyond the vocabulary."""

    top_logprobs: jax.Array | None = None
    """float32 (B, MOST_LOGPROBS)."""


def stack_settings(rows: Sequence[tuple[SamplingConfig, int]], batch: int) -> Settings:
    """The settings and steps of rows, as numpy's arrays; those up to `batch` choose the likeliest."""
    rows = [*rows, *[(SamplingConfig(), 0)] * (batch - len(rows))]
    configs = [config for config, _ in rows]
    arrays: dict[str, Any] = {
        "temperature": np.array([c.temperature for c in configs], np.float32),
        "top_k": np.array([min(c.top_k or KEEP_ALL, KEEP_ALL) for c in configs], np.int32),
        "top_p": np.array([1.0 if c.top_p is None else c.top_p for c in configs], np.float32),
        "min_p": np.array([c.min_p or 0.0 for c in configs], np.float32),
        "penalty": np.array([c.repetition_penalty for c in configs], np.float32),
        "seed": np.array([c.seed for c in configs], np.uint32),
        "step": np.array([step for _, step in rows], np.int32),
    }
    return Settings(**arrays)


def choose_tokens(logits: jax.Array, settings: Settings, extras: Extras | None, *, kind: Kind, vocab: int) -> Chosen:
    """The next token of each row.

    Args:
      logits: float32 (B, V or more): a model may have more than the tokenizer has text for; these are never chosen.
      settings: of the rows.
      extras: for the full kind.
      kind: "greedy" wants temperatures of 0 and no penalties, "drawn" no penalties.
      vocab: V.
    """
    logits = logits[:, :vocab]
    if kind == "greedy":
        return Chosen(_find_likeliest(logits))
    if extras is None:
        return Chosen(_choose(logits, settings))
    punished = jax.lax.cond(
        jnp.any(settings.penalty != 1.0), _punish, lambda logits, *_: logits, logits, settings.penalty, extras.seen
    )
    bits = extras.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    allowed = bits.reshape(bits.shape[0], -1)[:, :vocab] != 0
    token = _choose(jnp.where(allowed, punished, -jnp.inf), settings)
    return Chosen(token, *jax.lax.cond(extras.probable, _weigh, _weigh_nothing, logits, token))


def _find_likeliest(logits: jax.Array) -> jax.Array:
    """int32 (B,): of equals the first.

    In two passes: XLA's argmax takes four times as long on a CPU, and its top_k becomes a sort of the whole vocabulary
    where a compiler's pass does not recognize it, which depends on what stands around it.
    """
    vocab = logits.shape[1]
    largest = jnp.max(logits, axis=1, keepdims=True)
    return jnp.min(jnp.where(logits == largest, jnp.arange(vocab, dtype=jnp.int32), vocab - 1), axis=1)


def _choose(logits: jax.Array, settings: Settings) -> jax.Array:
    """int32 (B,): a draw where the temperature is above 0."""
    likeliest = _find_likeliest(logits)
    greedy = settings.temperature == 0.0
    drawn = jax.lax.cond(jnp.all(greedy), lambda *_: likeliest, _draw, logits, settings)
    return jnp.where(greedy, likeliest, drawn)


def _draw(logits: jax.Array, settings: Settings) -> jax.Array:
    """int32 (B,): drawn from what the narrowings leave; the likeliest always stays."""
    vocab = logits.shape[1]
    scaled = logits / jnp.where(settings.temperature == 0.0, 1.0, settings.temperature)[:, None]
    rank = _order(scaled)
    weights = jnp.exp(scaled - jnp.max(scaled, axis=1, keepdims=True))

    def keep(narrows: jax.Array, amounts: jax.Array, limit: jax.Array) -> jax.Array:
        """bool (B, V): tokens before which, likeliest first, there is less than `limit` (B,); all if nobody narrows."""
        found = jax.lax.cond(
            jnp.any(narrows),
            _find_threshold,
            lambda *_: jnp.full(limit.shape, _LOWEST, jnp.int32),
            rank,
            amounts,
            limit,
        )
        return (rank >= found[:, None]) | ~narrows[:, None]

    kept = keep(settings.top_k < vocab, jnp.ones_like(weights), settings.top_k.astype(jnp.float32))
    weights = jnp.where(kept, weights, 0.0)
    kept = keep(settings.top_p < 1.0, weights, settings.top_p * jnp.sum(weights, axis=1))
    kept &= weights >= settings.min_p[:, None]  # the likeliest one's weight is 1
    return _race(jnp.where(kept, weights, 0.0), settings.seed, settings.step)


_LOWEST = -(2**31)


def _order(x: jax.Array) -> jax.Array:
    """int32 that are ordered as the floats are."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)  # a zero has one sign
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _find_threshold(rank: jax.Array, amounts: jax.Array, limit: jax.Array) -> jax.Array:
    """int32 (B,): the lowest number such that the `amounts` (B, V) of higher ranks add up to less than `limit` (B,).

    Nothing lies above the highest rank: it is a threshold as long as `limit` is above 0.
    """

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # too low, and a threshold
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = jnp.sum(jnp.where(rank > middle[:, None], amounts, 0.0), axis=1)
        return jnp.where(above < limit, low, middle), jnp.where(above < limit, middle, high)

    start = (jnp.full(limit.shape, _LOWEST, jnp.int32), jnp.max(rank, axis=1))
    return jax.lax.fori_loop(0, 32, halve, start)[1]


def _race(weights: jax.Array, seed: jax.Array, step: jax.Array) -> jax.Array:
    """int32 (B,): tokens with probabilities in proportion to their weights (B, V), of which one in a row is 1.

    Each token comes after a time that is exponentially distributed, divided by its weight, and the first one wins: the
    Gumbel-max trick without its logarithm. Times are a function of seed, step and token alone. So two models that weigh
    tokens nearly alike mostly draw the same one, where inverting cumulated weights would shift one's tokens against the
    other's: with a total variation distance d, at least (1 - d) / (1 + d) of the time (Daliri et al., 2408.07978).
    """

    def draw(seed: jax.Array, step: jax.Array) -> jax.Array:
        first, second = jax.random.bits(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step), (2,))
        return _mix(_mix(jnp.arange(weights.shape[1], dtype=jnp.uint32) + first) ^ second)

    # In steps of 2**-32 near 0, where the winners are; below 1, after which no time would be finite.
    uniform = (jax.vmap(draw)(seed, step).astype(jnp.float32) + 0.5) * 2.0**-32
    times = -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))
    return _find_likeliest(weights / times)


def _mix(x: jax.Array) -> jax.Array:
    """A permutation of uint32 that flips about half of the bits for any bit of its argument: C. Wellons' lowbias32.

    (A Threefry of each token would cost a CPU more than all the rest of a draw.)
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """(B, C, ...) and (B,) -> (B, ...)."""
    return jax.vmap(lambda row, at: row[at])(x, index)


def _punish(logits: jax.Array, penalty: jax.Array, seen: jax.Array) -> jax.Array:
    """Logits of seen tokens, lower where the penalty is above 1."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _weigh(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logarithms of the probabilities of the tokens, and of the likeliest ones, with these between."""
    total = jax.nn.logsumexp(logits, axis=1)
    values, tokens = jax.lax.top_k(logits, min(MOST_LOGPROBS, logits.shape[1]))
    missing = ((0, 0), (0, MOST_LOGPROBS - values.shape[1]))
    return (
        _take(logits, token) - total,
        jnp.pad(tokens.astype(jnp.int32), missing, constant_values=-1),
        jnp.pad(values - total[:, None], missing, constant_values=-jnp.inf),
    )


def _weigh_nothing(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Zeros in the shapes of `_weigh`."""
    shape = (*token.shape, MOST_LOGPROBS)
    return jnp.zeros(token.shape), jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
