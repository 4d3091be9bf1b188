"""A model whose layers differ in format is a bundle, and graphs and traces of it write what its dense weights write."""

from pathlib import Path

import jax
import numpy as np
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.export import GraphConfig, read_bundle, write_bundle
from hsai.formats import DenseConfig, Int4Config, Int8Config, NMInt4Config, Runs, stack_layers, to_dense
from hsai.formats.storage import describe, named_arrays, named_weights, replace_weights
from hsai.infer import Engine
from hsai.interop.assemble import disassemble
from hsai.interop.entries import Entry
from hsai.models import Transformer
from tests.export.tiny_models import full_logits, make_model

FORMATS = {
    "layers.attention.v": (Int8Config(), Int4Config(), Int4Config()),
    "layers.mlp.gate": (Int4Config(), NMInt4Config(), DenseConfig(dtype="float32")),
}


@pytest.fixture(scope="module")
def mixed() -> Transformer:
    model = make_model("dense", layers=3)
    values = {}
    for name, formats in FORMATS.items():
        w = named_weights(model)[name].get_value()
        values[name] = stack_layers([format.pack(layer) for format, layer in zip(formats, w, strict=True)])
    return replace_weights(model, values)


def make_dense(mixed: Transformer) -> Transformer:
    return replace_weights(mixed, {name: to_dense(named_weights(mixed)[name].get_value()) for name in FORMATS})


def test_a_bundle_returns_it_and_runs(mixed: Transformer, tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_bundle(tmp_path / "b", mixed, tokenizer, graphs=GraphConfig(prefill_buckets=(8,)))
    bundle = read_bundle(tmp_path / "b")
    assert describe(bundle.model) == describe(mixed) and describe(mixed)["layers.mlp.gate"]["format"] == "runs"
    assert jax.tree.structure(bundle.model) == jax.tree.structure(mixed)
    jax.tree.map(np.testing.assert_array_equal, bundle.model, mixed)
    names = {array.name for graph in bundle.manifest.graphs for array in graph.inputs}
    assert set(named_arrays(mixed)) <= names and all(not graph.custom_calls for graph in bundle.manifest.graphs)

    ids = [tokenizer.eot, *tokenizer.encode("def main")]
    prompt = len(ids)
    dense = make_dense(mixed)
    for _ in range(5):
        ids.append(int(np.argmax(full_logits(dense, np.array(ids))[-1, : tokenizer.vocab_size])))
    for engine in (Engine.trace(bundle.model, tokenizer), Engine.load(tmp_path / "b", graphs=True)):
        assert engine.generate("def main", max_tokens=5).tokens == tuple(ids[prompt:])


def test_foreign_tensors_are_those_of_each_layer(mixed: Transformer) -> None:
    entries = [
        Entry(name=f"{leaf}{layer}", leaf=leaf, index=(layer,))
        for leaf in (*FORMATS, "layers.mlp.up")
        for layer in (2, 0, 1)
    ]
    dense = named_arrays(make_dense(mixed))
    for entry, tensor in disassemble(mixed, entries, dequantize=True):
        np.testing.assert_array_equal(tensor, dense[entry.leaf][entry.index[0]])
    assert isinstance(mixed.layers.mlp.gate.get_value(), Runs)
