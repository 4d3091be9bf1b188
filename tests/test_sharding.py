"""Logical axes to mesh axes: sizes, specs, and that what is said to be split is split."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from hsai.errors import InputError
from hsai.formats import Int4Config
from hsai.formats.storage import named_arrays, named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from hsai.models.cache import CACHE_AXES
from hsai.models.transformer import abstract_transformer
from hsai.sharding import (
    MESH_AXES,
    RULES,
    MeshConfig,
    array_sharding,
    check_mesh,
    constrain,
    make_mesh,
    partition_spec,
    tree_shardings,
    use_mesh,
)
from hsai.train.optimizer import OptimizerConfig, make_optimizer
from hsai.train.state import TrainState, build_state, init_state

MODEL = TransformerConfig(
    vocab=96, embed=64, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=128, max_length=32, dtype="float32"
)
MESHES = [(1, 8, 1), (2, 2, 2), (1, 2, 4)]
OPTIMIZER = make_optimizer(OptimizerConfig(warmup_steps=0), 10)


def mesh_of(data: int, fsdp: int, model: int) -> jax.sharding.Mesh:
    """A mesh over the first of the 8 fake devices."""
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, model=model), jax.devices()[: data * fsdp * model])


@functools.cache
def state_on(sizes: tuple[int, int, int]) -> TrainState:
    """A fresh state, the same for every mesh."""
    return init_state(MODEL, OPTIMIZER, mesh_of(*sizes), seed=7)


@given(st.sampled_from(MESH_AXES), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
def test_one_size_is_inferred(axis: str, first: int, second: int, rest: int) -> None:
    others = [name for name in MESH_AXES if name != axis]
    sizes = {axis: -1, others[0]: first, others[1]: second}
    shape = MeshConfig(**sizes).shape(first * second * rest)
    assert dict(zip(MESH_AXES, shape, strict=True)) == sizes | {axis: rest}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 3}, "mesh data=-1 x fsdp=1 x model=3: mesh.data cannot be inferred, 8 devices do not divide by 3"),
        (
            {"fsdp": -1, "data": 5},
            "mesh data=5 x fsdp=-1 x model=1: mesh.fsdp cannot be inferred, 8 devices do not divide by 5",
        ),
        ({"data": 2, "fsdp": 2}, "mesh data=2 x fsdp=2 x model=1 needs 4 devices, and there are 8"),
    ],
)
def test_a_mesh_that_does_not_divide_says_so(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_mesh(MeshConfig(**sizes))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 0}, "mesh.model=0 must be a positive size, or -1 to infer it"),
        ({"fsdp": -2}, "mesh.fsdp=-2 must be a positive size"),
        ({"fsdp": -1}, "mesh.data and mesh.fsdp are both -1; only one size can be inferred"),
        ({"cpu_devices": 0}, "mesh.cpu_devices=0 must be between 1 and 1024"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MeshConfig(**sizes)


def test_spec_gives_each_mesh_axis_to_the_first_that_claims_it() -> None:
    shape = {"data": 2, "fsdp": 4, "model": 8}
    assert partition_spec(("embed", "mlp"), (64, 64), shape) == PartitionSpec(("fsdp",), ("model",))
    assert partition_spec(("batch", "seq", "embed"), (8, 5, 64), shape) == PartitionSpec(("data", "fsdp"), None, None)
    assert partition_spec(("heads", "mlp"), (8, 8), shape) == PartitionSpec(("model",), None)
    assert partition_spec((None, "vocab"), (8, 8), shape) == PartitionSpec(None, ("model",))


def test_spec_leaves_out_what_does_not_divide() -> None:
    shape = {"data": 2, "fsdp": 4, "model": 1}
    assert partition_spec(("batch",), (4,), shape) == PartitionSpec(("data",))  # not by 8; by 2 it does
    assert partition_spec(("batch",), (1,), shape) == PartitionSpec(None)
    assert partition_spec(("embed", "mlp"), (1, 64), shape) == PartitionSpec(None, None)  # a scale; a mesh axis of one
    assert partition_spec(("embed",), (6,), shape) == PartitionSpec(None)


@given(
    st.lists(st.tuples(st.sampled_from([None, *RULES]), st.integers(1, 48)), min_size=1, max_size=4),
    st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * 3),
)
def test_spec_is_always_one_that_jax_takes(dims: list[tuple[str | None, int]], sizes: tuple[int, int, int]) -> None:
    mesh_shape = dict(zip(MESH_AXES, sizes, strict=True))
    axes, shape = zip(*dims, strict=True)
    spec = partition_spec(axes, shape, mesh_shape)
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    used = [name for entry in entries for name in entry]
    assert len(used) == len(set(used))
    for size, entry in zip(shape, entries, strict=True):
        assert size % math.prod(mesh_shape[name] for name in entry) == 0


def test_spec_refuses_what_it_does_not_know() -> None:
    shape = dict.fromkeys(MESH_AXES, 1)
    with pytest.raises(ValueError, match="unknown logical axis 'mpl' in .* known: batch, seq"):
        partition_spec(("embed", "mpl"), (4, 4), shape)
    with pytest.raises(ValueError, match=re.escape("1 logical axes ('embed',) for an array of 2 dimensions (4, 4)")):
        partition_spec(("embed",), (4, 4), shape)


def test_constrain_is_the_identity_without_a_mesh_and_splits_with_one() -> None:
    x = jnp.ones((8, 4, 6))
    assert constrain(x, "batch", "seq", "embed") is x
    split = jax.jit(lambda x: constrain(x * 1, "batch", "seq", "embed"))
    with use_mesh(mesh_of(2, 2, 2)) as mesh:
        assert split(x).sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), 3)
    assert split(x).sharding.device_set == {jax.devices()[0]}  # compiled anew, for no mesh


@pytest.mark.parametrize("sizes", MESHES)
def test_weights_and_moments_are_split_alike(sizes: tuple[int, int, int]) -> None:
    data, fsdp, model = sizes
    mesh = mesh_of(*sizes)
    state = state_on(sizes)
    weights, moments = named_arrays(state.model), state.optimizer[1]
    for name, array in weights.items():
        for moment in (named_arrays(moments.mu)[name], named_arrays(moments.nu)[name]):
            assert moment.sharding == array.sharding, name
        assert array.sharding.mesh == mesh

    def part(name: str) -> tuple[int, ...]:
        (shape,) = {shard.data.shape for shard in weights[name].addressable_shards}
        return shape

    assert part("embed") == (64 // fsdp, 96 // model)
    assert part("layers.attention.q") == (2, 64 // fsdp, 32 // model)
    assert part("layers.attention.k") == (2, 64 // fsdp, 16 // model)
    assert part("layers.attention.o") == (2, 32 // model, 64 // fsdp)
    assert part("layers.mlp.gate") == (2, 64 // fsdp, 128 // model)
    assert part("layers.mlp.down") == (2, 128 // model, 64 // fsdp)
    assert part("final_norm.gain") == (64 // fsdp,)
    # What a device holds is all there is, over the devices that split it; `data` alone keeps copies.
    held = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(state))
    whole = sum(array.nbytes for array in jax.tree.leaves(state))
    assert held <= whole / (fsdp * model) + 4 * 3 * 5 * 64 + 16  # gains know no `model`


def test_initial_weights_are_the_same_on_every_mesh() -> None:
    """The same random bits; XLA's code for the last columns of a narrow part may round what it makes of them in another
    way, by 4 units in the last place."""
    wanted = jax.device_get(jax.tree.leaves(jax.jit(lambda: build_state(MODEL, OPTIMIZER, 7))()))
    for sizes in MESHES:
        for one, other in zip(wanted, jax.tree.leaves(state_on(sizes)), strict=True):
            np.testing.assert_array_max_ulp(np.asarray(one), np.asarray(other), maxulp=4)


def test_packed_weights_are_split_by_the_axes_they_were_declared_with() -> None:
    mesh = mesh_of(1, 2, 4)

    def pack(model: Transformer) -> Transformer:
        values = {
            name: Int4Config(group=32).pack(param.get_value())
            for name, param in named_weights(model).items()
            if name.startswith("layers.") and param.get_value().ndim == 3
        }
        return replace_weights(model, values)

    packed = jax.eval_shape(lambda: pack(Transformer(MODEL, rngs=nnx.Rngs(0))))
    shardings = named_arrays(tree_shardings(packed, mesh))
    assert shardings["layers.mlp.gate.words"].spec == PartitionSpec(None, ("fsdp",), ("model",))
    assert shardings["layers.mlp.gate.scale"].spec == PartitionSpec(None, ("fsdp",), ("model",))
    assert shardings["layers.attention.o.scale"].shard_shape((2, 1, 64)) == (2, 1, 32)  # one group stays whole


@pytest.mark.parametrize(("sizes", "part"), [((2, 2, 2), (2, 2, 16, 1, 8)), ((1, 2, 4), (2, 4, 16, 2, 8))])
@pytest.mark.parametrize("format", ["activations", "int8", "int4"])
def test_batch_and_cache_are_split(sizes: tuple[int, int, int], part: tuple[int, ...], format: Any) -> None:
    """Over rows, and over kv heads where there are enough; with fewer than devices, heads stay whole."""
    mesh = mesh_of(*sizes)
    assert array_sharding(mesh, ("batch", "seq"), (8, 16)).shard_shape((8, 16)) == (8 // (sizes[0] * sizes[1]), 16)
    model = state_on(sizes).model
    with use_mesh(mesh):
        cache = jax.jit(lambda: model.make_cache(8, 16, format))()
        step = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache), donate_argnums=2)
        _, after = step(model, np.zeros((8, 3), np.int32), cache)
    stored = [array for array in after.stored if array is not None]
    assert len(stored) == (2 if format == "activations" else 4)
    for array in stored:
        axes = CACHE_AXES[: array.ndim]  # a scale has all but the last, or two for a head
        assert array.sharding.is_equivalent_to(array_sharding(mesh, axes, array.shape), array.ndim)
        assert array.addressable_shards[0].data.shape[:4] == part[:4]


@jax.jit
def forward(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model.logits(model(tokens)[0])


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 2), (1, 2, 4)])
def test_the_forward_pass_is_the_same_on_every_mesh(sizes: tuple[int, int, int]) -> None:
    """And moves what it should: fsdp gathers weights, tensor parallelism sums products, nothing is permuted."""
    model = jax.tree.map(np.asarray, state_on((2, 2, 2)).model)
    tokens = np.random.default_rng(0).integers(0, 96, (8, 16), np.int32)
    wanted = forward(model, tokens)
    mesh = mesh_of(*sizes)
    with use_mesh(mesh):
        placed = jax.device_put(model, tree_shardings(model, mesh))
        split = jax.device_put(tokens, array_sharding(mesh, ("batch", "seq"), tokens.shape))
        program = forward.lower(placed, split).compile()
    np.testing.assert_allclose(program(placed, split), wanted, rtol=0, atol=2e-5)
    text = program.as_text()
    assert ("all-gather" in text) == (sizes[1] > 1 or sizes[2] > MODEL.kv_heads)
    assert ("all-reduce" in text) == (sizes[2] > 1)
    assert "collective-permute" not in text and "all-to-all" not in text


def check(sizes: tuple[int, int, int], **changes: int) -> None:
    fields: dict[str, Any] = {name: getattr(MODEL, name) for name in ("vocab", "embed", "heads", "kv_heads", "mlp")}
    config = TransformerConfig(**fields | changes, layers=1, head_dim=8, max_length=32)
    check_mesh(mesh_of(*sizes), config.axis_sizes)


def test_a_mesh_must_cut_the_model_into_equal_parts() -> None:
    """Replicating in silence what the operator wanted split is the costliest mistake on a pod."""
    check((2, 2, 2))
    check((1, 2, 4))  # 2 kv heads on 4 devices: pairs of devices share a head
    check((1, 1, 4), kv_heads=1)
    with pytest.raises(InputError, match=r"^mesh.model=3 does not divide model.heads=4; .* mesh.model can be 1, 2$"):
        check((1, 1, 3))
    with pytest.raises(InputError, match=r"^mesh.model=8 does not divide model.heads=4; .* can be 1, 2, 4$"):
        check((1, 1, 8))  # 4 heads of 8: the flat axis of 32 would divide, in the middle of heads
    with pytest.raises(InputError, match=r"^mesh.model=4 does not divide model.kv_heads=6; .* can be 1, 2, 3, 6$"):
        check((2, 1, 4), heads=12, kv_heads=6, mlp=96)
    with pytest.raises(InputError, match=r"^mesh.fsdp=8 does not divide model.embed=60; .* can be 1, 2, 3, 4, 5, 6$"):
        check((1, 8, 1), embed=60)
    with pytest.raises(InputError, match=r"^mesh.model=2 does not divide model.vocab=97"):
        check((1, 1, 2), vocab=97)
    with pytest.raises(InputError, match=r"^mesh.model=4 does not divide model.mlp=130"):
        check((1, 1, 4), mlp=130)


def test_every_declared_axis_is_checked() -> None:
    """A weight axis that a mesh can cut is one that `axis_sizes` counts; another room may not forget it."""
    declared = {
        axis for p in named_weights(abstract_transformer(MODEL)).values() for axis in p.get_metadata("out_sharding")
    }
    assert {axis for axis in declared if RULES[axis]} == set(MODEL.axis_sizes)
