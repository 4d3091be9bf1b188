"""Graphs that a bundle ships: which can be run, that they work in place, and that they write what a trace writes."""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export import GraphConfig, read_bundle, write_bundle
from hsai.infer import Engine, SamplingConfig
from hsai.infer.graphs import load_graphs
from tests.export.tiny_models import make_model


def test_they_take_over_the_memory_of_the_cache(bundles: dict[str, Path]) -> None:
    runtime = load_graphs(read_bundle(bundles["int8"]))
    assert runtime.buckets == (4, 16) and runtime.slots == 48
    _, cache = runtime.prefill(np.array([1, 2, 3], np.int32), runtime.make_pages(1))
    runtime.decode(jnp.array([4], jnp.int32), cache)
    assert cache.keys.is_deleted() and cache.values.is_deleted() and cache.lengths.is_deleted()
    with pytest.raises(ValueError, match="prefill of no tokens"):
        runtime.prefill(np.array([], np.int32), runtime.make_pages(1))
    with pytest.raises(ValueError, match="graphs have one page, not 2"):
        runtime.make_pages(2)


def test_they_write_what_a_trace_writes(bundles: dict[str, Path], engine: Engine) -> None:
    """A second text after a longer one: the cache forgets. Draws, penalties and probabilities are the same as well."""
    shipped = Engine.load(bundles["dense"], graphs=True)
    ids = np.random.default_rng(4).integers(1, 280, 40).tolist()
    sampling = SamplingConfig(temperature=1.5, top_p=0.9, repetition_penalty=1.3, seed=3)
    made = 0
    for tokens in (ids, ids[:7], ids[:8]):
        found, expected = (
            e.generate_tokens(tokens, max_tokens=6, sampling=sampling, logprobs=2) for e in (shipped, engine)
        )
        assert found.tokens == expected.tokens
        made += len(found.tokens)
        assert found.finish_reason == expected.finish_reason and found.cached_tokens == 0
        for one, other in zip(found.logprobs, expected.logprobs, strict=True):
            assert one.token == other.token and len(one.top) == 2
            np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-4)
    assert made > 6


def test_a_bundle_without_graphs_cannot_run_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_bundle(tmp_path / "b", make_model("int8"), tokenizer)
    with pytest.raises(InputError, match="holds no graphs: export it with graphs, or run the model without them"):
        load_graphs(read_bundle(tmp_path / "b"))


def test_graphs_of_another_bundle_are_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    """One that took the place of the bundle between its weights and its graphs."""
    shutil.copytree(bundles["int8"], tmp_path / "b")
    bundle = read_bundle(tmp_path / "b")
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(bundles["dense"], tmp_path / "b")
    with pytest.raises(InputError, match="b was replaced while it was read; read it again"):
        load_graphs(bundle)


def test_graphs_of_several_rows_do_not_serve_one_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_bundle(tmp_path / "b", make_model("int8"), tokenizer, graphs=GraphConfig(prefill_buckets=(4,), batch=2))
    with pytest.raises(InputError, match="graph prefill_4 has batch=2; one prompt needs 1"):
        load_graphs(read_bundle(tmp_path / "b"))


def test_graphs_that_differ_about_the_cache_are_refused(bundles: dict[str, Path]) -> None:
    bundle = read_bundle(bundles["int8"])
    first, second, *others = bundle.manifest.graphs
    inputs = tuple(
        dataclasses.replace(array, dtype="bfloat16") if array.name == "keys" else array for array in second.inputs
    )
    graphs = (first, dataclasses.replace(second, inputs=inputs), *others)
    manifest = dataclasses.replace(bundle.manifest, graphs=graphs)
    with pytest.raises(InputError, match=f"graphs {first.name} and {second.name} have different caches"):
        load_graphs(dataclasses.replace(bundle, manifest=manifest))
