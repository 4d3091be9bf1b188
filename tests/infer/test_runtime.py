"""Programs over pages: chunk by chunk and token by token they give what one forward pass over all tokens gives."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.export import GraphConfig
from hsai.infer.programs import MOST_STEPS, Made, Vocabulary
from hsai.infer.runtime import TracedRuntime, make_extras, make_rows, plan_buckets
from hsai.infer.sampling import SamplingConfig
from hsai.models import KVCache
from tests.export.tiny_models import full_logits, make_model

TOLERANCE = 2e-5
"""Largest difference of float32 logits of order one; sums over pages are taken in another order."""

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "window": {"sliding_window": 5},
    "qk_norm": {"qk_norm": True, "tie_embeddings": False, "activation": "gelu"},
    "packed": {"format_name": "nm_int4"},
}
VOCABULARY = Vocabulary(280, frozenset({0}))
PAGES = 3


@pytest.fixture(scope="module", params=MODELS)
def traced(request: pytest.FixtureRequest) -> tuple[Any, TracedRuntime]:
    """A model, and its runtime with chunks of 4 and 16 tokens, a context of 48, and pages of 48."""
    model = make_model(**MODELS[request.param])
    return model, TracedRuntime(model, GraphConfig(prefill_buckets=(4, 16)))


def read(runtime: TracedRuntime, ids: np.ndarray, pages: KVCache) -> KVCache:
    """Reads `ids` into page 1."""
    start, table = 0, np.array([[1]], np.int32)
    for bucket in plan_buckets(len(ids), runtime.buckets):
        part = ids[start : start + bucket]
        pages = runtime.read(part, start, table, pages)
        start += len(part)
    return pages


def write(runtime: TracedRuntime, token: int, position: int, pages: KVCache, steps: int = 1) -> tuple[Made, KVCache]:
    """Greedily writes into page 1 behind a token, and tells probabilities."""
    extras = make_extras(1, VOCABULARY.size)
    extras.probable[...] = True  # type: ignore[index]
    rows = make_rows([(token, position, steps, [1], SamplingConfig(), 0)], 1, 1, PAGES)
    return runtime.write(rows, extras, steps, "full", VOCABULARY, pages)


def check(made: Made, step: int, logits: np.ndarray) -> None:
    """What a step chose and tells are the likeliest tokens of float32 (V,) logits."""
    assert made.top_tokens is not None and made.top_logprobs is not None and made.logprobs is not None
    expected = np.asarray(jax.nn.log_softmax(logits[: VOCABULARY.size]))
    best = np.argsort(-expected, kind="stable")[:20]
    np.testing.assert_allclose(made.top_logprobs[step, 0], expected[best], atol=TOLERANCE, rtol=TOLERANCE)
    assert made.tokens[step, 0] == made.top_tokens[step, 0, 0] == best[0]
    assert made.logprobs[step, 0] == made.top_logprobs[step, 0, 0]


# Below a chunk, of one, between two, several of the largest with a rest, and up to the last slot.
@pytest.mark.parametrize("prompt", [1, 4, 9, 21, 46])
def test_incremental_decoding_equals_a_full_forward(prompt: int, traced: tuple[Any, TracedRuntime]) -> None:
    model, runtime = traced
    ids = np.random.default_rng(prompt).integers(0, 280, 48).astype(np.int32)
    expected = full_logits(model, ids)
    pages = read(runtime, ids[: prompt - 1], runtime.make_pages(PAGES))
    for position in range(prompt - 1, min(prompt + 7, 48)):
        made, pages = write(runtime, ids[position], position, pages)
        check(made, 0, expected[position])


def test_a_block_is_its_steps(traced: tuple[Any, TracedRuntime]) -> None:
    """The tokens of a block are those of as many blocks of one; it ends with the limit, or a stop."""
    model, runtime = traced
    ids = np.array([5, 9, 2, 250], np.int32)
    block, _ = write(runtime, 250, 3, read(runtime, ids[:3], runtime.make_pages(PAGES)), steps=9)
    tokens = block.tokens[:, 0].tolist()
    text = [*ids.tolist(), *tokens[: tokens.index(-1)]]
    expected = full_logits(model, np.array(text))
    for step in range(len(text) - 4):
        check(block, step, expected[3 + step])
    assert len(text) - 4 == 9 or text[-1] == 0
    assert set(tokens[len(text) - 4 :]) == {-1} and len(tokens) == MOST_STEPS


def test_a_sliding_window_hides_what_is_before_it(traced: tuple[Any, TracedRuntime]) -> None:
    """Two prompts that differ in their first token only: two layers of window 5 do not see it from position 20."""
    model, runtime = traced
    ids = np.arange(1, 22, dtype=np.int32)
    other = np.concatenate([[270], ids[1:]]).astype(np.int32)
    one, two = (
        np.asarray(write(runtime, 21, 20, read(runtime, prompt[:-1], runtime.make_pages(PAGES)))[0].top_logprobs)
        for prompt in (ids, other)
    )
    assert np.array_equal(one, two) == (model.config.sliding_window is not None)


def test_steps_take_over_the_memory_of_the_pages(traced: tuple[Any, TracedRuntime]) -> None:
    runtime = traced[1]
    first = runtime.make_pages(PAGES)
    second = read(runtime, np.array([1, 2, 3], np.int32), first)
    write(runtime, 4, 3, second)
    for pages in (first, second):
        assert pages.keys.is_deleted() and pages.values.is_deleted() and pages.lengths.is_deleted()


def test_traced_programs_use_the_kernels_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the automatic choice has is in the traced program; an exported one would hold the reference."""
    from hsai_kernels.ops.quantized_matmul import api
    from hsai_kernels.ops.quantized_matmul.cpu import ARRAYS

    def use_marker(x: jax.Array, *arrays: jax.Array, **options: Any) -> tuple[jax.Array, ...]:
        weights = arrays[::ARRAYS]
        return tuple(jnp.full((*x.shape[:-1], values.shape[-1]), 0.5, x.dtype) for values in weights)

    monkeypatch.setitem(api.BACKENDS, "cpu", use_marker)
    runtime = TracedRuntime(make_model("int8", layers=1), GraphConfig(prefill_buckets=(2,)))
    made, _ = write(runtime, 2, 0, runtime.make_pages(PAGES))
    np.testing.assert_allclose(made.logprobs[0], -np.log(280), rtol=1e-6)  # type: ignore[index]


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
