"""Reading token by token and bucket by bucket gives what one forward pass over all tokens gives."""

from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export import GraphConfig, read_bundle, write_bundle
from hsai.infer.runtime import Runtime, load_runtime, plan_buckets, trace_runtime
from tests.export.tiny_models import full_logits, make_model

TOLERANCE = 2e-5
"""Largest difference of float32 logits of order one; sums over a padded cache are taken in another order."""

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "window": {"sliding_window": 5},
    "qk_norm": {"qk_norm": True, "tie_embeddings": False, "activation": "gelu"},
    "packed": {"format_name": "nm_int4"},
}


@pytest.fixture(scope="module", params=MODELS)
def traced(request: pytest.FixtureRequest) -> tuple[Any, Runtime]:
    """A model, and its runtime with prefills for 4 and 16 tokens and a context of 48."""
    model = make_model(**MODELS[request.param])
    return model, trace_runtime(model, GraphConfig(prefill_buckets=(4, 16)))


# Below a bucket, at one, between two, several of the largest with a rest, and up to the last slot.
@pytest.mark.parametrize("prompt", [1, 3, 4, 9, 16, 21, 35, 46])
def test_incremental_decoding_equals_a_full_forward(prompt: int, traced: tuple[Any, Runtime]) -> None:
    model, runtime = traced
    ids = np.random.default_rng(prompt).integers(0, 512, 48).astype(np.int32)
    expected = full_logits(model, ids)
    logits, cache = runtime.prefill(ids[:prompt], runtime.make_cache())
    np.testing.assert_allclose(logits[0], expected[prompt - 1], atol=TOLERANCE, rtol=TOLERANCE)
    for position in range(prompt, min(prompt + 8, 48)):
        assert int(cache.lengths[0]) == position
        logits, cache = runtime.decode(jnp.asarray(ids[position : position + 1]), cache)
        np.testing.assert_allclose(logits[0], expected[position], atol=TOLERANCE, rtol=TOLERANCE)


def test_a_sliding_window_hides_what_is_before_it(traced: tuple[Any, Runtime]) -> None:
    """Two prompts that differ in their first token only: two layers of window 5 do not see it from position 20."""
    model, runtime = traced
    ids = np.arange(1, 22, dtype=np.int32)
    other = np.concatenate([[300], ids[1:]]).astype(np.int32)
    one, two = (np.asarray(runtime.prefill(prompt, runtime.make_cache())[0]) for prompt in (ids, other))
    assert np.array_equal(one, two) == (model.config.sliding_window is not None)


def test_steps_take_over_the_memory_of_the_cache(traced: tuple[Any, Runtime]) -> None:
    runtime = traced[1]
    _, cache = runtime.prefill(np.array([1, 2, 3], np.int32), runtime.make_cache())
    runtime.decode(jnp.array([4], jnp.int32), cache)
    assert cache.keys.is_deleted() and cache.values.is_deleted() and cache.lengths.is_deleted()


def test_shipped_graphs_take_over_the_memory_of_the_cache(bundles: dict[str, Path]) -> None:
    runtime = load_runtime(read_bundle(bundles["int8"]))
    assert runtime.buckets == (4, 16) and runtime.slots == 48
    _, cache = runtime.prefill(np.array([1, 2, 3], np.int32), runtime.make_cache())
    runtime.decode(jnp.array([4], jnp.int32), cache)
    assert cache.keys.is_deleted() and cache.values.is_deleted() and cache.lengths.is_deleted()


def test_traced_programs_use_the_kernels_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the automatic choice has is in the traced program; an exported one would hold the reference."""
    from hsai_kernels.ops.quantized_matmul import api

    def use_marker(x: jax.Array, *weights: jax.Array, **options: Any) -> jax.Array:
        return jnp.full((*x.shape[:-1], weights[0].shape[-1]), 0.5, x.dtype)

    monkeypatch.setitem(api.BACKENDS, "cpu", use_marker)
    runtime = trace_runtime(make_model("int8", layers=1), GraphConfig(prefill_buckets=(2,)))
    logits, _ = runtime.prefill(np.array([1, 2], np.int32), runtime.make_cache())
    assert (np.asarray(logits) == 0.5).all()


def test_prefill_of_no_tokens_is_a_defect(traced: tuple[Any, Runtime]) -> None:
    with pytest.raises(ValueError, match="prefill of no tokens"):
        traced[1].prefill(np.array([], np.int32), traced[1].make_cache())


def test_bundle_without_graphs_cannot_run_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_bundle(tmp_path / "b", make_model("int8"), tokenizer)
    with pytest.raises(InputError, match="holds no graphs: export it with graphs, or run the model without them"):
        load_runtime(read_bundle(tmp_path / "b"))


def test_graphs_of_several_rows_do_not_serve_one_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_bundle(tmp_path / "b", make_model("int8"), tokenizer, graphs=GraphConfig(prefill_buckets=(4,), batch=2))
    with pytest.raises(InputError, match="graph prefill_4 has batch=2; one prompt needs 1"):
        load_runtime(read_bundle(tmp_path / "b"))


@hypothesis.given(st.integers(1, 5000), st.lists(st.integers(1, 600), min_size=1, max_size=5, unique=True).map(sorted))
def test_plan_reads_everything_with_little_padding(tokens: int, buckets: list[int]) -> None:
    plan = list(plan_buckets(tokens, buckets))
    assert set(plan) <= set(buckets)
    assert sum(plan[:-1]) < tokens <= sum(plan)
    rest = tokens - sum(plan[:-1])
    assert rest * 2 >= plan[-1] or plan[-1] == buckets[0]


def test_plan_of_the_default_buckets() -> None:
    buckets = GraphConfig().prefill_buckets
    expected = {
        5: [32],
        32: [32],
        40: [32, 32],
        64: [128],
        130: [128, 32],
        200: [128, 128],
        300: [512],
        600: [512, 128],
    }
    assert {tokens: list(plan_buckets(tokens, buckets)) for tokens in expected} == expected
