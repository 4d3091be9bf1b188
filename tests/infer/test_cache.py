"""A narrow cache in the runtime: probabilities, greedy choices, graphs that ship it, and where it cannot be chosen."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export import GraphConfig, read_bundle, write_bundle
from hsai.infer import Engine
from hsai.infer.graphs import load_graphs
from hsai.infer.programs import Vocabulary
from hsai.infer.runtime import TracedRuntime, make_rows
from hsai.infer.sampling import SamplingConfig
from hsai.models import CacheFormat, Transformer
from tests.compress.trained import trained_model, unseen_windows
from tests.export.tiny_models import full_logits, make_model
from tests.infer.test_runtime import PAGES, VOCABULARY, read, write

BOUNDS: dict[CacheFormat, float] = {"bfloat16": 0.05, "int8": 0.15}
"""Largest difference of a logarithm of a probability; the logits of these models have a deviation of about one."""

IDS = np.random.default_rng(3).integers(0, 280, 48).astype(np.int32)


@pytest.mark.parametrize("format", BOUNDS)
def test_probabilities_and_choices_are_nearly_those_of_a_float_cache(format: CacheFormat) -> None:
    """Within a bound; and where the likeliest token leads by more than errors can make up for, it is the same."""
    model = make_model("dense")
    exact = np.asarray(jax.nn.log_softmax(full_logits(model, IDS)[10:, : VOCABULARY.size]))
    runtime = TracedRuntime(model, GraphConfig(prefill_buckets=(4, 16), cache=format))
    pages = read(runtime, IDS[:10], runtime.make_pages(PAGES))
    off, chosen = [], []
    for position in range(10, 48):
        made, pages = write(runtime, IDS[position], position, pages)
        assert made.top_tokens is not None and made.top_logprobs is not None
        off.append(np.abs(made.top_logprobs[0, 0] - exact[position - 10, made.top_tokens[0, 0]]).max())
        chosen.append(made.tokens[0, 0])
    assert 0 < max(off) < BOUNDS[format]
    ranked = np.sort(exact, axis=-1)
    sure = ranked[:, -1] - ranked[:, -2] > 2 * max(off)
    assert sure.mean() > 0.6
    assert (np.array(chosen) == exact.argmax(-1))[sure].all()


LOSSES: dict[CacheFormat, tuple[float, float, float]] = {"int8": (1e-4, 0.99, 1e-3), "int4": (0.02, 0.92, 0.02)}
"""Of a model that has learned something: at most this divergence in nats a token, at least this share of equal choices,
and at most so much more loss."""


@pytest.mark.parametrize("format", LOSSES)
def test_what_a_trained_model_loses(format: CacheFormat) -> None:
    """On text that it has not seen, every token read through the cache; and the text that it writes begins alike."""
    model, tokens = trained_model(80), jnp.asarray(unseen_windows()[:64])

    @jax.jit
    def read(model: Transformer) -> jax.Array:
        return jax.nn.log_softmax(model.logits(model(tokens, cache=model.make_cache(64, 64, format))[0]))

    exact, found = jax.nn.log_softmax(model.logits(model(tokens)[0])), read(model)
    divergence = jnp.mean(jnp.sum(jnp.exp(exact) * (exact - found), axis=-1))
    same = jnp.mean(exact.argmax(-1) == found.argmax(-1))
    losses = [jnp.mean(jnp.take_along_axis(x[:, :-1], tokens[:, 1:, None], -1)) for x in (exact, found)]
    most, least, more = LOSSES[format]
    assert 0 < divergence < most and least < same < 1 and losses[0] - losses[1] < more
    written = []
    for cache in ("activations", format):
        runtime = TracedRuntime(model, GraphConfig(prefill_buckets=(32,), context=64, cache=cache))  # type: ignore[arg-type]
        pages = runtime.read(np.asarray(tokens[0, :31]), 0, np.zeros((1, 1), np.int32), runtime.make_pages(1))
        rows = make_rows([(int(tokens[0, 31]), 31, 8, [0], SamplingConfig(), 0)], 1, 1, 1)
        made, _ = runtime.write(rows, None, 8, "greedy", Vocabulary(model.config.vocab, frozenset()), pages)
        written.append(made.tokens[:8, 0].tolist())
    assert written[0] == written[1]


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("cache") / "b"
    graphs = GraphConfig(prefill_buckets=(16,), context=40, cache="int8")
    write_bundle(directory, make_model("int8"), tokenizer, graphs=graphs)
    return directory


def test_graphs_ship_their_cache(int8_bundle: Path) -> None:
    """Portable, with the scales as two more arrays of the cache, handed over like the rest; the same numbers."""
    bundle = read_bundle(int8_bundle)
    for graph in bundle.manifest.graphs:
        assert graph.custom_calls == ()
        cache = {array.name: (array.shape, array.dtype) for array in graph.inputs if "." not in array.name}
        assert cache["keys"] == cache["values"] == ((2, 1, 40, 2, 32), "int8")
        assert cache["key_scales"] == cache["value_scales"] == ((2, 1, 40, 2), "float32")
        names = ["keys", "values", "lengths", "key_scales", "value_scales"]
        assert [array.name for array in graph.outputs] == ["logits", *names]
        assert [graph.inputs[index].name for index in graph.donated] == names
    runtime = load_graphs(bundle)
    logits, cache = runtime.prefill(IDS[:9], runtime.make_pages(1))
    expected = full_logits(bundle.model, IDS[:14])
    for position in range(9, 14):
        # Rounded codes are a 127th of a head's largest number.
        np.testing.assert_allclose(logits[0], expected[position - 1], atol=BOUNDS["int8"])
        before = cache
        logits, cache = runtime.decode(jnp.asarray(IDS[position : position + 1]), cache)
        assert all(array.is_deleted() for array in before.arrays)


def test_graphs_ship_a_cache_of_4_bits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    graphs = GraphConfig(prefill_buckets=(4,), context=24, cache="int4")
    write_bundle(tmp_path / "b", make_model("int8"), tokenizer, graphs=graphs)
    bundle = read_bundle(tmp_path / "b")
    for graph in bundle.manifest.graphs:
        assert graph.custom_calls == ()
        cache = {array.name: (array.shape, array.dtype) for array in graph.inputs if "." not in array.name}
        assert cache["keys"] == cache["values"] == ((2, 1, 24, 2, 16), "uint8")
        assert cache["key_scales"] == cache["value_scales"] == ((2, 1, 24, 2, 2), "bfloat16")
    logits, cache = load_graphs(bundle).prefill(IDS[:9], load_graphs(bundle).make_pages(1))
    # The same model beside it, without graphs, reads the same 4 bits.
    model = bundle.model
    hidden, filled = model(jnp.asarray(IDS[None, :9]), cache=model.make_cache(1, 24, "int4"))
    np.testing.assert_allclose(logits[0], model.logits(hidden)[0, -1], atol=0.05)
    same = np.asarray(cache.keys[:, :, :9]) == np.asarray(filled.keys[:, :, :9])
    assert same.mean() > 0.99 and np.any(np.asarray(cache.keys[:, :, 8]))


def test_an_engine_takes_the_cache_that_it_is_told(int8_bundle: Path) -> None:
    tokens = {}
    for cache in (None, "activations", "bfloat16", "int8", "int4"):
        engine = Engine.load(int8_bundle, cache=cache)  # type: ignore[arg-type]
        kinds = {None: "float32", "activations": "float32", "bfloat16": "bfloat16", "int8": "int8", "int4": "uint8"}
        assert engine.runtime.make_pages(1).keys.dtype == kinds[cache]
        if cache in (None, "int8"):
            tokens[cache] = engine.generate_tokens([3, 4, 5], max_tokens=8).tokens
    shipped = Engine.load(int8_bundle, graphs=True).generate_tokens([3, 4, 5], max_tokens=8).tokens
    assert shipped == tokens["int8"]
    assert sum(a == b for a, b in zip(tokens[None], tokens["int8"], strict=False)) >= 6


def test_where_a_cache_cannot_be_chosen(int8_bundle: Path) -> None:
    with pytest.raises(InputError, match="cache=int8 cannot be chosen with graphs: theirs is fixed"):
        Engine.load(int8_bundle, graphs=True, cache="int8")
    with pytest.raises(InputError, match="cache='int3' is unknown; valid are activations, bfloat16, int8, int4"):
        GraphConfig(cache="int3")  # type: ignore[arg-type]
