"""Layers that are not cut out of their stacks: the same products, and only where a kernel can read them there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.formats import (
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    NMConfig,
    NMInt4Config,
    OutliersConfig,
    TernaryConfig,
    UnstructuredConfig,
    VNMInt4Config,
    project,
    scan_layers,
    stack_layers,
)
from hsai.formats.layer import LayerOf, is_whole
from hsai.formats.rounded import Rounded
from hsai.sharding import MeshConfig, make_mesh, use_mesh

LAYERS, CONTRACTION, COLUMNS = 3, 128, 64
AXES = ("batch", "mlp")
FORMATS = (
    Int8Config(),
    Int4Config(),
    Int4OffsetConfig(),
    TernaryConfig(),
    NMConfig(),
    NMInt4Config(),
    VNMInt4Config(),
)


def draw(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Activations, and a stack of weights."""
    x, w = jax.random.split(jax.random.key(seed))
    return jax.random.normal(x, (4, CONTRACTION)), jax.random.normal(w, (LAYERS, CONTRACTION, COLUMNS))


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: type(format).__name__)
@pytest.mark.parametrize("rounds", [False, True])
def test_products_are_those_of_the_layer(format, rounds: bool) -> None:
    x, w = draw()
    stacked = format.pack(w)
    if rounds and isinstance(format, NMConfig):
        return
    stacked = Rounded(stacked) if rounds else stacked
    assert is_whole(stacked)
    for layer in range(LAYERS):
        alone = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
        whole = LayerOf(stacked, jnp.int32(layer))
        assert whole.shape == alone.shape and whole.unit == alone.unit
        np.testing.assert_array_equal(whole.dense(), alone.dense())
        if alone.kept() is not None:
            np.testing.assert_array_equal(whole.kept(), alone.kept())
        np.testing.assert_array_equal(project(x, whole, out_axes=AXES), project(x, alone, out_axes=AXES))


def test_on_a_mesh_each_device_has_its_part() -> None:
    x, w = draw()
    stacked = Int4Config().pack(w)
    wanted = project(x, LayerOf(stacked, jnp.int32(1)), out_axes=AXES)
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, model=2))):
        got = jax.jit(lambda stacked: project(x, LayerOf(stacked, jnp.int32(1)), out_axes=AXES, in_axis="embed"))(
            stacked
        )
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_a_scan_hands_on_what_can_stay() -> None:
    """And cuts out the others: dense arrays, experts, and formats whose products rebuild the weight."""
    x, w = draw()
    experts = Int8Config().pack(jnp.stack([w, w], axis=1))
    tree = {
        "int4": Int4Config().pack(w),
        "dense": w,
        "experts": experts,
        "apart": OutliersConfig(base=Int4Config()).pack(w),
        "bitmask": UnstructuredConfig().pack(w),
    }
    seen: list[dict[str, type]] = []

    def step(carry, scanned):
        layer, number = scanned
        seen.append({name: type(value) for name, value in layer.items()})
        y = sum(project(x, layer[name], out_axes=AXES) for name in ("int4", "dense", "apart", "bitmask"))
        return carry + y * (number + 1), layer["experts"].dense()

    cut, given = jax.jit(lambda: scan_layers(step, jnp.zeros((4, COLUMNS)), tree, LAYERS))()
    whole, also = jax.jit(lambda: scan_layers(step, jnp.zeros((4, COLUMNS)), tree, LAYERS, in_place=True))()
    np.testing.assert_array_equal(whole, cut)
    np.testing.assert_array_equal(also, given)
    first, last = seen[0], seen[-1]
    assert last.pop("int4") is LayerOf and first.pop("int4") is not LayerOf
    assert first == last


def test_a_scan_of_runs_counts_from_each_runs_first_layer() -> None:
    x, w = draw()
    formats = (Int8Config(), Int4Config(), Int4Config())
    runs = stack_layers([format.pack(w[layer]) for layer, format in enumerate(formats)])

    def step(carry, scanned):
        layer, number = scanned
        assert isinstance(layer, LayerOf)
        return carry + project(x, layer, out_axes=AXES) * (number + 1), None

    got, _ = scan_layers(step, jnp.zeros((4, COLUMNS)), runs, LAYERS, in_place=True)
    wanted = sum((layer + 1) * project(x, format.pack(w[layer]), out_axes=AXES) for layer, format in enumerate(formats))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
