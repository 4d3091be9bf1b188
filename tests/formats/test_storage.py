"""Models as named arrays and back: what is written can be read, and what does not fit is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.errors import InputError
from hsai.formats import (
    Int2Config,
    Int3Config,
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    NMConfig,
    NMInt4Config,
    OutliersConfig,
    TernaryConfig,
    UnstructuredInt8Config,
    VNMInt8Config,
)
from hsai.formats.storage import describe, fill, named_arrays, named_weights, replace_weights, restore
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer

CONFIG = TransformerConfig(
    vocab=96,
    embed=64,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=32,
    mlp=128,
    max_length=32,
    tie_embeddings=False,
    dtype="float32",
)
FORMATS = {
    "embed": Int8Config(),
    "unembed": Int3Config(group=64),
    "layers.attention.o": TernaryConfig(group=64),
    "layers.attention.q": Int4Config(group=32),
    "layers.attention.v": Int2Config(group=64),
    "layers.mlp.down": NMConfig(n=2, dtype="float32"),
    "layers.mlp.up": NMInt4Config(n=3, group=32),
    "layers.mlp.gate": NMInt4Config(n=4, m=8, group=64),
}
OTHERS = {
    "embed": OutliersConfig(base=Int8Config(), share=0.05),
    "layers.attention.o": UnstructuredInt8Config(density=0.25),
    "layers.mlp.down": OutliersConfig(base=NMInt4Config(n=2, group=32), share=0.05),
    "layers.mlp.gate": VNMInt8Config(v=32, n=2, m=8),
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    """A model with a weight of every format."""
    dense = Transformer(CONFIG, rngs=nnx.Rngs(0))
    weights = named_weights(dense)
    return replace_weights(dense, {name: f.pack(weights[name].get_value()) for name, f in FORMATS.items()})


def test_names_are_the_way_through_the_tree(model: Transformer) -> None:
    arrays = named_arrays(model)
    assert arrays["layers.attention.q.words"] is model.layers.attention.q.get_value().words
    assert arrays["layers.attention.k"] is model.layers.attention.k.get_value()
    assert {"embed.values", "embed.scale", "unembed.words", "final_norm.gain", "layers.mlp.up.indices"} <= set(arrays)
    assert len(arrays) == len(jax.tree.leaves(model))


def test_records_are_json_with_the_static_fields(model: Transformer) -> None:
    records = describe(model)
    assert records["embed"] == {"format": "int8"}
    assert records["layers.mlp.up"] == {"format": "nm_int4", "n": 3, "m": 4}
    assert records["unembed"] == {"format": "int3"} and records["layers.attention.v"] == {"format": "int2"}
    assert records["layers.attention.k"] == {"format": "dense"}
    assert json.loads(json.dumps(records)) == records
    assert set(records) == set(named_weights(model))


def test_a_model_comes_back_from_its_arrays(model: Transformer) -> None:
    records = json.loads(json.dumps(describe(model)))
    arrays = {name: np.asarray(array) for name, array in named_arrays(model).items()}
    back = restore(abstract_transformer(CONFIG), records, arrays)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, back, model)
    tokens = jnp.arange(8)[None]
    got, want = (m.logits(m(tokens)[0]) for m in (jax.tree.map(jnp.asarray, back), model))
    np.testing.assert_array_equal(got, want)


def test_formats_within_formats_come_back() -> None:
    dense = Transformer(CONFIG, rngs=nnx.Rngs(0))
    weights = named_weights(dense)
    model = replace_weights(dense, {name: f.pack(weights[name].get_value()) for name, f in OTHERS.items()})
    records = json.loads(json.dumps(describe(model)))
    assert records["embed"] == {"format": "outliers", "base": {"format": "int8"}}
    assert records["layers.mlp.down"] == {"format": "outliers", "base": {"format": "nm_int4", "n": 2, "m": 4}}
    assert records["layers.attention.o"] == {"format": "unstructured_int8", "n": 16, "m": 64}
    arrays = {name: np.asarray(array) for name, array in named_arrays(model).items()}
    assert {"layers.mlp.down.base.words", "layers.mlp.down.rows", "layers.mlp.down.index"} <= set(arrays)
    back = restore(abstract_transformer(CONFIG), records, arrays)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, back, model)
    for change, message in (
        ({"format": "outliers"}, "outliers of 'embed' has no packed 'base'"),
        ({"format": "outliers", "base": {"format": "dense"}}, "outliers of 'embed' has no packed 'base'"),
        ({"format": "outliers", "base": {"format": "int4"}}, "array 'embed.base.words' is missing"),
    ):
        with pytest.raises(InputError, match=message):
            restore(abstract_transformer(CONFIG), records | {"embed": change}, arrays)
    with pytest.raises(InputError, match="array 'embed.base.scale' is missing"):
        restore(abstract_transformer(CONFIG), records, {n: a for n, a in arrays.items() if n != "embed.base.scale"})
    with pytest.raises(InputError, match="'layers.attention.o' do not fit together as unstructured_int8"):
        other = records | {"layers.attention.o": {"format": "unstructured_int8", "n": 8, "m": 64}}
        restore(abstract_transformer(CONFIG), other, arrays)


def test_replacing_leaves_the_old_model_and_the_axes_alone(model: Transformer) -> None:
    dense = Transformer(CONFIG, rngs=nnx.Rngs(0))
    before = dense.embed.get_value()
    changed = replace_weights(dense, {"embed": Int8Config().pack(before)})
    assert dense.embed.get_value() is before
    assert changed.embed.get_value().values.dtype == jnp.int8
    assert changed.embed.get_metadata("out_sharding") == ("embed", "vocab")
    assert changed.layers.mlp.up.get_value() is dense.layers.mlp.up.get_value()


def change(model: Transformer, *, drop: str = "", add: dict | None = None, records: dict | None = None) -> None:
    """Restores with an array dropped, some added, or some records replaced."""
    arrays = named_arrays(model) | (add or {})
    arrays.pop(drop, None)
    restore(abstract_transformer(CONFIG), describe(model) | (records or {}), arrays)


def test_what_does_not_fit_is_named(model: Transformer) -> None:
    words = named_arrays(model)["layers.attention.q.words"]
    indices = named_arrays(model)["layers.mlp.down.indices"]
    cases = [
        ({"drop": "layers.attention.q.scale"}, "array 'layers.attention.q.scale' is missing"),
        ({"drop": "layers.attention.k"}, "array 'layers.attention.k' is missing"),
        ({"add": {"extra": words}}, "array 'extra' is unknown"),
        ({"add": {"layers.attention.q.words": words[:1]}}, "fit"),
        ({"add": {"layers.attention.k": jnp.zeros((2, 64, 8))}}, r"'layers.attention.k' has shape \[2, 64, 8\]"),
        ({"add": {"layers.mlp.down.indices": indices[:, :1]}}, "arrays of 'layers.mlp.down' do not fit together as nm"),
        ({"records": {"other": {"format": "dense"}}}, "'other' is unknown"),
        ({"records": {"embed": {"format": "int5"}}}, "'embed' has the unknown format 'int5'; known: dense, int8, int4"),
        (
            {"records": {"layers.mlp.down": {"format": "nm", "n": 0, "m": 4}}},
            "'layers.mlp.down' do not fit together as nm",
        ),
        (
            {"add": {"layers.attention_norm.gain": jnp.zeros((2, 64), jnp.int8)}},
            "is int8, and a dense weight is floating",
        ),
        # What an hsai that knows no 3-bit positions could not have written, nor one that knows them.
        (
            {"records": {"layers.mlp.down": {"format": "nm", "n": 4, "m": 8}}},
            "'layers.mlp.down' do not fit together as nm",
        ),
        (
            {"records": {"layers.mlp.gate": {"format": "nm_int4", "n": 2, "m": 6}}},
            "'layers.mlp.gate' do not fit together as nm_int4: m=6 has no positions: valid are 4, 8",
        ),
        ({"records": {"layers.mlp.up": {"format": "nm_int4", "n": 3}}}, "nm_int4 of 'layers.mlp.up' has no 'm'"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message) as error:
            change(model, **changes)
        assert "\n" not in str(error.value)


def test_numbers_that_are_none_are_named_where_they_are_known(model: Transformer) -> None:
    """While a program is traced nobody knows them, and the model is made."""
    arrays = named_arrays(model)
    for name, value, place in (
        ("embed.scale", np.nan, "[0, 0]"),
        ("layers.attention.q.scale", -np.inf, "[0, 0, 0]"),
        ("unembed.scale", -1.0, "[0, 0]"),
        ("layers.mlp.down.values", np.nan, "[0, 0, 0]"),
        ("layers.attention.k", np.inf, "[0, 0, 0]"),
    ):
        spoilt = arrays[name].at[(0,) * arrays[name].ndim].set(value)
        with pytest.raises(InputError) as caught:
            change(model, add={name: spoilt})
        assert f"{name!r} holds " in str(caught.value) and f"at {place}, and " in str(caught.value)
        jax.eval_shape(lambda spoilt, name=name: change(model, add={name: spoilt}), spoilt)
    change(model, add={"layers.attention.k": -jnp.abs(arrays["layers.attention.k"])})  # weights may be negative


def test_minima_come_back_and_must_fit_their_scales(model: Transformer) -> None:
    packed = Int4OffsetConfig(group=32).pack(named_weights(model)["layers.attention.k"].get_value())
    with_minima = replace_weights(model, {"layers.attention.k": packed})
    assert describe(with_minima)["layers.attention.k"] == {"format": "int4_offset"}
    assert (packed.minimum < 0).any()  # as scales must not be
    back = restore(abstract_transformer(CONFIG), describe(with_minima), named_arrays(with_minima))
    jax.tree.map(np.testing.assert_array_equal, back, with_minima)
    name = "layers.attention.k.minimum"
    for minimum, message in (
        (packed.minimum[:, :1], r"do not fit together as int4_offset: minima \(2, 1, 32\) and scales \(2, 2, 32\)"),
        (packed.minimum.at[0, 0, 0].set(jnp.nan), f"'{name}' holds nan at"),
    ):
        with pytest.raises(InputError, match=message):
            change(with_minima, add={name: minimum})


def test_a_missing_record_is_named(model: Transformer) -> None:
    records = describe(model)
    del records["embed"]
    with pytest.raises(InputError, match="'embed' is missing"):
        restore(abstract_transformer(CONFIG), records, named_arrays(model))


def test_fill_gives_each_array_its_place_or_names_the_fault(model: Transformer) -> None:
    arrays = {name: np.asarray(array) for name, array in named_arrays(model).items()}
    filled = fill(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model), arrays)
    jax.tree.map(np.testing.assert_array_equal, filled, model)
    without = {name: array for name, array in arrays.items() if name != "embed.scale"}
    with pytest.raises(InputError, match=r"'embed.scale' is missing \(1 missing, 0 unknown\)"):
        fill(model, without)
    with pytest.raises(InputError, match="'x' is unknown"):
        fill(model, arrays | {"x": arrays["embed.scale"]})
    with pytest.raises(InputError, match=r"'embed.values' is float32\[64, 96\], the model needs int8\[64, 96\]"):
        fill(model, arrays | {"embed.values": np.zeros((64, 96), np.float32)})
