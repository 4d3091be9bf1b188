"""project on a mesh: a packed weight's columns or its contraction split, by the kernels, gradients too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.formats import (
    Int2Config,
    Int3Config,
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    TernaryConfig,
    UnstructuredInt4Config,
    VNMInt8Config,
    project,
)
from hsai.sharding import MeshConfig, make_mesh, use_mesh

FORMATS = [
    Int8Config(),
    Int4Config(group=32),
    Int4OffsetConfig(group=32),
    Int3Config(group=32),
    Int2Config(group=32),
    TernaryConfig(group=32),
    NMConfig(n=3, dtype="float32"),
    NMInt8Config(n=2),
    NMInt4Config(n=1, group=64),
    NMInt4Config(n=4, m=8, group=64),
    VNMInt8Config(v=16, n=2, m=8),
    UnstructuredInt4Config(group=64),
]
# Axes of contraction and result, rows, and the mesh axis that the contraction is split over.
CASES = [
    ("embed", "mlp", 8, None),
    ("mlp", "embed", 8, "model"),
    ("embed", "mlp", 1, "fsdp"),
    ("mlp", "embed", 1, "model"),
]


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape[-1]).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("inward", "outward", "rows", "summed"), CASES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: type(f).__name__)
def test_products_and_gradients_are_those_of_one_device(
    format: Any, inward: str, outward: str, rows: int, summed: str | None
) -> None:
    x, w = draw(rows, 1, 256), format.pack(draw(256, 64))
    pull = draw(rows, 1, 64)

    def multiply(x: jax.Array, w: Any) -> jax.Array:
        return project(x, w, out_axes=("batch", "seq", outward), in_axis=inward)

    def loss(x: jax.Array, floats: list[jax.Array]) -> jax.Array:
        """By x, and by those leaves that have gradients."""
        left = iter(floats)
        whole = jax.tree.map(lambda leaf: next(left) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, w)
        return jnp.sum(multiply(x, whole) * pull)

    floats = [leaf for leaf in jax.tree.leaves(w) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    gradient = jax.grad(loss, (0, 1))
    wanted, slopes = multiply(x, w), jax.jit(gradient)(x, floats)
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, model=2))):
        program = jax.jit(multiply).lower(x, w).compile()
        found, others = program(x, w), jax.jit(gradient)(x, floats)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-4)
    for one, other in zip(jax.tree.leaves(others), jax.tree.leaves(slopes), strict=True):
        assert one.dtype == other.dtype
        # Of a narrow scale each device rounds its part of the gradient, and the sum is rounded once more.
        step = {jnp.dtype(jnp.bfloat16): 2**-7, jnp.dtype(jnp.float16): 2**-10}.get(one.dtype, 1e-5)
        one, other = one.astype(np.float32), other.astype(np.float32)
        np.testing.assert_allclose(one, other, rtol=0, atol=step * np.abs(other).max())
    text = program.as_text()
    assert ('custom_call_target="hsai_' in text) == (not isinstance(format, UnstructuredInt4Config))
    assert ("all-reduce" in text) == (summed is not None)


def test_bfloat16_parts_are_summed_before_they_are_rounded() -> None:
    x, w = draw(8, 1, 256).astype(jnp.bfloat16), Int4Config(group=32).pack(draw(256, 64))
    exact = np.asarray(x, np.float64) @ np.asarray(w.dense(), np.float64)
    with use_mesh(make_mesh(MeshConfig(data=1, fsdp=1, model=8))):
        found = jax.jit(lambda x, w: project(x, w, out_axes=("batch", "seq", "embed"), in_axis="mlp"))(x, w)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-3)


def test_groups_that_devices_would_have_to_share_leave_the_contraction_whole() -> None:
    """2 groups of scales for 4 devices: the kernel still runs, on all of the contraction."""
    x, w = draw(8, 1, 256), Int4Config(group=128).pack(draw(256, 64))
    with use_mesh(make_mesh(MeshConfig(data=1, fsdp=2, model=4))):
        program = jax.jit(lambda x, w: project(x, w, out_axes=("batch", "seq", "embed"), in_axis="mlp")).lower(x, w)
        found = program.compile()(x, w)
    assert "hsai_quantized_matmul" in program.as_text() and "all-reduce" not in program.compile().as_text()
    np.testing.assert_allclose(found, x @ w.dense(), rtol=1e-4, atol=2e-4)
