"""Attention of the heads of a device: numbers of one device whatever divides, and what moves between devices."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.models.cache import quantize_halves, quantize_heads
from hsai.models.heads import attend_heads
from hsai.sharding import RULES, Axes, MeshConfig, array_sharding, make_mesh, use_mesh
from hsai_kernels.dispatch import compile_for

COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
Operands = tuple[Any, ...]


def mesh_of(data: int, fsdp: int, model: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, model=model), jax.devices()[: data * fsdp * model])


def draw(heads: int, kv_heads: int, rows: int = 8, queries: int = 12, dtype: str = "float32") -> Operands:
    """q, k, v, positions of queries and keys: the queries are the last of 12 tokens."""
    random = np.random.default_rng(heads)
    q, k, v = (
        jnp.asarray(random.standard_normal((rows, length, count, 8)), dtype)
        for length, count in ((queries, heads), (12, kv_heads), (12, kv_heads))
    )
    at = np.tile(np.arange(12, dtype=np.int32), (rows, 1))
    return q, k, v, at[:, 12 - queries :], at


def attend(q: jax.Array, k: jax.Array, v: jax.Array, at_q: jax.Array, at_k: jax.Array) -> jax.Array:
    return attend_heads(q, k, v, q_positions=at_q, kv_positions=at_k, window=7)


def differentiate(*operands: Any) -> tuple[jax.Array, ...]:
    *vectors, at_q, at_k = operands
    loss = lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v, at_q, at_k).astype(jnp.float32)))  # noqa: E731
    return jax.grad(loss, (0, 1, 2))(*vectors)


def place(mesh: jax.sharding.Mesh, operands: Operands) -> Operands:
    rows: Axes = ("batch", "seq")
    axes = [(*rows, "heads", None), (*rows, "kv_heads", None), (*rows, "kv_heads", None), rows, rows]
    return tuple(
        jax.device_put(x, array_sharding(mesh, names, x.shape)) for x, names in zip(operands, axes, strict=True)
    )


@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads", "rows"),
    [
        ((2, 2, 2), 4, 2, 8),
        ((1, 2, 4), 8, 2, 8),  # 2 devices share a kv head
        ((1, 1, 8), 8, 1, 8),  # all do
        ((1, 2, 2), 6, 3, 8),  # 3 kv heads for 2 devices: each computes all
        ((4, 1, 2), 4, 4, 1),  # one row, which all have
    ],
)
def test_numbers_are_those_of_one_device(sizes: tuple[int, int, int], heads: int, kv_heads: int, rows: int) -> None:
    operands = draw(heads, kv_heads, rows)
    mesh = mesh_of(*sizes)
    with use_mesh(mesh):
        found = jax.jit(attend)(*place(mesh, operands)), *jax.jit(differentiate)(*place(mesh, operands))
    for one, other in zip(found, (attend(*operands), *differentiate(*operands)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    with compile_for("tpu"), use_mesh(mesh):
        assert "name=attention_forward" in str(jax.make_jaxpr(attend)(*operands))


@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads"),
    [
        ((2, 2, 2), 4, 2),
        ((1, 2, 4), 8, 2),  # 2 devices share a kv head
        ((1, 2, 2), 6, 3),  # 3 kv heads for 2 devices: each computes all
        ((1, 2, 4), 4, 2),
    ],
)
@pytest.mark.parametrize("quantize", [quantize_heads, quantize_halves])
def test_a_cache_of_integers_is_split_as_its_scales_are(
    quantize: Any, sizes: tuple[int, int, int], heads: int, kv_heads: int
) -> None:
    q, *vectors, at_q, at_k = draw(heads, kv_heads, queries=1)
    (k, k_scale), (v, v_scale) = (quantize(x) for x in vectors)

    def decode(q: Any, k: Any, v: Any, k_scale: Any, v_scale: Any) -> jax.Array:
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        return attend_heads(q, k, v, **scales, q_positions=at_q, kv_positions=at_k, window=7)

    operands = (q, k, v, k_scale, v_scale)
    with use_mesh(mesh_of(*sizes)):
        program = jax.jit(decode).lower(*operands)
        found = program.compile()(*operands)
    np.testing.assert_allclose(found, decode(*operands), rtol=1e-4, atol=1e-5)
    assert "hsai_attention" in program.as_text()


@pytest.mark.parametrize("queries", [12, 1])
@pytest.mark.parametrize(("sizes", "shared"), [((2, 2, 2), False), ((1, 2, 4), True)])
def test_nothing_moves_but_gradients_of_shared_heads(sizes: tuple[int, int, int], shared: bool, queries: int) -> None:
    mesh = mesh_of(*sizes)
    with use_mesh(mesh):
        operands = place(mesh, draw(8, 2, queries=queries))
        forward, backward = (jax.jit(f).lower(*operands).compile().as_text() for f in (attend, differentiate))
    assert COLLECTIVE.findall(forward) == []
    assert set(COLLECTIVE.findall(backward)) == ({"all-reduce", "all-gather"} if shared else set())


def test_gradients_of_shared_heads_are_summed_in_float32() -> None:
    """Within two roundings of bfloat16, that of a device's part and that of the sum, of float32's."""
    operands = draw(8, 1, dtype="bfloat16")
    exact = differentiate(*(x.astype(jnp.float32) for x in operands[:3]), *operands[3:])
    with use_mesh(mesh_of(1, 1, 8)):
        program = jax.jit(differentiate).lower(*operands)
        found = program.compile()(*operands)
    assert not re.search(r"bf16\[\S* all-reduce", program.compile().as_text())
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        assert np.linalg.norm(one.astype(np.float32) - other) < 2**-7 * np.linalg.norm(other)


def test_a_split_sequence_is_left_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = draw(4, 4)
    wanted = attend(*operands)
    monkeypatch.setitem(RULES, "seq", ("model",))
    with use_mesh(mesh_of(2, 1, 4)):
        with compile_for("tpu"):
            program = str(jax.make_jaxpr(attend)(*operands))
        found = jax.jit(attend)(*operands)
    assert "shard_map" not in program and "attention_forward" not in program
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
