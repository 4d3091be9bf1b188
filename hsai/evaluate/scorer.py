"""Log-likelihoods of continuations: what each token of a text costs, given what stands before it.

Pairs come in groups, such as the answers to one question. What all inputs of a group begin with is computed once, into
a key/value cache, which then serves every member of the group; a question with four answers costs little more than one
text. Inputs are padded to few lengths, so that few programs are compiled, and groups of like lengths are computed
together. Logits exist for a few hundred tokens at a time.

A number depends on batches and meshes by float32 rounding only: no row reads another, and padding is never attended to.
With a cache of fewer bits than activations, every token is read through it, as decoding reads all but what it computes:
then that is what is measured.

R rows, S tokens of a row, C scored tokens whose logits exist together, D embed, V vocabulary; the others are those of
hsai/evaluate/batches.py.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hsai.errors import InputError
from hsai.evaluate.batches import Batch, Pair, Row, cut_groups, plan_batches, stack_rows
from hsai.models import CacheFormat, KVCache, Transformer
from hsai.models.cache import CACHE_AXES, check_cache_format
from hsai.sharding import constrain, tree_shardings, use_mesh

Report = Callable[[int, int], None]
"""Called with (tokens of the input done, of how many)."""

CHUNK = 128
"""C. The logits of 128 tokens over a vocabulary of 128,000 are 64 MB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What the model gives a continuation."""

    token_log_likelihoods: tuple[float, ...]
    """log p of each token of the continuation, in nats."""

    is_greedy: bool
    """Each of them is the model's first choice."""

    @property
    def log_likelihood(self) -> float:
        """Their sum, in float64."""
        return sum(self.token_log_likelihoods)


class Scorer:
    """Scores pairs with one model; programs are compiled when a length is first met, and kept."""

    def __init__(
        self,
        model: Transformer,
        *,
        batch_tokens: int = 2048,
        mesh: Mesh | None = None,
        cache: CacheFormat = "activations",
    ) -> None:
        """Places the model.

        Args:
          model: with weights in any format.
          batch_tokens: tokens, padding included, that are computed together (one text may be longer).
          mesh: where to compute; rows are split over its data and fsdp axes, weights as `hsai.sharding` says. Without
            one, on the device where the model is.
          cache: what keys and values are stored as before any query, that of their own token included, reads them.
        Raises:
          InputError: batch_tokens is below 1, or an unknown cache.
        """
        check_cache_format(cache)
        if batch_tokens < 1:
            raise InputError(f"batch_tokens={batch_tokens} must be at least 1")
        self.max_length: int = model.config.max_length
        self._vocab = model.config.vocab
        self._batch_tokens = batch_tokens
        self._mesh = mesh
        self._parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.model = model if mesh is None else jax.device_put(model, tree_shardings(model, mesh))
        self._read = jax.jit(functools.partial(_read, format=cache))
        self._read_prefix = jax.jit(functools.partial(_read_prefix, format=cache), static_argnames="slots")
        self._read_suffix = jax.jit(_read_suffix)
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())  # every process gets all numbers
        self._score = jax.jit(_score, out_shardings=whole)
        self._pick = jax.jit(_pick, out_shardings=whole)

    def score(self, groups: Sequence[Sequence[Pair]], report: Report | None = None) -> list[list[Score]]:
        """The scores of each group's pairs, in order.

        Raises:
          InputError: a token is not in the model's vocabulary, or a continuation is longer than the model's context.
          ValueError: a context or a continuation is empty.
        """
        results: dict[int, Score] = {}
        for rows, hidden in self._read_all(groups, report):
            results.update(self._collect(rows, hidden))
        return _regroup(results, groups)

    def score_and_read(
        self, groups: Sequence[Sequence[Pair]], report: Report | None = None
    ) -> tuple[list[list[Score]], list[np.ndarray]]:
        """As `score`; and the normalized hidden states that predict each pair's continuation, float32 (tokens of it, D)
        in the host's memory, of all pairs in order."""
        results: dict[int, Score] = {}
        kept: dict[int, np.ndarray] = {}
        for rows, hidden in self._read_all(groups, report):
            results.update(self._collect(rows, hidden))
            picked = np.concatenate(jax.device_get([self._pick(hidden, part) for part in _list_targets(rows)]))
            kept |= {row.place: picked[part] for row, part in _cut_rows(rows)}
        return _regroup(results, groups), [kept[place] for place in range(len(kept))]

    def _read_all(
        self, groups: Sequence[Sequence[Pair]], report: Report | None
    ) -> Iterator[tuple[list[Row], jax.Array]]:
        """Batch by batch, the rows of a batch and their hidden states (R, S, D), longer where it was padded."""
        cut = cut_groups(groups, max_length=self.max_length, vocab=self._vocab)
        total, done = sum(group.tokens for group in cut), 0
        for batch in plan_batches(cut, tokens=self._batch_tokens, parts=self._parts):
            with contextlib.nullcontext() if self._mesh is None else use_mesh(self._mesh):
                yield [row for group in batch.groups for row in group.rows], self._compute(batch)
            done += sum(group.tokens for group in batch.groups)
            if report is not None:
                report(done, total)

    def _compute(self, batch: Batch) -> jax.Array:
        """Hidden states (R, S, D) of a batch's rows, and of those that it was padded with."""
        rows = [row for group in batch.groups for row in group.rows]
        tokens = stack_rows([row.tokens for row in rows], batch.count * len(batch.groups[0].rows), batch.suffix)
        if batch.prefix == 0:
            return self._read(self.model, tokens)
        owners = np.zeros(len(tokens), np.int32)
        owners[: len(rows)] = [index for index, group in enumerate(batch.groups) for _ in group.rows]
        lengths = np.ones(batch.count, np.int32)
        lengths[: len(batch.groups)] = [len(group.prefix) for group in batch.groups]
        heads = stack_rows([group.prefix for group in batch.groups], batch.count, batch.prefix)
        cache = self._read_prefix(self.model, heads, lengths, slots=batch.prefix + batch.suffix)
        return self._read_suffix(self.model, tokens, cache, owners)

    def _collect(self, rows: Sequence[Row], hidden: jax.Array) -> dict[int, Score]:
        """Scores every target of `rows` from hidden (R, S, D)."""
        parts = [self._score(self.model, hidden, part) for part in _list_targets(rows)]
        found = [np.concatenate(column) for column in zip(*jax.device_get(parts), strict=True)]
        return {
            row.place: Score(token_log_likelihoods=tuple(found[0][part].tolist()), is_greedy=bool(found[1][part].all()))
            for row, part in _cut_rows(rows)
        }


def _regroup(results: Mapping[int, Score], groups: Sequence[Sequence[Pair]]) -> list[list[Score]]:
    scores = iter(results[place] for place in range(len(results)))
    return [[next(scores) for _ in group] for group in groups]


def _read(model: Transformer, tokens: jax.Array, *, format: CacheFormat) -> jax.Array:
    """(R, S) -> (R, S, D): whole texts, each from position 0; what a cache would hold exactly needs none."""
    tokens = constrain(tokens, "batch", "seq")
    cache = None if format == "activations" else model.make_cache(tokens.shape[0], tokens.shape[1], format)
    return model(tokens, cache=cache)[0]


def _read_prefix(
    model: Transformer, tokens: jax.Array, lengths: jax.Array, *, slots: int, format: CacheFormat
) -> KVCache:
    """The cache (G, slots) that prefixes (G, P) of `lengths` (G,) leave; padding lies behind each row's length."""
    tokens = constrain(tokens, "batch", "seq")
    cache = model(tokens, cache=model.make_cache(tokens.shape[0], slots, format))[1]
    assert cache is not None, "a model that is given a cache returns one"
    return dataclasses.replace(cache, lengths=lengths)


def _read_suffix(model: Transformer, tokens: jax.Array, cache: KVCache, owners: jax.Array) -> jax.Array:
    """(R, S) -> (R, S, D), each row behind the prefix `owners` (R,) of `cache`."""

    def take(array: jax.Array) -> jax.Array:
        return constrain(array[:, owners], *CACHE_AXES[: array.ndim])

    own = KVCache.from_stored(jax.tree.map(take, cache.stored), cache.lengths[owners])
    return model(constrain(tokens, "batch", "seq"), cache=own)[0]


def _list_targets(rows: Sequence[Row]) -> list[np.ndarray]:
    """Where each target is predicted and which it is, int32 (C, 3) a part, for `_score`; the last part is padded."""
    places = [
        (index, len(row.tokens) - len(row.targets) + offset, target)
        for index, row in enumerate(rows)
        for offset, target in enumerate(row.targets)
    ]
    flat = np.zeros((-(-len(places) // CHUNK) * CHUNK, 3), np.int32)
    flat[: len(places)] = places
    return np.split(flat, len(flat) // CHUNK)


def _cut_rows(rows: Sequence[Row]) -> Iterator[tuple[Row, slice]]:
    """Which of the targets of `_list_targets`, its parts joined, are a row's."""
    start = 0
    for row in rows:
        stop = start + len(row.targets)
        yield row, slice(start, stop)
        start = stop


def _pick(hidden: jax.Array, places: jax.Array) -> jax.Array:
    """The hidden states (C, D), float32, that predict the targets of `places`, which are as for `_score`."""
    row, position, _ = places.T
    return hidden[row, position].astype(jnp.float32)


def _score(model: Transformer, hidden: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p of targets, float32 (C,), and whether each has the largest logit.

    `places` int32 (C, 3) holds a row of hidden (R, S, D), the position in it that predicts, and the target.
    """
    row, position, target = places.T
    chosen = constrain(hidden[row, position][:, None], "batch", "seq", "embed")
    logits = model.logits(chosen)[:, 0]
    picked = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == target
