"""Compiled programs and the weights they run on, for one prompt at a time on one device.

There are two ways to a program: trace the model here, with the kernels of this machine, or take the graph that the
bundle ships. Both have the calling convention of `hsai.export.steps`, so everything above is written once.

T query, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped

from hsai.errors import InputError
from hsai.export.bundle import Bundle
from hsai.export.manifest import GraphRecord
from hsai.export.stablehlo import GraphConfig, load_graph
from hsai.export.steps import CACHE_NAMES, DECODE_INPUTS, PREFILL_INPUTS, cache_shapes, make_decode, make_prefill
from hsai.export.targets import find_target
from hsai.formats.storage import describe, named_arrays
from hsai.models import KVCache, Transformer
from hsai_kernels.dispatch import BackendMissing
from hsai_kernels.native import load_library

logger = logging.getLogger(__name__)


class Runtime:
    """Reads tokens into a cache and gives the logits of the next one.

    Attributes:
      buckets: ascending numbers of tokens for which there is a prefill.
      slots: how many tokens the cache holds.
      vocab: V, how many logits there are.
    """

    def __init__(
        self,
        weights: Mapping[str, jax.Array],
        prefill: Mapping[int, Wrapped],
        decode: Wrapped,
        cache: Sequence[jax.ShapeDtypeStruct],
        vocab: int,
    ) -> None:
        """Wraps the steps.

        Args:
          weights: by name, resident on the device.
          prefill: a jitted prefill for each bucket, donating the cache.
          decode: the jitted decode step, donating the cache.
          cache: shapes of the cache's arrays, in the order of `CACHE_NAMES`.
          vocab: V.
        """
        self.buckets = tuple(sorted(prefill))
        self.slots: int = cache[0].shape[2]
        self.vocab = vocab
        self._weights = dict(weights)
        self._prefill = dict(prefill)
        self._decode = decode
        self._cache = tuple(cache)
        self._programs: dict[int | None, Callable[..., Any]] = {}

    def make_cache(self) -> KVCache:
        """An empty cache."""
        return KVCache(*(jnp.zeros(part.shape, part.dtype) for part in self._cache))

    def prefill(self, tokens: np.ndarray, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Reads `tokens`, int32 (T,) with T at least 1 and within the cache, bucket by bucket.

        Returns: float32 (1, V) logits of what follows the last token, and the cache; the one given is used up.
        """
        logits: jax.Array | None = None
        start = 0
        for bucket in plan_buckets(len(tokens), self.buckets):
            part = tokens[start : start + bucket]
            padded = np.zeros((1, bucket), np.int32)
            padded[0, : len(part)] = part
            count = np.full((1,), len(part), np.int32)
            step = self._compile(bucket)
            logits, *state = step(self._weights, padded, count, *cache.arrays)
            cache = KVCache(*state)
            start += len(part)
        if logits is None:
            raise ValueError("prefill of no tokens")
        return logits, cache

    def decode(self, token: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Reads one token, int32 (1,); returns as `prefill`."""
        step = self._compile(None)
        logits, *state = step(self._weights, token[:, None], *cache.arrays)
        return logits, KVCache(*state)

    def prepare(self, tokens: int) -> None:
        """Compiles what a prompt of `tokens` and its continuation need, so that timings hold no compilation."""
        for bucket in (*plan_buckets(tokens, self.buckets), None):
            self._compile(bucket)

    def _compile(self, bucket: int | None) -> Callable[..., Any]:
        """The prefill program of `bucket`, or the decode program."""
        if bucket not in self._programs:
            tokens = jax.ShapeDtypeStruct((1, bucket or 1), jnp.int32)
            count = () if bucket is None else (jax.ShapeDtypeStruct((1,), jnp.int32),)
            step = self._decode if bucket is None else self._prefill[bucket]
            self._programs[bucket] = step.lower(self._weights, tokens, *count, *self._cache).compile()
        return self._programs[bucket]


def trace_runtime(model: Transformer, graphs: GraphConfig) -> Runtime:
    """Traces `model` for this machine, with its kernels, in the buckets, context and cache that `graphs` says."""
    config, formats = model.config, describe(model)
    prefill = jax.jit(make_prefill(config, formats), donate_argnames=CACHE_NAMES)
    decode = jax.jit(make_decode(config, formats), donate_argnames=CACHE_NAMES)
    cache = cache_shapes(config, 1, graphs.slots(config), graphs.cache)
    return Runtime(named_arrays(model), dict.fromkeys(graphs.buckets(config), prefill), decode, cache, config.vocab)


def load_runtime(bundle: Bundle) -> Runtime:
    """Takes the graphs that the bundle ships; see `choose_graphs`.

    Raises:
      InputError: it ships none, or they are for several rows at a time, or this jax cannot read them.
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
    return Runtime(named_arrays(bundle.model), steps["prefill"], steps["decode"][1], cache, bundle.config.vocab)


def choose_graphs(graphs: Sequence[GraphRecord]) -> tuple[GraphRecord, ...]:
    """Those with the kernels of the device here, if there are any that it can run; else the portable ones."""
    here = find_target()
    chosen = tuple(graph for graph in graphs if graph.kernels == here)
    if here is None or not chosen:
        return tuple(graph for graph in graphs if graph.kernels is None)
    if here == "cpu":
        try:
            load_library()  # and tells XLA of its custom calls
        except BackendMissing as error:
            logger.warning("the portable graphs run in the place of those with kernels: %s", error)
            return tuple(graph for graph in graphs if graph.kernels is None)
    return chosen


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


def plan_buckets(tokens: int, buckets: Sequence[int]) -> Iterator[int]:
    """The sizes of the calls that read `tokens`: each but the last is full.

    A larger bucket is taken for the rest once it is at least half full: so at most half of a call is padding (save in
    the smallest bucket), and the weights are read few times. `buckets` ascend.
    """
    while tokens > 0:
        fitting = [bucket for bucket in buckets if tokens <= bucket <= 2 * tokens]
        full = [bucket for bucket in buckets if bucket <= tokens]
        bucket = fitting[0] if fitting else full[-1] if full else buckets[0]
        yield bucket
        tokens -= bucket
