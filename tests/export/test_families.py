"""What the decoder has by configuration alone leaves by the same ways: packed, as graphs, and on a mesh."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from hsai.data.tokenizer import Tokenizer
from hsai.export import GraphConfig, read_bundle, write_bundle
from hsai.formats import Int4Config
from hsai.formats.storage import named_arrays, named_weights, replace_weights
from hsai.infer import Engine
from hsai.models import MoEConfig, RopeConfig, Transformer, TransformerConfig
from hsai.models.layers import is_matrix
from hsai.sharding import MeshConfig, array_sharding, make_mesh, tree_shardings, use_mesh

SIZES: dict[str, Any] = dict(
    vocab=320, embed=64, layers=3, heads=4, kv_heads=2, head_dim=32, mlp=64, max_length=32, dtype="float32"
)
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma 3": {
        "sliding_window": 4,
        "global_every": 3,
        "local_rope": RopeConfig(theta=1e3),
        "query_scalar": 20,
        "qk_norm": True,
        "norm_plus_one": True,
        "post_norm": True,
        "scale_embeddings": True,
        "activation": "gelu",
        "tie_embeddings": False,  # tied, and scaled, a random model repeats its last token
    },
    "experts with biases": {"moe": MoEConfig(experts=4, active=2), "qkv_bias": True, "tie_embeddings": False},
}


def make_packed(changes: dict[str, Any]) -> Transformer:
    """Every matrix in int4, experts too; gains and biases as random as those."""
    model = Transformer(TransformerConfig(**SIZES | changes), rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0)
    values: dict[str, Any] = {}
    for name, param in named_weights(model).items():
        value = param.get_value()
        if is_matrix(param):
            values[name] = Int4Config(group=32).pack(value)
        else:
            values[name] = value + 0.1 * draw.standard_normal(value.shape).astype(np.float32)
    return replace_weights(model, values)


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=list(FAMILIES))
def test_graphs_generate_what_the_model_does(changes: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer) -> None:
    """From a bundle, through prefill and decode graphs, beyond the window; and traced, with the machine's kernels."""
    model = make_packed(changes)
    write_bundle(tmp_path / "bundle", model, tokenizer, graphs=GraphConfig(prefill_buckets=(8,)))
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.config == model.config
    for name, array in named_arrays(bundle.model).items():
        assert np.array_equal(array, named_arrays(model)[name]), name
    ids = np.random.default_rng(1).integers(0, tokenizer.vocab_size, 11).tolist()
    shipped, traced = Engine.load(tmp_path / "bundle", graphs=True), Engine.trace(model, tokenizer)
    found = shipped.generate_tokens(ids, max_tokens=16).tokens
    assert found == traced.generate_tokens(ids, max_tokens=16).tokens and len(set(found)) > 4
    # Greedy decoding is what one pass over all of it says.
    whole = jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))(model, np.array([[*ids, *found]], np.int32))
    best = np.argmax(whole[0, :, : tokenizer.vocab_size], axis=-1)
    assert best[len(ids) - 1 : -1].tolist() == list(found)


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=list(FAMILIES))
def test_a_mesh_decodes_as_one_device_does(changes: dict[str, Any]) -> None:
    model = make_packed(changes)
    tokens = np.random.default_rng(2).integers(0, 300, (4, 6), np.int32)

    def decode(model: Transformer, tokens: jax.Array) -> jax.Array:
        _, cache = model(tokens[:, :5], cache=model.make_cache(4, 8))
        return model.logits(model(tokens[:, 5:], cache=cache)[0])

    wanted = jax.jit(decode)(model, tokens)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, model=2), jax.devices()[:4])
    with use_mesh(mesh):
        placed = jax.device_put(model, tree_shardings(model, mesh))
        split = jax.device_put(tokens, array_sharding(mesh, ("batch", "seq"), tokens.shape))
        found = jax.jit(decode)(placed, split)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert np.abs(wanted).max() > 0.5
