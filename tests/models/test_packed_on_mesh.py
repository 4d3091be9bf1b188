"""Packed weights on a mesh: each device multiplies its part by the native kernel; logits are those of one."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from hsai.formats import FormatConfig, Int4Config, Int8Config, NMConfig, NMInt4Config
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from hsai.models.layers import is_matrix
from hsai.sharding import MeshConfig, array_sharding, make_mesh, tree_shardings, use_mesh
from hsai_kernels import native

FORMATS = [Int8Config(), Int4Config(group=32), NMConfig(n=2, dtype="float32"), NMInt4Config(n=2, group=32)]
MESHES = [(8, 1, 1), (2, 2, 2), (1, 1, 4)]
MODEL = TransformerConfig(
    vocab=128, embed=128, layers=2, heads=4, kv_heads=2, head_dim=32, mlp=256, max_length=16, dtype="float32"
)
TOKENS = np.random.default_rng(0).integers(0, 128, (8, 1), np.int32)
MATRICES = 7
"""Of a block: q, k, v, o, gate, up, down; the program of all blocks is there once."""


@functools.cache
def packed_model(format: FormatConfig) -> Transformer:
    model = Transformer(MODEL, rngs=nnx.Rngs(0))
    matrices = {name: param for name, param in named_weights(model).items() if is_matrix(param)}
    pack = jax.jit(lambda arrays: {name: format.pack(array) for name, array in arrays.items()})
    return replace_weights(model, pack({name: param.get_value() for name, param in matrices.items()}))


def decode(model: Transformer, tokens: jax.Array) -> jax.Array:
    """Logits of a second token, over a cache that holds the first: 8 rows for each product."""
    _, cache = model(tokens, cache=model.make_cache(8, 16))
    return model.logits(model(tokens + 1, cache=cache)[0])


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: type(f).__name__)
def test_logits_are_those_of_one_device(format: FormatConfig, sizes: tuple[int, int, int]) -> None:
    model = packed_model(format)
    wanted = jax.jit(decode)(model, TOKENS)
    mesh = make_mesh(
        MeshConfig(**dict(zip(("data", "fsdp", "model"), sizes, strict=True))), jax.devices()[: np.prod(sizes)]
    )
    with use_mesh(mesh):
        placed = jax.device_put(model, tree_shardings(model, mesh))
        tokens = jax.device_put(TOKENS, array_sharding(mesh, ("batch", "seq"), TOKENS.shape))
        program = jax.jit(decode).lower(placed, tokens).compile()
    np.testing.assert_allclose(program(placed, tokens), wanted, rtol=0, atol=1e-4)
    text = program.as_text()
    target = native.SPARSE_MATMUL if isinstance(format, NMConfig | NMInt4Config) else native.QUANTIZED_MATMUL
    # Twice all blocks, and the logits: every product is a kernel's, and no weight is rebuilt for one.
    assert text.count(f'custom_call_target="{target}"') == 2 * MATRICES + 1
    assert ("all-reduce" in text) == (sizes[2] > 1)
