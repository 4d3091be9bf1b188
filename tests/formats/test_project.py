"""project and lookup against the dense weight, for every format; inside jit and a scan over layers; on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.formats import (
    DenseConfig,
    Int2Config,
    Int3Config,
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    OutliersConfig,
    Packed,
    TernaryConfig,
    UnstructuredConfig,
    UnstructuredInt4Config,
    UnstructuredInt8Config,
    VNMConfig,
    VNMInt4Config,
    VNMInt8Config,
    lookup,
    project,
    to_dense,
)
from hsai.sharding import MeshConfig, make_mesh, tree_shardings, use_mesh

FORMATS = [
    DenseConfig(dtype="float32"),
    DenseConfig(dtype="bfloat16"),
    Int8Config(),
    Int4Config(group=32),
    Int4OffsetConfig(group=32),
    Int3Config(group=32),
    Int2Config(group=32),
    TernaryConfig(group=32),
    TernaryConfig(group=None),
    NMConfig(n=1),
    NMConfig(n=2),
    NMConfig(n=3, dtype="float32"),
    NMInt8Config(n=2),
    NMInt8Config(n=4, m=8),
    NMInt4Config(n=2, group=32),
    NMInt4Config(n=3, group=64),
    NMConfig(n=2, m=8, dtype="float32"),
    NMInt4Config(n=4, m=8, group=64),
    VNMConfig(v=2, n=1),
    VNMConfig(v=1, n=2, dtype="float32"),
    VNMInt4Config(v=2, group=64),
    VNMInt8Config(v=2),
    UnstructuredConfig(density=0.25),
    UnstructuredInt8Config(),
    UnstructuredInt4Config(block=128, group=32),
]
NESTED = [*FORMATS, OutliersConfig(base=Int4Config(group=32))]
OUT = ("batch", "mlp")


def draw(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("lead", [(1,), (2, 10)], ids=str)
def test_project_is_the_product_with_the_dense_weight(format, lead: tuple[int, ...]) -> None:
    x, w = draw((*lead, 128), 1), format.pack(draw((128, 24)))
    want = np.asarray(x, np.float64) @ np.asarray(to_dense(w), np.float64)
    got = project(x, w, out_axes=(*(None for _ in lead), "mlp"))
    assert got.shape == (*lead, 24) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_project_answers_in_the_dtype_of_its_input(format) -> None:
    x, w = draw((4, 128), 1).astype(jnp.bfloat16), format.pack(draw((128, 24)))
    got = project(x, w, out_axes=OUT)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(x, np.float64) @ np.asarray(to_dense(w), np.float64)
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2e-2, atol=0.2)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_sums_can_be_kept_in_float32(format) -> None:
    """Logits need it: of close ones, bfloat16 makes ties. What remains is the rounding of a weight to x's dtype."""
    x, w = draw((4, 128), 1).astype(jnp.bfloat16), format.pack(draw((128, 24)))
    got = project(x, w, out_axes=OUT, out_dtype=jnp.float32)
    assert got.dtype == jnp.float32
    dense = to_dense(w) if isinstance(w, Packed) else w.astype(jnp.bfloat16)
    want = np.asarray(x, np.float64) @ np.asarray(dense, np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_the_gradients_of_a_dense_product_are_the_plain_ones() -> None:
    """In float32 those of x @ w; of bfloat16 activations and a float32 weight, the weight's is summed in float32."""
    x, w, pull = draw((3, 40, 64), 1), draw((64, 24)), draw((3, 40, 24), 2)

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(project(x, w, out_axes=(None, None, "mlp")).astype(jnp.float32) * pull)

    want = jax.grad(lambda x, w: jnp.sum((x @ w) * pull), (0, 1))(x, w)
    for found, wanted in zip(jax.grad(loss, (0, 1))(x, w), want, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
    by_x, by_w = jax.grad(loss, (0, 1))(x.astype(jnp.bfloat16), w)
    assert by_x.dtype == jnp.bfloat16 and by_w.dtype == jnp.float32
    halves = [a.astype(jnp.bfloat16).astype(jnp.float32).reshape(120, -1) for a in (x, pull)]
    np.testing.assert_allclose(by_w, halves[0].T @ halves[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_lookup_takes_columns(format) -> None:
    w, ids = format.pack(draw((128, 50))), jnp.asarray([[0, 49, 7], [7, 1, 0]])
    rows = lookup(w, ids, dtype=jnp.float32, out_axes=("batch", "seq", "embed"))
    np.testing.assert_array_equal(rows, np.asarray(to_dense(w), np.float32).T[np.asarray(ids)])
    assert lookup(w, ids, dtype=jnp.bfloat16, out_axes=("batch", "seq", "embed")).dtype == jnp.bfloat16


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradients_reach_the_input(format) -> None:
    x, w = draw((3, 128), 1), format.pack(draw((128, 24)))
    grad = jax.grad(lambda x: jnp.sum(jnp.sin(project(x, w, out_axes=OUT))))(x)
    want = jax.grad(lambda x: jnp.sum(jnp.sin(x @ to_dense(w).astype(jnp.float32))))(x)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", NESTED, ids=str)
def test_a_scan_over_stacked_layers_is_the_loop(format) -> None:
    stacked, x = format.pack(draw((3, 128, 128)) * 0.1), draw((2, 128), 1)

    @jax.jit
    def scan(x: jax.Array) -> jax.Array:
        step = lambda x, w: (jnp.tanh(project(x, w, out_axes=OUT)), None)  # noqa: E731
        return jax.lax.scan(step, x, stacked)[0]

    want = x
    for layer in range(3):
        want = jnp.tanh(want @ to_dense(stacked)[layer].astype(jnp.float32))
    np.testing.assert_allclose(scan(x), want, rtol=1e-4, atol=1e-4)


class Layer(nnx.Module):
    """One weight with its logical axes, as models declare them."""

    def __init__(self, value) -> None:
        self.w = nnx.Param(value, out_sharding=("embed", "mlp"))


@pytest.mark.parametrize("shape", [{"fsdp": 2, "model": 4}, {"data": 2, "fsdp": 4}], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_packed_weights_are_laid_over_a_mesh(format, shape: dict[str, int]) -> None:
    mesh = make_mesh(MeshConfig(**({"data": 1} | shape)))
    layer = Layer(format.pack(draw((512, 64))))
    placed = jax.device_put(layer, tree_shardings(layer, mesh))
    for leaf in jax.tree.leaves(placed):
        split = leaf.size // leaf.addressable_shards[0].data.size
        # Every array of the value is split as the weight is; a scale of one row has nothing to split along fsdp.
        assert split == shape.get("model", 1) * (shape.get("fsdp", 1) if leaf.shape[-2] > 1 else 1)
    x = draw((8, 512), 1)
    with use_mesh(mesh):
        got = jax.jit(lambda x, layer: project(x, layer.w.get_value(), out_axes=OUT))(x, placed)
    want = np.asarray(x, np.float64) @ np.asarray(to_dense(layer.w.get_value()), np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-4)


def test_an_unknown_format_is_refused() -> None:
    class Other(Packed):
        shape = (4, 4)

        def dense(self) -> jax.Array:
            return jnp.zeros((4, 4))

    with pytest.raises(NotImplementedError, match="Other"):
        project(jnp.zeros((1, 4)), Other(), out_axes=OUT)
