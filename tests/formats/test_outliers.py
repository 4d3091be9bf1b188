"""Outliers: some positions are exact, the rest is what the base makes of it without them; products, tables, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.errors import InputError
from hsai.formats import (
    Int2Config,
    Int4Config,
    Int8Config,
    NMInt4Config,
    Outliers,
    OutliersConfig,
    TernaryConfig,
    UnstructuredInt4Config,
    bits_per_weight,
    lookup,
    nbytes,
    project,
)
from hsai.sharding import MeshConfig, make_mesh, use_mesh

BASES = [
    Int8Config(),
    Int4Config(group=32),
    Int2Config(group=32),
    TernaryConfig(group=32),
    NMInt4Config(n=2, group=32),
    UnstructuredInt4Config(group=64),
]
LARGE = (5, 70, 200)


def draw(*lead: int, outputs: int = 24) -> np.ndarray:
    """(..., 256, F) with three positions of thirty times the rest, bfloat16 numbers in float32."""
    w = np.array(np.random.default_rng(0).normal(size=(*lead, 256, outputs)), np.float32)
    w[..., LARGE, :] *= 30
    return np.asarray(jnp.asarray(w, jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.format)
def test_the_largest_positions_are_exact_and_the_rest_is_without_them(base) -> None:
    w = draw(2)
    packed = OutliersConfig(base=base, share=3 / 256).pack(jnp.asarray(w))
    assert packed.index[..., 0].tolist() == [list(LARGE)] * 2
    dense, rest = np.asarray(packed.dense()), w.copy()
    rest[:, LARGE] = 0
    # A base without a level at zero stands below them, and what is above is rounded to bfloat16.
    exact = base.format != "int2"
    np.testing.assert_allclose(dense[:, LARGE], w[:, LARGE], rtol=0 if exact else 2.0**-8, atol=0 if exact else 0.01)
    wanted = np.asarray(base.pack(jnp.asarray(rest)).dense())
    others = np.delete(np.arange(256), LARGE)
    np.testing.assert_array_equal(dense[:, others], wanted[:, others])
    plain = np.asarray(base.pack(jnp.asarray(w)).dense())
    # Of others pruning makes up most of the error, or their scales are no largest weights.
    share = 0.8 if base.format in ("int8", "int4", "int2") else 1.0
    assert np.linalg.norm((dense - w)[:, others]) < share * np.linalg.norm((plain - w)[:, others])


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.format)
def test_bytes_are_those_of_the_base_and_of_what_is_apart(base) -> None:
    config = OutliersConfig(base=base, share=0.02)
    packed = config.pack(jnp.asarray(draw(3)))
    assert config.count(256) == 5 and packed.rows.shape == (3, 5, 24) and packed.index.shape == (3, 5, 1)
    assert nbytes(packed) == nbytes(packed.base) + 3 * 5 * (24 * 2 + 4)
    assert 8 * nbytes(packed) == round(config.invariant_bits(256) * packed.size) + 3 * config.index_bits(256)
    assert bits_per_weight(packed) == pytest.approx(base.invariant_bits(256) + 16 * 5 / 256 + 32 * 5 / (256 * 24))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.format)
def test_a_product_is_that_of_the_dense_weight(base, dtype: str) -> None:
    w = OutliersConfig(base=base, share=0.02).pack(jnp.asarray(draw()))
    x = jax.random.normal(jax.random.key(1), (3, 7, 256)).astype(dtype)
    found = project(x, w, out_axes=("batch", "seq", "mlp"))
    wanted = np.asarray(x, np.float64) @ np.asarray(w.dense(), np.float64)
    magnitude = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w.dense(), np.float64))
    assert found.dtype == dtype
    assert (
        np.abs(np.asarray(found, np.float64) - wanted) <= (2.0**-18 if dtype == "float32" else 2.0**-7) * magnitude
    ).all()
    grad = jax.grad(lambda x: jnp.sum(jnp.sin(project(x, w, out_axes=("batch", "seq", "mlp")).astype(jnp.float32))))(x)
    slope = jax.grad(lambda x: jnp.sum(jnp.sin(x.astype(jnp.float32) @ w.dense())))(x)
    assert np.linalg.norm(np.asarray(grad - slope, np.float32)) < (
        1e-3 if dtype == "float32" else 0.2
    ) * np.linalg.norm(np.asarray(slope, np.float32))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")], ids=str)
def test_on_a_mesh(sizes: tuple[int, int, int], axes: tuple[str, str]) -> None:
    w = OutliersConfig(base=Int4Config(group=32), share=0.02).pack(jnp.asarray(draw(outputs=64)))
    x = jax.random.normal(jax.random.key(1), (8, 256))
    multiply = lambda x, w: project(x, w, out_axes=("batch", axes[1]), in_axis=axes[0])  # noqa: E731
    wanted = multiply(x, w)
    with use_mesh(make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], model=sizes[2]))):
        program = jax.jit(multiply).lower(x, w)
        found = program.compile()(x, w)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-3)
    assert "hsai_quantized_matmul" in program.as_text()


def test_a_table_may_have_them() -> None:
    w = OutliersConfig(base=Int8Config(), share=0.02).pack(jnp.asarray(draw(outputs=50)))
    ids = jnp.asarray([[0, 49, 7], [7, 1, 0]])
    rows = lookup(w, ids, dtype=jnp.dtype(jnp.float32), out_axes=("batch", "seq", "embed"))
    np.testing.assert_array_equal(rows, np.asarray(w.dense()).T[np.asarray(ids)])


def test_what_is_apart_is_chosen_by_what_it_costs() -> None:
    config = OutliersConfig(share=0.25)
    assert config.find(jnp.asarray([3.0, 9.0, 1.0, 9.0, 9.0, 0.0, 2.0, 4.0])).tolist() == [1, 3]
    w = jnp.asarray(draw())
    chosen = config.pack(w, jnp.arange(64, dtype=jnp.int32))
    assert chosen.index[:, 0].tolist() == list(range(64))
    np.testing.assert_array_equal(chosen.dense()[:64], w[:64])
    assert isinstance(chosen, Outliers) and OutliersConfig(share=1e-6).count(256) == 1


@pytest.mark.parametrize("share", [0.0, -0.1, 0.6, float("nan")])
def test_shares_that_cannot_be(share: float) -> None:
    with pytest.raises(InputError, match=r"outliers share=.* must be above 0 and at most 0.5"):
        OutliersConfig(share=share)


def test_what_does_not_divide_is_the_base_s_to_refuse() -> None:
    with pytest.raises(InputError, match=r"int4 with groups of 64 needs .* multiple of 64; .* has 96"):
        OutliersConfig().pack(jnp.ones((96, 8)))
