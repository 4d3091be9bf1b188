"""One `__call__`: packed rows, prefill and decoding give what a plain forward pass gives."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.errors import InputError
from hsai.formats.storage import named_arrays
from hsai.models import KVCache, MoEConfig, RopeConfig, Transformer, TransformerConfig
from tests.models.conftest import SMALL, MakeModel

CLOSE = 2e-5
"""Largest difference of a normalized hidden state, float32; its elements are of order one."""

FAMILIES: list[dict[str, Any]] = [
    {},
    {"sliding_window": 5, "qk_norm": True},
    {"layers": 3, "sliding_window": 4, "global_every": 3, "local_rope": RopeConfig(theta=99.0), "post_norm": True},
    {"moe": MoEConfig(experts=6, active=2), "mlp": 24, "qkv_bias": True},
]


@functools.partial(jax.jit, donate_argnums=2)
def read(model: Transformer, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache | None]:
    """Prefill or decoding: which it is, the length says."""
    return model(tokens, cache=cache)


@jax.jit
def forward(model: Transformer, tokens: jax.Array, **kinds: jax.Array) -> jax.Array:
    return model(tokens, **kinds)[0]


def draw_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL["vocab"], (rows, length), np.int32)


@pytest.mark.parametrize("changes", FAMILIES)
@pytest.mark.parametrize(("pieces", "slots"), [([12], 12), ([12], 40), ([7, 1, 1, 1, 1, 1], 12), ([1, 5, 1, 5], 40)])
def test_pieces_through_a_cache_are_the_whole(
    make_model: MakeModel, changes: dict[str, Any], pieces: list[int], slots: int
) -> None:
    model, tokens = make_model(**changes), draw_tokens(2, sum(pieces))
    cache = model.make_cache(2, slots)
    found = []
    for piece in np.split(tokens, np.cumsum(pieces)[:-1], axis=1):
        hidden, cache = read(model, piece, cache)
        found.append(hidden)
    assert cache.lengths.tolist() == [sum(pieces)] * 2 and cache.slots == slots
    np.testing.assert_allclose(np.concatenate(found, axis=1), forward(model, tokens), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("changes", FAMILIES)
def test_rows_of_different_lengths_decode_together(make_model: MakeModel, changes: dict[str, Any]) -> None:
    """Prompts padded to one length; what stands in the padding's slots is overwritten before it can be seen."""
    model, tokens, lengths = make_model(**changes), draw_tokens(3, 10), np.array([2, 7, 5], np.int32)
    padded = np.where(np.arange(7) < lengths[:, None], tokens[:, :7], 60)
    _, cache = read(model, padded, model.make_cache(3, 16))
    cache = dataclasses.replace(cache, lengths=jnp.asarray(lengths))
    whole = np.asarray(forward(model, tokens))
    for step in range(3):
        at = lengths + step
        hidden, cache = read(model, tokens[np.arange(3), at][:, None], cache)
        np.testing.assert_allclose(hidden[:, 0], whole[np.arange(3), at], rtol=0, atol=CLOSE)


def test_a_full_cache_keeps_what_it_holds(make_model: MakeModel) -> None:
    model, tokens = make_model(), draw_tokens(1, 8)
    _, cache = read(model, tokens, model.make_cache(1, 8))
    before = jax.device_get(cache)
    _, after = read(model, tokens[:, :3], cache)
    assert np.array_equal(before.keys, after.keys) and np.array_equal(before.values, after.values)


@pytest.mark.parametrize(("changes", "cut"), [(FAMILIES[0], 6), (FAMILIES[1], 1), (FAMILIES[1], 6)])
def test_documents_packed_in_a_row_do_not_see_each_other(
    make_model: MakeModel, changes: dict[str, Any], cut: int
) -> None:
    model, tokens = make_model(**changes), draw_tokens(1, 13)
    offsets = np.arange(13, dtype=np.int32)
    positions, segments = np.where(offsets < cut, offsets, offsets - cut)[None], (offsets >= cut).astype(np.int32)[None]
    packed = forward(model, tokens, positions=positions, segments=segments)
    np.testing.assert_allclose(packed[:, :cut], forward(model, tokens[:, :cut]), rtol=0, atol=CLOSE)
    np.testing.assert_allclose(packed[:, cut:], forward(model, tokens[:, cut:]), rtol=0, atol=CLOSE)
    if cut == 6:  # the row as one document is another thing
        assert np.abs(np.asarray(packed - forward(model, tokens)))[:, cut:].max() > 0.01


def test_a_token_changes_nothing_before_it(make_model: MakeModel) -> None:
    model, tokens = make_model(), draw_tokens(1, 10)
    changed = tokens.copy()
    changed[0, 6] = (tokens[0, 6] + 1) % SMALL["vocab"]
    first, second = forward(model, tokens), forward(model, changed)
    assert jnp.array_equal(first[:, :6], second[:, :6])
    assert (jnp.abs(first - second)[:, 6:].max(axis=-1) > 1e-3).all()


def test_remat_changes_memory_and_no_gradient(make_model: MakeModel) -> None:
    model, tokens = make_model(layers=6), draw_tokens(4, 32)

    def compile_gradient(remat: Any) -> jax.stages.Compiled:
        return jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(m(tokens, remat=remat)[0])))).lower(model).compile()

    programs = {remat: compile_gradient(remat) for remat in ("none", "dots", "full")}
    wanted = named_arrays(programs["none"](model))
    for remat in ("dots", "full"):
        for name, grad in named_arrays(programs[remat](model)).items():
            scale = float(jnp.abs(wanted[name]).max())
            np.testing.assert_allclose(grad, wanted[name], rtol=0, atol=1e-5 * scale, err_msg=name)
    sizes = {remat: program.memory_analysis().temp_size_in_bytes for remat, program in programs.items()}
    assert sizes["full"] < sizes["dots"] < sizes["none"]


def test_bfloat16_is_near_float32_and_trains(make_model: MakeModel) -> None:
    """Two significant digits after two blocks; parameters and gradients stay float32."""
    exact, model, tokens = make_model(), make_model(dtype="bfloat16"), draw_tokens(2, 16)
    hidden = forward(model, tokens)
    assert hidden.dtype == jnp.bfloat16 and model.make_cache(1).keys.dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32
    np.testing.assert_allclose(hidden.astype(np.float32), forward(exact, tokens), rtol=0, atol=0.1)
    grads = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(m.logits(m(tokens)[0])))))(model)
    for name, grad in named_arrays(grads).items():
        assert grad.dtype == jnp.float32 and jnp.isfinite(grad).all() and jnp.abs(grad).max() > 0, name


def test_decoding_writes_the_cache_where_it_is(make_model: MakeModel) -> None:
    """The caller gives its memory away and gets it back: no second cache, not even for a moment."""
    model = make_model(max_length=4096)
    cache, tokens = model.make_cache(1), draw_tokens(1, 1)
    size = cache.keys.nbytes + cache.values.nbytes
    memory = read.lower(model, tokens, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size  # one layer is read at a time
    places = [part.unsafe_buffer_pointer() for part in (cache.keys, cache.values)]
    _, after = read(model, tokens, cache)
    assert [part.unsafe_buffer_pointer() for part in (after.keys, after.values)] == places


def test_a_model_attends_natively_and_trains_in_plain_jax(make_model: MakeModel) -> None:
    model, tokens = make_model(), draw_tokens(1, 1)
    assert "hsai_attention" in read.lower(model, tokens, model.make_cache(1)).as_text()
    assert "hsai_attention" in forward.lower(model, tokens).as_text()
    train = jax.jit(jax.grad(lambda model: jnp.sum(model(tokens)[0])))
    assert "hsai_attention" not in train.lower(model).as_text()


def test_initial_weights_have_the_spread_they_ask_for() -> None:
    config = TransformerConfig(**SMALL | {"embed": 128, "mlp": 512, "heads": 8, "head_dim": 32, "vocab": 512})
    model = named_arrays(Transformer(config, rngs=nnx.Rngs(0)))
    for name, std in (("embed", 128**-0.5), ("layers.mlp.gate", 128**-0.5), ("layers.mlp.down", (512 * 4) ** -0.5)):
        assert np.isclose(float(jnp.std(model[name])), std, rtol=0.02), name
    first, second = model["layers.mlp.up"]
    assert not jnp.array_equal(first, second)  # each layer draws its own
    assert not jnp.array_equal(model["layers.mlp.up"], model["layers.mlp.gate"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "model.layers=0 must be at least 1"),
        ({"heads": 6, "kv_heads": 4}, "model.heads=6 must be a multiple of model.kv_heads=4"),
        ({"head_dim": 7}, "model.head_dim=7 must be even"),
        ({"sliding_window": 0}, "model.sliding_window=0 must be at least 1, or none"),
        ({"global_every": 1, "sliding_window": 4}, "model.global_every=1 must be at least 2"),
        ({"global_every": 3}, "model.global_every=3 .* needs a model.sliding_window, which is None"),
        ({"local_rope": RopeConfig()}, "model.local_rope .* needs model.global_every"),
        ({"query_scalar": 0}, "model.query_scalar=0 must be at least 1, or none"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0 must be positive"),
        ({"norm_eps": 1e-46}, "model.norm_eps=1e-46 must be positive, and in float32 neither 0 nor infinite"),
        ({"norm_eps": float("nan")}, "model.norm_eps=nan must be positive"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TransformerConfig(**SMALL | changes)


def test_segments_and_a_cache_exclude_each_other(make_model: MakeModel) -> None:
    model, tokens = make_model(), draw_tokens(1, 4)
    with pytest.raises(ValueError, match="exclude each other"):
        model(tokens, segments=np.zeros_like(tokens), cache=model.make_cache(1, 8))
