"""Log-likelihoods of continuations: what each token of a text costs, given what stands before it.

Pairs come in groups, such as the answers to one question. What all inputs of a group begin with is computed once, into
a key/value cache, which then serves every member of the group; a question with four answers costs little more than one
text. Inputs are padded to few lengths, so that few programs are compiled, and groups of like lengths are computed
together. Logits exist for a few hundred tokens at a time.

A number depends on batches and meshes by float32 rounding only: no row reads another, and padding is never attended to.

G groups in a batch, P prefix, R rows, S suffix, C scored tokens whose logits exist together, D embed, V vocabulary.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hsai.errors import InputError
from hsai.models import KVCache, Transformer
from hsai.sharding import constrain, tree_shardings, use_mesh

Report = Callable[[int, int], None]
"""Called with (tokens of the input done, of how many)."""

CHUNK = 128
"""C. The logits of 128 tokens over a vocabulary of 128,000 are 64 MB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Tokens to score, and those before them."""

    context: tuple[int, ...]
    """At least one token; of a pair longer than the model's context, the first ones are not read."""

    continuation: tuple[int, ...]
    """At least one token: what is scored."""


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """One pair as the model reads it."""

    place: int
    """Index of the pair among all pairs."""

    tokens: tuple[int, ...]
    """The input, behind the group's prefix; its last tokens predict `targets`."""

    targets: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Group:
    """Rows that share a prefix, which may be empty."""

    prefix: tuple[int, ...]
    rows: tuple[_Row, ...]

    @property
    def suffix_length(self) -> int:
        return max(len(row.tokens) for row in self.rows)

    @property
    def tokens(self) -> int:
        """What is computed for it, without padding."""
        return len(self.prefix) + sum(len(row.tokens) for row in self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Batch:
    """Groups that are computed together, each of as many rows."""

    groups: Sequence[_Group]

    prefix: int
    """P, padded."""

    suffix: int
    """S, padded."""

    count: int
    """G, padded."""


class Scorer:
    """Scores pairs with one model; programs are compiled when a length is first met, and kept."""

    def __init__(self, model: Transformer, *, batch_tokens: int = 2048, mesh: Mesh | None = None) -> None:
        """Places the model.

        Args:
          model: with weights in any format.
          batch_tokens: tokens, padding included, that are computed together (one text may be longer).
          mesh: where to compute; rows are split over its data and fsdp axes, weights as `hsai.sharding` says. Without
            one, on the device where the model is.
        Raises:
          InputError: batch_tokens is below 1.
        """
        if batch_tokens < 1:
            raise InputError(f"batch_tokens={batch_tokens} must be at least 1")
        self.max_length: int = model.config.max_length
        self._vocab = model.config.vocab
        self._batch_tokens = batch_tokens
        self._mesh = mesh
        self._parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self._model = model if mesh is None else jax.device_put(model, tree_shardings(model, mesh))
        self._read = jax.jit(_read)
        self._read_prefix = jax.jit(_read_prefix, static_argnames="slots")
        self._read_suffix = jax.jit(_read_suffix)
        self._score = jax.jit(
            _score, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec())
        )  # every process gets all numbers

    def score(self, groups: Sequence[Sequence[Pair]], report: Report | None = None) -> list[list[Score]]:
        """The scores of each group's pairs, in order.

        Raises:
          InputError: a token is not in the model's vocabulary, or a continuation is longer than the model's context.
          ValueError: a context or a continuation is empty.
        """
        cut = self._cut(groups)
        total, done = sum(group.tokens for group in cut), 0
        results: dict[int, Score] = {}
        for batch in self._plan(cut):
            results.update(self._compute(batch))
            done += sum(group.tokens for group in batch.groups)
            if report is not None:
                report(done, total)
        scores = iter(results[place] for place in range(len(results)))
        return [[next(scores) for _ in group] for group in groups]

    def _cut(self, groups: Sequence[Sequence[Pair]]) -> list[_Group]:
        """The groups with what they share cut off."""
        cut, place = [], 0
        for pairs in groups:
            inputs = []
            for pair in pairs:
                self._check(pair)
                whole = (pair.context + pair.continuation)[-(self.max_length + 1) :]
                inputs.append(whole[:-1])
            shared = _count_shared(inputs, pairs) if len(pairs) > 1 else 0
            rows = []
            for pair, tokens in zip(pairs, inputs, strict=True):
                rows.append(_Row(place=place, tokens=tokens[shared:], targets=pair.continuation))
                place += 1
            if rows:
                cut.append(_Group(prefix=inputs[0][:shared], rows=tuple(rows)))
        return cut

    def _check(self, pair: Pair) -> None:
        if not pair.context or not pair.continuation:
            raise ValueError(f"a pair needs a context and a continuation, got {pair}")
        if len(pair.continuation) > self.max_length:
            raise InputError(
                f"a continuation of {len(pair.continuation)} tokens exceeds the model's context of {self.max_length}"
            )
        for token in (min(min(pair.context), min(pair.continuation)), max(max(pair.context), max(pair.continuation))):
            if not 0 <= token < self._vocab:
                raise InputError(f"token id {token} is out of range; valid are 0 to {self._vocab - 1}")

    def _plan(self, groups: Sequence[_Group]) -> Iterator[_Batch]:
        """Batches of groups of as many rows and the same padded lengths; the longest first, so that what does not fit
        the memory fails at once."""
        kinds: dict[tuple[int, int, int], list[_Group]] = {}
        for group in groups:
            lengths = pad_length(len(group.prefix)), pad_length(group.suffix_length)
            kinds.setdefault((*lengths, len(group.rows)), []).append(group)
        for (prefix, suffix, rows), alike in sorted(kinds.items(), reverse=True):
            most = max(self._batch_tokens // (prefix + rows * suffix) // self._parts, 1) * self._parts
            for start in range(0, len(alike), most):
                batch = alike[start : start + most]
                yield _Batch(groups=batch, prefix=prefix, suffix=suffix, count=min(most, self._round(len(batch))))

    def _compute(self, batch: _Batch) -> dict[int, Score]:
        """The scores of a batch's rows, by place."""
        with contextlib.nullcontext() if self._mesh is None else use_mesh(self._mesh):
            rows = [row for group in batch.groups for row in group.rows]
            tokens = _stack([row.tokens for row in rows], batch.count * len(batch.groups[0].rows), batch.suffix)
            if batch.prefix == 0:
                return self._collect(rows, self._read(self._model, tokens))
            owners = np.zeros(len(tokens), np.int32)
            owners[: len(rows)] = [index for index, group in enumerate(batch.groups) for _ in group.rows]
            lengths = np.ones(batch.count, np.int32)
            lengths[: len(batch.groups)] = [len(group.prefix) for group in batch.groups]
            heads = _stack([group.prefix for group in batch.groups], batch.count, batch.prefix)
            cache = self._read_prefix(self._model, heads, lengths, slots=batch.prefix + batch.suffix)
            return self._collect(rows, self._read_suffix(self._model, tokens, cache, owners))

    def _collect(self, rows: Sequence[_Row], hidden: jax.Array) -> dict[int, Score]:
        """Scores every target of `rows` from hidden (R, S, D)."""
        places = [
            (index, len(row.tokens) - len(row.targets) + offset, target)
            for index, row in enumerate(rows)
            for offset, target in enumerate(row.targets)
        ]
        flat = np.zeros((-(-len(places) // CHUNK) * CHUNK, 3), np.int32)
        flat[: len(places)] = places
        parts = [self._score(self._model, hidden, part) for part in np.split(flat, len(flat) // CHUNK)]
        found = [np.concatenate(column) for column in zip(*jax.device_get(parts), strict=True)]
        scores, start = {}, 0
        for row in rows:
            stop = start + len(row.targets)
            scores[row.place] = Score(
                token_log_likelihoods=tuple(found[0][start:stop].tolist()), is_greedy=bool(found[1][start:stop].all())
            )
            start = stop
        return scores

    def _round(self, groups: int) -> int:
        """Groups of an array for so many: a power of two times the devices that split it; few programs serve all."""
        count = self._parts
        while count < groups:
            count *= 2
        return count


def pad_length(length: int) -> int:
    """The length that so many tokens are padded to: a multiple of 4, and beyond 32 four to eight lengths an octave."""
    step = max(4, 2 ** ((max(length, 1) - 1).bit_length() - 3))
    return -(-length // step) * step


def _count_shared(inputs: Sequence[tuple[int, ...]], pairs: Sequence[Pair]) -> int:
    """How many tokens all inputs begin with, that score nothing in any of them."""
    free = min(len(tokens) - len(pair.continuation) for tokens, pair in zip(inputs, pairs, strict=True))
    for index in range(free):
        if any(tokens[index] != inputs[0][index] for tokens in inputs):
            return index
    return free


def _stack(rows: Sequence[tuple[int, ...]], count: int, length: int) -> np.ndarray:
    """int32 (count, length), zeros behind each row and below the last."""
    stacked = np.zeros((count, length), np.int32)
    for index, row in enumerate(rows):
        stacked[index, : len(row)] = row
    return stacked


def _read(model: Transformer, tokens: jax.Array) -> jax.Array:
    """(R, S) -> (R, S, D): whole texts, each from position 0."""
    return model(constrain(tokens, "batch", "seq"))[0]


def _read_prefix(model: Transformer, tokens: jax.Array, lengths: jax.Array, *, slots: int) -> KVCache:
    """The cache (G, slots) that prefixes (G, P) of `lengths` (G,) leave; padding lies behind each row's length."""
    tokens = constrain(tokens, "batch", "seq")
    cache = model(tokens, cache=model.make_cache(tokens.shape[0], slots))[1]
    assert cache is not None, "a model that is given a cache returns one"
    return dataclasses.replace(cache, lengths=lengths)


def _read_suffix(model: Transformer, tokens: jax.Array, cache: KVCache, owners: jax.Array) -> jax.Array:
    """(R, S) -> (R, S, D), each row behind the prefix `owners` (R,) of `cache`."""
    axes = ("layers", "batch", "cache", "kv_heads", "head_dim")
    keys, values = (constrain(part[:, owners], *axes) for part in (cache.keys, cache.values))
    own = KVCache(keys, values, cache.lengths[owners])
    return model(constrain(tokens, "batch", "seq"), cache=own)[0]


def _score(model: Transformer, hidden: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p of targets, float32 (C,), and whether each has the largest logit.

    `places` int32 (C, 3) holds a row of hidden (R, S, D), the position in it that predicts, and the target.
    """
    row, position, target = places.T
    chosen = constrain(hidden[row, position][:, None], "batch", "seq", "embed")
    logits = model.logits(chosen)[:, 0]
    picked = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == target
