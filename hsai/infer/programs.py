"""What runs on the device: reading a chunk of a prompt into pages, and writing several tokens of many rows.

Python is not between the tokens of a block: a loop on the device reads each row's last token, chooses the next, and
goes on until every row has ended or made what it may. Both take over the memory of the pages, and give them back.

The last token of a prompt is not read as a part of it, but is the first that a block reads. So there is one place where
tokens are chosen; a chunk of a prompt needs no logits; and a prompt that lies in the cache needs no reading.

B rows, T tokens of a chunk, M pages of a row, N steps, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hsai.export.steps import Arrays
from hsai.formats.storage import restore
from hsai.infer.choose import Chosen, Extras, Kind, Settings, choose_tokens
from hsai.infer.request import MOST_LOGPROBS
from hsai.models import KVCache, Transformer, TransformerConfig
from hsai.models.paged import PagedCache
from hsai.models.transformer import abstract_transformer

MOST_STEPS = 16
"""N."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Which tokens may be chosen, and which of them end a text."""

    size: int
    """V: the first ones."""

    stops: frozenset[int]
    """Their ids."""

    def ends(self, tokens: jax.Array) -> jax.Array:
        """bool: which of `tokens`, int32 of any shape, end a text."""
        found = jnp.zeros(tokens.shape, bool)
        for stop in sorted(self.stops):
            found |= tokens == stop
        return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a block; arrays of numpy where they are made, of jax inside of a program."""

    tokens: jax.Array
    """int32 (B,): the last token of each."""

    positions: jax.Array
    """int32 (B,): where it stands; -1 of a row that is not there."""

    limits: jax.Array
    """int32 (B,): how many tokens each may make."""

    table: jax.Array
    """int32 (B, M): its pages, with places for all the tokens that it may read."""

    settings: Settings
    """How its tokens are chosen."""

    history: jax.Array | None = None
    """int32 (B, S): all tokens of each by their positions, the last one included; for those who draft."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Made:
    """What a block made, step by step, or token by token where a step makes several."""

    tokens: jax.Array
    """int32 (N, B), of drafting blocks with a larger N; -1 where a row had ended, or the block."""

    logprobs: jax.Array | None = None
    """float32 (N, B); these and the next are there in the full kind."""

    top_tokens: jax.Array | None = None
    """int32 (N, B, MOST_LOGPROBS)."""

    top_logprobs: jax.Array | None = None
    """float32 (N, B, MOST_LOGPROBS)."""

    drafts: jax.Array | None = None
    """int32 (2, B), of drafting blocks: tokens drafted for each row, and accepted: those that it made beyond the one
    that each step makes in any case."""

    @property
    def steps(self) -> int:
        """N: how many the row that took most has taken; of arrays of numpy."""
        made = (self.tokens >= 0).sum(axis=0)
        return int((made if self.drafts is None else made - self.drafts[1]).max())


def make_read(config: TransformerConfig, formats: Mapping[str, Mapping[str, Any]]) -> Callable[..., KVCache]:
    """The program that reads a chunk of one prompt."""

    def read(
        weights: Arrays, tokens: jax.Array, start: jax.Array, count: jax.Array, table: jax.Array, pages: KVCache
    ) -> KVCache:
        """Reads the first `count` of `tokens`, int32 (1, T), at positions from `start` on, into pages of `table`."""
        model = restore(abstract_transformer(config), formats, weights)
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = jnp.where(places < count, start + places, -1)[None]
        return read_tokens(model, tokens, positions, PagedCache(pages, table))[1]

    return read


def make_write(
    config: TransformerConfig, formats: Mapping[str, Mapping[str, Any]], vocabulary: Vocabulary, kind: Kind
) -> Callable[..., tuple[Made, KVCache]]:
    """The program that writes a block of tokens."""

    def write(
        weights: Arrays, rows: Rows, extras: Extras | None, steps: jax.Array, pages: KVCache
    ) -> tuple[Made, KVCache]:
        """Makes up to `steps`, int32 () of at most MOST_STEPS, tokens of each row, fewer where a row ends.

        Of a row that ends by a stop, that is its last token. What is allowed holds for the first step only.
        """
        model = restore(abstract_transformer(config), formats, weights)
        batch = rows.tokens.shape[0]
        shape = (MOST_STEPS, batch)
        made = Made(jnp.full(shape, -1, jnp.int32))
        if extras is not None:
            top = (*shape, MOST_LOGPROBS)
            made = Made(made.tokens, jnp.zeros(shape), jnp.zeros(top, jnp.int32), jnp.zeros(top))
        State = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, Made, KVCache]

        def goes_on(state: State) -> jax.Array:
            return (state[0] < steps) & jnp.any(state[2] >= 0)

        def step(state: State) -> State:
            index, tokens, positions, seen, made, pages = state
            hidden, pages = read_tokens(model, tokens[:, None], positions[:, None], PagedCache(pages, rows.table))
            settings = dataclasses.replace(rows.settings, step=rows.settings.step + index)
            now = None if extras is None or seen is None else dataclasses.replace(extras, seen=seen)
            logits = model.logits(hidden)[:, 0]
            chosen = choose_tokens(logits, settings, now, kind=kind, vocab=vocabulary.size)
            there = positions >= 0
            made = _put(made, index, dataclasses.replace(chosen, token=jnp.where(there, chosen.token, -1)))
            ended = (index + 1 >= rows.limits) | vocabulary.ends(chosen.token)
            if seen is not None:
                seen = seen.at[jnp.arange(batch), chosen.token].set(True)
            return index + 1, chosen.token, jnp.where(there & ~ended, positions + 1, -1), seen, made, pages

        seen = None if extras is None else extras.seen
        start = (jnp.zeros((), jnp.int32), rows.tokens, rows.positions, seen, made, pages)
        return jax.lax.while_loop(goes_on, step, start)[4:]

    return write


def read_tokens(
    model: Transformer, tokens: jax.Array, positions: jax.Array, cache: PagedCache
) -> tuple[jax.Array, KVCache]:
    """Hidden states (B, T, D) of tokens at `positions` (B, T), and the pages with them."""
    hidden, cached = model(tokens, positions=positions, cache=cache)
    assert cached is not None, "a model that is given a cache returns one"
    return hidden, cached.pages


def _put(made: Made, index: jax.Array, chosen: Chosen) -> Made:
    """What was made, with a step more."""
    parts = [(made.tokens, chosen.token), (made.logprobs, chosen.logprob)]
    parts += [(made.top_tokens, chosen.top_tokens), (made.top_logprobs, chosen.top_logprobs)]
    return Made(*(None if old is None else old.at[index].set(new) for old, new in parts))  # type: ignore[arg-type]
