"""A runtime of the graphs that a bundle ships: one row at a time, in one page that is as long as the context.

A graph reads tokens and gives logits (`hsai.export.steps`); choosing the next one is not part of it, so that Python
stands between the tokens.

T query, S slots of the cache, V vocabulary.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped

from hsai.errors import InputError
from hsai.export.bundle import Bundle, check_unchanged
from hsai.export.manifest import GraphRecord
from hsai.export.stablehlo import load_graph
from hsai.export.steps import CACHE_NAMES, DECODE_INPUTS, PREFILL_INPUTS
from hsai.export.targets import find_target
from hsai.formats.storage import named_arrays
from hsai.infer.choose import Chosen, Extras, Kind, choose_tokens
from hsai.infer.programs import Made, Rows, Vocabulary
from hsai.infer.runtime import make_extras, make_rows, plan_buckets
from hsai.models import KVCache
from hsai_kernels.dispatch import BackendMissing
from hsai_kernels.native import NAMES, load_library

logger = logging.getLogger(__name__)


class GraphRuntime:
    """A `hsai.infer.runtime.Runtime` whose page is the cache of the graphs."""

    def __init__(
        self,
        weights: Mapping[str, jax.Array],
        prefill: Mapping[int, Wrapped],
        decode: Wrapped,
        cache: Sequence[jax.ShapeDtypeStruct],
        vocab: int,
    ) -> None:
        """Wraps the graphs.

        Args:
          weights: by name, resident on the device.
          prefill: a jitted prefill for each bucket, donating the cache.
          decode: the jitted decode step, donating the cache.
          cache: shapes of the cache's arrays, in the order of `CACHE_NAMES`.
          vocab: V.
        """
        self.slots: int = cache[0].shape[2]
        self.page, self.width = self.slots, 1
        self.buckets = tuple(sorted(prefill))
        self.batches: tuple[int, ...] = (1,)
        self._vocab = vocab
        self._weights = dict(weights)
        self._prefill = dict(prefill)
        self._decode = decode
        self._cache = tuple(cache)
        self._programs: dict[int | None, Callable[..., Any]] = {}
        self._choose = jax.jit(choose_tokens, static_argnames=("kind", "vocab"))

    def make_pages(self, count: int) -> KVCache:
        """As of `Runtime`; there is but one.

        Raises:
          ValueError: another count.
        """
        if count != 1:
            raise ValueError(f"graphs have one page, not {count}")
        return KVCache(*(jnp.zeros(part.shape, part.dtype) for part in self._cache))

    def read(self, tokens: np.ndarray, start: int, table: np.ndarray, pages: KVCache) -> KVCache:
        """As of `Runtime`."""
        return self.prefill(tokens, _cut(pages, start))[1]

    def write(
        self, rows: Rows, extras: Extras | None, steps: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache
    ) -> tuple[Made, KVCache]:
        """As of `Runtime`."""
        pages = _cut(pages, int(rows.positions[0]))
        token = jnp.asarray(rows.tokens)
        made: list[Chosen] = []
        for step in range(min(steps, int(rows.limits[0]))):
            logits, pages = self.decode(token, pages)
            settings = dataclasses.replace(rows.settings, step=rows.settings.step + step)
            chosen = self._choose(logits, settings, extras, kind=kind, vocab=vocabulary.size)
            token = chosen.token
            made.append(jax.device_get(chosen))
            if int(made[-1].token[0]) in vocabulary.stops:
                break
            if extras is not None:
                extras.seen[0, int(made[-1].token[0])] = True
        return Made(*jax.tree.leaves(jax.tree.map(lambda *steps: np.stack(steps), *made))), pages

    def prepare_read(self, tokens: int, pages: KVCache) -> None:
        """As of `Runtime`."""
        self._compile(next(bucket for bucket in self.buckets if tokens <= bucket))

    def prepare_write(self, batch: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache) -> None:
        """As of `Runtime`."""
        self._compile(None)
        extras = make_extras(1, vocabulary.size) if kind == "full" else None
        settings = make_rows([], 1, 1, 1).settings
        self._choose(jnp.zeros((1, self._vocab)), settings, extras, kind=kind, vocab=vocabulary.size)

    def prefill(self, tokens: np.ndarray, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Reads `tokens`, int32 (T,) with T at least 1, behind what the cache holds, bucket by bucket.

        Returns: float32 (1, V) logits of what follows the last token, and the cache; the one given is used up.
        """
        logits: jax.Array | None = None
        start = 0
        for bucket in plan_buckets(len(tokens), self.buckets):
            part = tokens[start : start + bucket]
            padded = np.zeros((1, bucket), np.int32)
            padded[0, : len(part)] = part
            count = np.full((1,), len(part), np.int32)
            logits, *state = self._compile(bucket)(self._weights, padded, count, *cache.arrays)
            cache = KVCache(*state)
            start += len(part)
        if logits is None:
            raise ValueError("prefill of no tokens")
        return logits, cache

    def decode(self, token: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Reads one token, int32 (1,); returns as `prefill`."""
        logits, *state = self._compile(None)(self._weights, token[:, None], *cache.arrays)
        return logits, KVCache(*state)

    def _compile(self, bucket: int | None) -> Callable[..., Any]:
        """The prefill program of `bucket`, or the decode program."""
        if bucket not in self._programs:
            tokens = jax.ShapeDtypeStruct((1, bucket or 1), jnp.int32)
            count = () if bucket is None else (jax.ShapeDtypeStruct((1,), jnp.int32),)
            step = self._decode if bucket is None else self._prefill[bucket]
            self._programs[bucket] = step.lower(self._weights, tokens, *count, *self._cache).compile()
        return self._programs[bucket]


def load_graphs(bundle: Bundle) -> GraphRuntime:
    """Takes the graphs that the bundle ships; see `choose_graphs`.

    Raises:
      InputError: it ships none, or they are for several rows at a time, or this jax cannot read them; or they are those
        of another bundle that has taken its place.
    """
    graphs = choose_graphs(bundle.manifest.graphs)
    if not graphs:
        raise InputError(f"{bundle.directory} holds no graphs: export it with graphs, or run the model without them")
    steps: dict[str, dict[int, Wrapped]] = {"prefill": {}, "decode": {}}
    for graph in graphs:
        if graph.batch != 1:
            raise InputError(f"{bundle.directory}: graph {graph.name} has batch={graph.batch}; one prompt needs 1")
        steps[graph.step][graph.tokens] = _wrap_graph(bundle.directory, graph)
    for step, found in steps.items():
        if not found or (step == "decode" and 1 not in found):
            raise InputError(f"{bundle.directory} holds no {step} graph; export it again")
    cache = _read_cache(bundle.directory, graphs)
    check_unchanged(bundle)
    return GraphRuntime(named_arrays(bundle.model), steps["prefill"], steps["decode"][1], cache, bundle.config.vocab)


def choose_graphs(graphs: Sequence[GraphRecord]) -> tuple[GraphRecord, ...]:
    """Those with the kernels of the device here, if there are any that it can run; else the portable ones."""
    here = find_target()
    chosen = tuple(graph for graph in graphs if graph.kernels == here)
    if here is None or not chosen:
        return tuple(graph for graph in graphs if graph.kernels is None)
    if here == "cpu":
        try:
            load_library()  # and tells XLA of its custom calls
            calls = {call for graph in chosen for call in graph.custom_calls if call.startswith("hsai_")}
            if unknown := calls - set(NAMES):
                raise BackendMissing(f"the library here has no {', '.join(sorted(unknown))}: a newer hsai wrote them")
        except BackendMissing as error:
            logger.warning("the portable graphs run in the place of those with kernels: %s", error)
            return tuple(graph for graph in graphs if graph.kernels is None)
    return chosen


def _cut(cache: KVCache, length: int) -> KVCache:
    """The cache as if it held `length` tokens only."""
    return dataclasses.replace(cache, lengths=jnp.full((1,), length, jnp.int32))


def _read_cache(directory: Path, graphs: Sequence[GraphRecord]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arrays of the cache that the graphs hand on; `InputError` if they differ about it."""
    caches = [
        tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in graph.inputs if array.name in CACHE_NAMES)
        for graph in graphs
    ]
    for graph, cache in zip(graphs, caches, strict=True):
        if cache != caches[0]:
            raise InputError(f"{directory}: graphs {graphs[0].name} and {graph.name} have different caches")
    return caches[0]


def _wrap_graph(directory: Path, graph: GraphRecord) -> Wrapped:
    """The graph as a jitted function that takes over the cache's buffers: `Exported.call` by itself does not."""
    inputs = PREFILL_INPUTS if graph.step == "prefill" else DECODE_INPUTS
    donated = tuple(inputs.index(array.name) for array in graph.inputs if array.name in CACHE_NAMES)
    return jax.jit(load_graph(directory, graph).call, donate_argnums=donated)
