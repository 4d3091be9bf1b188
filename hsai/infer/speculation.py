"""Speculation on the device: a step drafts the next tokens of each row, reads them all at once, and keeps what it would
have said itself. So it makes several tokens for about the time of one, as long as weights are what takes time.

The usual rule (Leviathan et al., 2211.17192; Chen et al., 2302.01318) accepts a draft by a draw of its own, and keeps
the distribution of the text. Here a token is a function of logits and noise, and the noise one of seed and step
(choose.py): the model chooses the token of every place with that place's noise, and a draft is accepted if it is that
token. So the text itself is the one without speculation, for every seed and setting, and drafts only decide how soon it
is there. A draft model chooses with the same noise, and then agrees nearly as often as by the best rule there could be
(Daliri et al., 2408.07978: drafter-invariant speculation by Gumbel coupling).

Two can draft. *Prompt lookup* (Saxena, 2023) finds where the row's last tokens stood before, and proposes what followed
there: it costs nothing, and pays where a text repeats itself or its prompt. A *draft model* is a smaller or sparser one
with the same tokenizer, and has pages of its own, in the places that the same table says.

Keys and values of rejected drafts stay in the pages: they lie behind the row's last token, nobody's attention looks
there, and the tokens that come are written over them.

B rows, T tokens read, K drafts, S slots of a row, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from hsai.export.steps import Arrays
from hsai.formats.storage import restore
from hsai.infer.choose import Kind, Settings, choose_tokens
from hsai.infer.programs import MOST_STEPS, Made, Rows, Vocabulary, read_tokens
from hsai.models import KVCache, Transformer, TransformerConfig
from hsai.models.paged import PagedCache
from hsai.models.transformer import abstract_transformer

SHORTEST, LONGEST = 2, 3
"""Tokens that must stand before the last one's follower again, and that are looked at: one by itself says little."""

C = TypeVar("C")

Described = tuple[TransformerConfig, Mapping[str, Mapping[str, Any]]]
"""A model without its weights: its config, and their formats."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """A block between two steps."""

    index: jax.Array
    """int32 (): steps made."""

    tokens: jax.Array
    """int32 (B,): the last token of each row."""

    positions: jax.Array
    """int32 (B,): where it stands; -1 of a row that has ended, or is not there."""

    history: jax.Array
    """int32 (B, S), as of `Rows`."""

    count: jax.Array
    """int32 (B,): tokens made."""

    made: jax.Array
    """int32 (B, N): these tokens; -1 behind them."""

    drafts: jax.Array
    """int32 (2, B), as of `Made`."""

    pages: KVCache
    draft_pages: KVCache | None


def make_speculating_write(
    target: Described, draft: Described | None, vocabulary: Vocabulary, kind: Kind, drafts: int
) -> Callable[..., tuple[Made, KVCache, KVCache | None]]:
    """The program that writes a block of tokens with drafts.

    Args:
      target: the model.
      draft: the one that drafts; None looks them up.
      vocabulary: of both.
      kind: "greedy" or "drawn".
      drafts: K.
    """

    def write(
        weights: Arrays,
        draft_weights: Arrays | None,
        rows: Rows,
        steps: jax.Array,
        pages: KVCache,
        draft_pages: KVCache | None,
    ) -> tuple[Made, KVCache, KVCache | None]:
        """Makes up to 1 + K tokens of each row in each of `steps`, int32 () of at most MOST_STEPS.

        A row never makes more than its limit, and ends by a stop, which is its last token then. The draft model has
        read all of a row but its last two tokens before, and has after.
        """
        assert rows.history is not None, "who drafts knows the rows' tokens"
        model = restore(abstract_transformer(target[0]), target[1], weights)
        helper = None
        if draft is not None and draft_weights is not None:
            helper = restore(abstract_transformer(draft[0]), draft[1], draft_weights)
        batch = rows.tokens.shape[0]
        lines = jnp.arange(batch)[:, None]
        places = jnp.arange(drafts + 1, dtype=jnp.int32)

        def choose(logits: jax.Array, settings: Settings, place: jax.Array | int) -> jax.Array:
            settings = dataclasses.replace(settings, step=settings.step + place)
            return choose_tokens(logits, settings, None, kind=kind, vocab=vocabulary.size).token

        def check(state: _State, settings: Settings, drafted: jax.Array, pages: KVCache) -> tuple[jax.Array, KVCache]:
            """Reads the last token and `drafted`, int32 (B, up to K), -1 from where there are none: what is made of
            them, int32 (B, K + 1), -1 from where nothing is."""
            tokens = jnp.concatenate([state.tokens[:, None], drafted], axis=1)
            ahead = jnp.where(drafted >= 0, state.positions[:, None] + 1 + places[: drafted.shape[1]], -1)
            at = jnp.concatenate([state.positions[:, None], ahead], axis=1)
            hidden, pages = read_tokens(model, jnp.maximum(tokens, 0), at, PagedCache(pages, rows.table))
            logits = model.logits(hidden)
            drafted = jnp.pad(drafted, ((0, 0), (0, 1)), constant_values=-1)  # nothing agrees with the last place

            def goes_on(progress: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
                return (progress[0] < drafted.shape[1]) & jnp.any(progress[1])

            def choose_place(progress: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
                # Place by place: draws take their time as well, and those behind a wrong draft are in vain.
                place, open_, made = progress
                chosen = choose(logits[:, place], settings, place)
                made = made.at[:, place].set(jnp.where(open_, chosen, -1))
                return place + 1, open_ & (chosen == drafted[:, place]) & ~vocabulary.ends(chosen), made

            begin = (jnp.zeros((), jnp.int32), state.positions >= 0, jnp.full((batch, drafts + 1), -1, jnp.int32))
            return jax.lax.while_loop(goes_on, choose_place, begin)[2], pages

        def goes_on(state: _State) -> jax.Array:
            return (state.index < steps) & jnp.any(state.positions >= 0)

        def step(state: _State) -> _State:
            settings = dataclasses.replace(rows.settings, step=rows.settings.step + state.count)
            there = state.positions >= 0
            wanted = jnp.where(there, jnp.clip(rows.limits - state.count - 1, 0, drafts), 0)
            draft_pages = state.draft_pages
            if helper is None or draft_pages is None:
                drafted = look_up(state.history, state.positions, drafts)
                drafted = jnp.where(places[:-1] < wanted[:, None], drafted, -1)
                found = jnp.any(drafted >= 0)
                made = jnp.full((batch, drafts + 1), -1, jnp.int32)
                made, pages = _when(found, lambda at: check(state, settings, drafted, at[1]), (made, state.pages))
                made, pages = _when(~found, lambda at: check(state, settings, drafted[:, :0], at[1]), (made, pages))
            else:
                drafted, draft_pages = _draft(
                    helper,
                    state,
                    wanted,
                    drafts,
                    lambda logits, place: choose(logits, settings, place),
                    PagedCache(draft_pages, rows.table),
                )
                made, pages = check(state, settings, drafted, state.pages)
            new = jnp.sum(made >= 0, axis=1, dtype=jnp.int32)
            last = jnp.take_along_axis(made, jnp.maximum(new - 1, 0)[:, None], axis=1)[:, 0]
            count = state.count + new
            ended = (count >= rows.limits) | vocabulary.ends(last)

            def put(into: jax.Array, at: jax.Array) -> jax.Array:
                """`into` (B, ...) with what was made at indices (B, K + 1)."""
                return into.at[lines, jnp.where(made >= 0, at, into.shape[1])].set(made, mode="drop")

            return _State(
                index=state.index + 1,
                tokens=last,
                positions=jnp.where(there & ~ended, state.positions + new, -1),
                history=put(state.history, state.positions[:, None] + 1 + places),
                count=count,
                made=put(state.made, state.count[:, None] + places),
                drafts=state.drafts + jnp.stack([jnp.sum(drafted >= 0, axis=1), jnp.maximum(new - 1, 0)]),
                pages=pages,
                draft_pages=draft_pages,
            )

        none = jnp.zeros((batch,), jnp.int32)
        begin = _State(
            index=jnp.zeros((), jnp.int32),
            tokens=rows.tokens,
            positions=rows.positions,
            history=rows.history,
            count=none,
            made=jnp.full((batch, MOST_STEPS * (drafts + 1)), -1, jnp.int32),
            drafts=jnp.stack([none, none]),
            pages=pages,
            draft_pages=draft_pages,
        )
        end = jax.lax.while_loop(goes_on, step, begin)
        return Made(end.made.T, drafts=end.drafts), end.pages, end.draft_pages

    return write


def _when(condition: jax.Array, run: Callable[[C], C], state: C) -> C:
    """`run(state)` where the condition holds. XLA copies large arrays in front of a `cond`, and not of a loop."""
    return jax.lax.while_loop(lambda at: at[0], lambda at: (jnp.zeros((), bool), run(at[1])), (condition, state))[1]


def look_up(history: jax.Array, positions: jax.Array, drafts: int) -> jax.Array:
    """What followed where the last tokens stood before: LONGEST of them, else fewer, but SHORTEST; there the latest.

    What followed goes on with itself where it reaches the end of the text, as in LZ77: "abab" is followed by "abab".

    Args:
      history: int32 (B, S), the rows' tokens; what is behind their last ones is not looked at.
      positions: int32 (B,), of the last tokens; -1 of a row that is not there.
      drafts: K.
    Returns: int32 (B, K), -1 of a row that has none.
    """
    slots = history.shape[1]
    place = jnp.arange(slots, dtype=jnp.int32)
    same = jnp.broadcast_to(place < positions[:, None], history.shape)
    equals = jnp.zeros(history.shape, jnp.int32)
    for back in range(LONGEST):
        wanted = jnp.take_along_axis(history, jnp.maximum(positions - back, 0)[:, None], axis=1)
        shifted = jnp.pad(history, ((0, 0), (back, 0)), constant_values=-1)[:, :slots]
        same &= (shifted == wanted) & (place >= back)
        equals += same
    best = jnp.max(jnp.where(equals >= SHORTEST, equals * slots + place, -1), axis=1)
    end = best % slots
    ahead = jnp.arange(drafts, dtype=jnp.int32) % jnp.maximum(positions - end, 1)[:, None]
    found = jnp.take_along_axis(history, jnp.clip(end[:, None] + 1 + ahead, 0, slots - 1), axis=1)
    return jnp.where(best[:, None] >= 0, found, -1)


def _draft(
    model: Transformer,
    state: _State,
    wanted: jax.Array,
    drafts: int,
    choose: Callable[[jax.Array, jax.Array | int], jax.Array],
    cache: PagedCache,
) -> tuple[jax.Array, KVCache]:
    """The model's own next tokens: the first of K that are `wanted`, int32 (B,), and -1; int32 (B, K).

    The token before the last is read with it: where all drafts of a step were accepted, the last of them was drafted
    and not read. It is written over what it was, where it had been read.
    """
    last = state.positions
    before = jnp.take_along_axis(state.history, jnp.maximum(last - 1, 0)[:, None], axis=1)
    at = jnp.stack([jnp.maximum(last - 1, -1), last], axis=1)
    hidden, pages = read_tokens(model, jnp.concatenate([before, state.tokens[:, None]], axis=1), at, cache)
    first = choose(model.logits(hidden[:, 1:])[:, 0], 0)
    found = jnp.zeros((last.shape[0], drafts), jnp.int32).at[:, 0].set(first)

    def goes_on(progress: tuple[jax.Array, jax.Array, KVCache]) -> jax.Array:
        return (progress[0] < drafts) & jnp.any(progress[0] < wanted)

    def extend(progress: tuple[jax.Array, jax.Array, KVCache]) -> tuple[jax.Array, jax.Array, KVCache]:
        place, found, pages = progress
        at = jnp.where(place < wanted, last + place, -1)[:, None]
        hidden, pages = read_tokens(model, found[:, place - 1][:, None], at, PagedCache(pages, cache.table))
        return place + 1, found.at[:, place].set(choose(model.logits(hidden)[:, 0], place)), pages

    _, found, pages = jax.lax.while_loop(goes_on, extend, (jnp.ones((), jnp.int32), found, pages))
    return jnp.where(jnp.arange(drafts) < wanted[:, None], found, -1), pages
