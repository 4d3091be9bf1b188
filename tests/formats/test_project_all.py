"""Products with several weights at once: the bits of each alone, one call where a kernel can, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.formats import (
    Int3Config,
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    OutliersConfig,
    TernaryConfig,
    UnstructuredConfig,
    VNMInt4Config,
    project,
    project_all,
)
from hsai.formats.layer import LayerOf
from hsai.formats.multiply import are_alike
from hsai.formats.rounded import Rounded
from hsai.sharding import MeshConfig, make_mesh, use_mesh
from hsai_kernels import native, quantized_matmuls, sparse_matmuls

CONTRACTION = 256
FORMATS = (
    Int8Config(),
    Int4Config(),
    Int3Config(group=32),
    Int4OffsetConfig(),
    TernaryConfig(group=64),
    NMConfig(),
    NMInt8Config(),
    NMInt4Config(),
    VNMInt4Config(v=16),
)


def draw(format, columns: tuple[int, ...], rows: int, seed: int = 0) -> tuple[jax.Array, list]:
    """Activations, and weights of so many columns."""
    x, *keys = jax.random.split(jax.random.key(seed), 1 + len(columns))
    shapes = [(CONTRACTION, count) for count in columns]
    weights = [format.pack(jax.random.normal(key, shape)) for key, shape in zip(keys, shapes, strict=True)]
    return jax.random.normal(x, (rows, CONTRACTION)), weights


def multiply_all(x: jax.Array, *weights) -> list[jax.Array]:
    return project_all(x, weights, out_axes=[("batch", "mlp")] * len(weights), in_axis="embed")


@jax.jit
def multiply_alone(x: jax.Array, w) -> jax.Array:
    return project(x, w, out_axes=("batch", "mlp"), in_axis="embed")


def count_calls(multiply, *operands) -> int:
    """Of the native library, in a program."""
    return jax.jit(multiply).lower(*operands).as_text().count("@hsai_")


@pytest.mark.parametrize("rounds", [False, True], ids=["floats", "rounded"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: type(format).__name__)
def test_products_are_the_same_bits_as_each_alone(format, rounds: bool) -> None:
    if rounds and isinstance(format, NMConfig):
        return
    # Tiles of several sizes; a last one that overlaps, and columns that fill no vector.
    ragged = (64, 112) if isinstance(format, VNMInt4Config) else (100, 8)
    # One row, a few, more than are few, and many.
    for rows, columns in ((1, (576, 192, 192)), (5, ragged), (9, (576, 192, 192)), (40, ragged)):
        x, weights = draw(format, columns, rows)
        weights = [Rounded(w) for w in weights] if rounds else weights
        together = jax.jit(multiply_all)(x, *weights)
        for found, w, count in zip(together, weights, columns, strict=True):
            assert found.shape == (rows, count) and found.dtype == x.dtype
            np.testing.assert_array_equal(found, multiply_alone(x, w))
        served = not isinstance(format, NMConfig) or rows <= native.MAX_ROWS
        assert count_calls(multiply_all, x, *weights) == (1 if served else 0)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: type(format).__name__)
def test_layers_of_stacks(format) -> None:
    x, _ = draw(format, (64,), 2)
    stacks = [format.pack(jax.random.normal(jax.random.key(i), (3, CONTRACTION, 32 + 32 * i))) for i in (1, 2)]

    def multiply_layers(x: jax.Array, one: jax.Array, other: jax.Array, *stacks) -> list[jax.Array]:
        layers = (one, one) if other is None else (one, other)
        return multiply_all(x, *map(LayerOf, stacks, layers))

    assert count_calls(multiply_layers, x, jnp.int32(0), None, *stacks) == 1
    assert count_calls(multiply_layers, x, jnp.int32(0), jnp.int32(0), *stacks) == 2
    for numbers in ((0, None), (2, None), (0, 1)):
        found = multiply_layers(x, *(n if n is None else jnp.int32(n) for n in numbers), *stacks)
        for y, stack, number in zip(found, stacks, numbers, strict=True):
            layer = LayerOf(stack, jnp.int32(numbers[0] if number is None else number)).cut()
            np.testing.assert_array_equal(y, project(x, layer, out_axes=("batch", "mlp")))


def test_gradients_are_those_of_each_alone() -> None:
    for format in (Int4Config(), NMInt4Config()):
        x, weights = draw(format, (64, 96), 4)

        def total(x: jax.Array, multiply) -> jax.Array:
            return sum(jnp.sum(jnp.sin(y)) for y in multiply(x, *weights))  # noqa: B023

        def singly(x: jax.Array, *weights) -> list[jax.Array]:
            return [project(x, w, out_axes=("batch", "mlp")) for w in weights]

        np.testing.assert_allclose(jax.grad(total)(x, multiply_all), jax.grad(total)(x, singly), rtol=1e-5, atol=1e-5)


def test_what_is_not_alike_is_multiplied_singly() -> None:
    x, (int4, other) = draw(Int4Config(), (64, 64), 2)
    _, (group32,) = draw(Int4Config(group=32), (64,), 2)
    _, (int8,) = draw(Int8Config(), (64,), 2)
    _, (outliers,) = draw(OutliersConfig(base=Int4Config()), (64,), 2)
    _, (bits,) = draw(UnstructuredConfig(), (64,), 2)
    dense = jax.random.normal(jax.random.key(7), (CONTRACTION, 64))
    for pair in (
        (int4, group32),
        (int4, int8),
        (int4, dense),
        (dense, dense),
        (int4, Rounded(other)),
        (outliers, outliers),
    ):
        assert not are_alike(pair)
        for found, w in zip(multiply_all(x, *pair), pair, strict=True):
            np.testing.assert_array_equal(found, project(x, w, out_axes=("batch", "mlp")))
    assert are_alike((bits, bits)) and count_calls(multiply_all, x, bits, bits) == 0
    assert are_alike((int4, other)) and count_calls(multiply_all, x, int4, other) == 1


def test_on_a_mesh_each_device_multiplies_its_parts() -> None:
    x, weights = draw(Int4Config(group=32), (64, 128), 8)
    wanted = multiply_all(x, *weights)
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=1, model=2), jax.devices()[:4])):
        found = jax.jit(multiply_all)(x, *weights)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_refusals() -> None:
    x, (int4, _) = draw(Int4Config(), (64, 64), 2)
    _, (group32,) = draw(Int4Config(group=32), (64,), 2)
    with pytest.raises(ValueError, match="quantized_matmul needs a weight or more, got none"):
        quantized_matmuls(x, [])
    with pytest.raises(
        ValueError, match=r"quantized_matmul takes weights together that differ in columns only, not .*4,.*8,"
    ):
        quantized_matmuls(x, [(int4.words, int4.scale, None), (group32.words, group32.scale, None)])
    _, (sparse,) = draw(NMInt4Config(), (64,), 2)
    _, (floats,) = draw(NMConfig(), (64,), 2)
    with pytest.raises(ValueError, match="sparse_matmul takes weights together that differ in columns only"):
        sparse_matmuls(
            x,
            [(sparse.words, sparse.indices, sparse.scale, None), (floats.values, floats.indices, None, None)],
            n=2,
            m=4,
        )
