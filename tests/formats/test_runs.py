"""Runs: layers of one weight in formats of their own give what their dense weights give, wherever the scan is cut."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    FormatConfig,
    Int4,
    Int4Config,
    Int8,
    Int8Config,
    NMConfig,
    NMInt4Config,
    Runs,
    TernaryConfig,
    VNMInt4Config,
    nbytes,
    stack_layers,
    take_layer,
    to_dense,
)
from hsai.formats.storage import describe, named_arrays, named_weights, replace_weights, restore
from hsai.models import KVCache, MoEConfig, RopeConfig, Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer
from hsai.sharding import MeshConfig, array_sharding, make_mesh, tree_shardings, use_mesh

F32, INT8, G32, G64 = DenseConfig(dtype="float32"), Int8Config(), Int4Config(group=32), Int4Config(group=64)
SPARSE, VENOM = NMInt4Config(n=2, group=32), VNMInt4Config(v=16, n=2, m=8, group=32)
LAYERS = 6
# Cut at 1; at 2 and 4; at every layer; and not at all.
FORMATS: dict[str, tuple[FormatConfig, ...]] = {
    "layers.attention.q": (INT8, *(5 * [G32])),
    "layers.attention.o": (G64, G64, F32, F32, SPARSE, SPARSE),
    "layers.mlp.up": (NMConfig(n=1, dtype="float32"), INT8, G64, G32, VENOM, TernaryConfig(group=None)),
    "layers.mlp.down": (SPARSE,) * LAYERS,
}
SIZES: dict[str, Any] = dict(vocab=96, embed=64, layers=LAYERS, heads=4, kv_heads=2, head_dim=16, mlp=128)
FAMILIES: list[dict[str, Any]] = [
    {},
    {"sliding_window": 4, "global_every": 3, "local_rope": RopeConfig(theta=99.0), "post_norm": True},
    {"moe": MoEConfig(experts=4, active=2), "qkv_bias": True},
]
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)


@functools.cache
def make_pair(family: int) -> tuple[Transformer, Transformer]:
    """A model with runs, and the same numbers as dense arrays."""
    config = TransformerConfig(**SIZES, max_length=32, dtype="float32", **FAMILIES[family])
    model = Transformer(config, rngs=nnx.Rngs(0))
    dense = {name: named_weights(model)[name].get_value() for name in FORMATS}
    values = {name: pack_layers(w, FORMATS[name]) for name, w in dense.items()}
    return replace_weights(model, values), replace_weights(model, {n: to_dense(v) for n, v in values.items()})


def pack_layers(w: jax.Array, formats: tuple[FormatConfig, ...]):
    return stack_layers([format.pack(layer) for format, layer in zip(formats, w, strict=True)])


@jax.jit
def read(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model.logits(model(tokens)[0])


@jax.jit
def step(model: Transformer, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache | None]:
    hidden, longer = model(tokens, cache=cache)
    return model.logits(hidden), longer


def decode(model: Transformer, tokens: np.ndarray) -> jax.Array:
    """Logits of all tokens but the first 8: those by a prefill, the rest one by one."""
    _, cache = step(model, tokens[:, :8], model.make_cache(tokens.shape[0], 16))
    found = []
    for at in range(8, tokens.shape[1]):
        logits, cache = step(model, tokens[:, at : at + 1], cache)
        found.append(logits)
    return jnp.concatenate(found, axis=1)


def test_neighbours_of_one_format_are_one_part() -> None:
    w = jax.random.normal(jax.random.key(0), (LAYERS, 64, 24))
    stacked = pack_layers(w, FORMATS["layers.attention.o"])
    assert isinstance(stacked, Runs)
    assert [tuple(part.shape) for part in stacked.parts] == [(2, 64, 24)] * 3 and stacked.starts == (0, 2, 4)
    assert stacked.shape == (6, 64, 24) and stacked.ndim == 3 and stacked.size == w.size
    assert nbytes(stacked) == sum(map(nbytes, stacked.parts))
    layers = [to_dense(f.pack(layer)) for f, layer in zip(FORMATS["layers.attention.o"], w, strict=True)]
    np.testing.assert_array_equal(to_dense(stacked), jnp.stack(layers))
    for layer in range(LAYERS):
        taken = take_layer({"w": stacked, "gain": w}, layer)
        np.testing.assert_array_equal(to_dense(taken["w"]), layers[layer])
        np.testing.assert_array_equal(taken["gain"], w[layer])
    assert [type(take_layer(stacked, layer)) for layer in (0, 1)] == [Int4, Int4]


def test_equal_layers_make_the_formats_own_stack() -> None:
    w = jax.random.normal(jax.random.key(0), (LAYERS, 64, 24))
    stacked = pack_layers(w, (INT8,) * LAYERS)
    assert isinstance(stacked, Int8)
    jax.tree.map(np.testing.assert_array_equal, stacked, INT8.pack(w))
    # Groups of two sizes are two layouts, and so are two dtypes.
    assert isinstance(pack_layers(w[:2], (G32, G64)), Runs)
    assert isinstance(pack_layers(w[:2], (F32, DenseConfig(dtype="bfloat16"))), Runs)


@pytest.mark.parametrize("family", range(len(FAMILIES)))
def test_logits_are_those_of_the_dense_weights(family: int) -> None:
    mixed, dense = make_pair(family)
    assert {describe(mixed)[name]["format"] for name in FORMATS} == {"runs", "nm_int4"}
    np.testing.assert_allclose(read(mixed, TOKENS), read(dense, TOKENS), rtol=0, atol=1e-4)
    np.testing.assert_allclose(decode(mixed, TOKENS), read(dense, TOKENS)[:, 8:], rtol=0, atol=1e-4)


def test_the_order_of_layers_is_kept() -> None:
    """Two layers that change places give other logits: the comparison above would see it."""
    mixed, _ = make_pair(0)
    up = mixed.layers.mlp.up.get_value()
    turned = replace_weights(mixed, {"layers.mlp.up": Runs((up.parts[1], up.parts[0], *up.parts[2:]))})
    assert float(jnp.max(jnp.abs(read(turned, TOKENS) - read(mixed, TOKENS)))) > 0.01


def test_a_single_run_is_the_stack_to_the_bit() -> None:
    mixed, _ = make_pair(0)
    plain = replace_weights(
        mixed, {name: G32.pack(to_dense(named_weights(mixed)[name].get_value())) for name in FORMATS}
    )
    wrapped = replace_weights(plain, {name: Runs((named_weights(plain)[name].get_value(),)) for name in FORMATS})
    np.testing.assert_array_equal(read(wrapped, TOKENS), read(plain, TOKENS))


def test_gradients_go_through_the_cuts() -> None:
    """Of what is not packed, in every layer; with and without rematerialization."""

    def lose(gains: jax.Array, model: Transformer, remat: str) -> jax.Array:
        tuned = replace_weights(model, {"layers.mlp_norm.gain": gains})
        return jnp.sum(jnp.square(tuned(TOKENS, remat=remat)[0][..., ::3]))

    mixed, dense = make_pair(0)
    # Packed products have no gradients of their own yet; runs of dense stacks have all.
    cut = {
        n: Runs((to_dense(named_weights(dense)[n].get_value())[:2], named_weights(dense)[n].get_value()[2:]))
        for n in FORMATS
    }
    gains = mixed.layers.mlp_norm.gain.get_value()
    wanted = jax.jit(jax.grad(lose), static_argnums=2)(gains, dense, "none")
    for remat in ("none", "full"):
        found = jax.jit(jax.grad(lose), static_argnums=2)(gains, replace_weights(dense, cut), remat)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(wanted))))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 2)], ids=str)
def test_logits_on_a_mesh_are_those_of_one_device(sizes: tuple[int, int, int]) -> None:
    mixed, _ = make_pair(0)
    config = MeshConfig(**dict(zip(("data", "fsdp", "model"), sizes, strict=True)))
    mesh = make_mesh(config, jax.devices()[: np.prod(sizes)])
    tokens = np.tile(TOKENS, (2, 1))
    with use_mesh(mesh):
        placed = jax.device_put(mixed, tree_shardings(mixed, mesh))
        found = read(placed, jax.device_put(tokens, array_sharding(mesh, ("batch", "seq"), tokens.shape)))
    np.testing.assert_allclose(found, read(mixed, tokens), rtol=0, atol=1e-4)


def test_a_model_comes_back_from_its_arrays() -> None:
    mixed, _ = make_pair(0)
    records = json.loads(json.dumps(describe(mixed)))
    assert records["layers.attention.o"] == {
        "format": "runs",
        "parts": [{"format": "int4"}, {"format": "dense"}, {"format": "nm_int4", "n": 2, "m": 4}],
    }
    arrays = {name: np.asarray(array) for name, array in named_arrays(mixed).items()}
    assert {"layers.attention.o.parts.0.words", "layers.attention.o.parts.1"} <= set(arrays)
    back = restore(abstract_transformer(mixed.config), records, arrays)
    assert jax.tree.structure(back) == jax.tree.structure(mixed)
    jax.tree.map(np.testing.assert_array_equal, back, mixed)


def test_parts_that_are_no_runs_of_the_weight_are_named() -> None:
    mixed, _ = make_pair(0)
    name = "layers.attention.o"
    dense = {"format": "dense"}

    def change(record: dict[str, Any], arrays: dict[str, Any], of: str = name) -> None:
        kept = {n: a for n, a in named_arrays(mixed).items() if n != of and not n.startswith(f"{of}.")}
        restore(abstract_transformer(mixed.config), describe(mixed) | {of: record}, kept | arrays)

    def two(first: tuple[int, ...], second: tuple[int, ...], of: str = name) -> dict[str, Any]:
        return {f"{of}.parts.{i}": jnp.zeros(shape) for i, shape in enumerate((first, second))}

    runs = {"format": "runs", "parts": [dense, dense]}
    change(runs, two((4, 64, 64), (2, 64, 64)))
    for record, arrays, message in [
        ({"format": "runs"}, {}, "its record has no list of parts"),
        ({"format": "runs", "parts": []}, {}, "its record has no list of parts"),
        ({"format": "runs", "parts": ["dense"]}, {}, "its record has no list of parts"),
        ({"format": "runs", "parts": [runs]}, {}, f"part 0 of '{name}' is of runs itself"),
        (runs, two((4, 64, 64), (2, 64, 32)), rf"part 1 of '{name}' has shape \[2, 64, 32\]"),
        (runs, two((6, 64, 64), (0, 64, 64)), rf"part 1 of '{name}' has shape \[0, 64, 64\]"),
        (runs, two((4, 64, 64), (3, 64, 64)), rf"'{name}' has shape \[7, 64, 64\], the model needs \[6, 64, 64\]"),
        (runs, {f"{name}.parts.0": jnp.zeros((6, 64, 64))}, f"array '{name}.parts.1' is missing"),
        ({"format": "runs", "parts": [{"format": "int5"}]}, {}, "'layers.attention.o.parts.0' has the unknown format"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            change(record, arrays)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"part 0 of 'embed' has shape \[32, 96\], which is no run of its layers"):
        change(runs, two((32, 96), (32, 96), "embed"), of="embed")
