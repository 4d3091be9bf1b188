"""Functions of one device on a mesh: how operands are cut, and that sums and gradients are those of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.sharding import Axes, MeshConfig, make_mesh, use_mesh
from hsai.shards import add_parts, find_splits, map_shards

MESHES = [(8, 1, 1), (2, 2, 2), (1, 2, 4)]
X_AXES: Axes = ("batch", "mlp")
W_AXES: Axes = ("mlp", None)


def mesh_of(data: int, fsdp: int, model: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, model=model), jax.devices()[: data * fsdp * model])


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def test_an_axis_is_split_as_far_as_all_of_its_sizes_divide() -> None:
    words, scale = jnp.zeros((16, 64), jnp.uint32), jnp.zeros((2, 64))
    with use_mesh(mesh_of(1, 2, 4)):
        assert find_splits((("batch", "embed"), draw(8, 64))) == {"batch": ("fsdp",), "embed": ()}
        assert find_splits((("batch", "embed"), draw(1, 64))) == {"batch": (), "embed": ("fsdp",)}
        assert find_splits((("mlp", "embed"), words)) == {"mlp": ("model",), "embed": ("fsdp",)}
        assert find_splits((("mlp", None), [words, scale])) == {"mlp": ()}  # 2 groups for 4 devices
        assert find_splits((("mlp", None), [words, scale[:1]])) == {"mlp": ("model",)}  # one scale is everyone's
        assert find_splits((("mlp", None), [words, words[:1]])) == {"mlp": ()}  # one row of words is not
        assert find_splits((("heads", "mlp"), words)) == {"heads": ("model",), "mlp": ()}
    assert find_splits((("heads", "mlp"), words)) == {"heads": (), "mlp": ()}


def test_axes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown logical axis 'mpl' in .* known: batch, seq"):
        find_splits((("mpl",), draw(4)))
    with pytest.raises(ValueError, match=r"axes \('mlp', 'mlp'\) name one axis twice"):
        find_splits((("mlp", "mlp"), draw(4, 4)))
    with use_mesh(mesh_of(2, 2, 2)), pytest.raises(ValueError, match=r"1 logical axes .* of shape \(4, 4\)"):
        find_splits((("mlp",), draw(4, 4)))


def test_one_device_calls_the_function_itself() -> None:
    function = lambda x: x  # noqa: E731
    assert map_shards(function, {}, (X_AXES,), X_AXES) is function
    with use_mesh(mesh_of(1, 1, 1)):
        assert map_shards(function, {}, (X_AXES,), X_AXES) is function


@pytest.mark.parametrize("sizes", MESHES)
def test_gradients_are_those_of_the_whole(sizes: tuple[int, int, int]) -> None:
    """x is split over rows and contraction, w over the contraction, the gain over nothing, and the result is whole on
    devices that share its rows: every gradient is summed once over the devices that have parts of it."""

    def loss(x: jax.Array, w: jax.Array, gain: jax.Array, missing: None) -> jax.Array:
        splits = find_splits((X_AXES, x), (W_AXES, w))

        def multiply(x: jax.Array, w: jax.Array, gain: jax.Array, missing: None) -> jax.Array:
            assert missing is None
            assert x.shape == (8 // (sizes[0] * sizes[1]), 16 // sizes[2])
            return jnp.tanh(add_parts(x @ w, splits["mlp"])) * gain

        y = map_shards(multiply, splits, (X_AXES, W_AXES, (None,), (None,)), ("batch", None))(x, w, gain, missing)
        return jnp.sum(jnp.sin(y))

    def plain(x: jax.Array, w: jax.Array, gain: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jnp.tanh(x @ w) * gain))

    operands = draw(8, 16), draw(16, 3), draw(3)
    wanted = jax.value_and_grad(plain, (0, 1, 2))(*operands)
    with use_mesh(mesh_of(*sizes)):
        found = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*operands, None)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_several_results_have_axes_each() -> None:
    with use_mesh(mesh_of(2, 2, 2)) as mesh:
        x = draw(8, 16)
        both = lambda x: (x + 1, add_parts(jnp.sum(x), ("data", "fsdp", "model")))  # noqa: E731
        more, total = jax.jit(map_shards(both, find_splits((X_AXES, x)), (X_AXES,), (X_AXES, ())))(x)
    assert more.sharding.shard_shape(more.shape) == (2, 8)
    assert total.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), 0)
    np.testing.assert_allclose(total, jnp.sum(x), rtol=1e-5)


def test_parts_are_added_in_float32() -> None:
    """In bfloat16 each 1 behind 256 would be lost."""
    x = jnp.asarray([256, 1, 1, 1, 1, 1, 1, 1], jnp.bfloat16)
    with use_mesh(mesh_of(8, 1, 1)):
        splits = find_splits((("batch",), x))
        total = jax.jit(map_shards(lambda x: add_parts(x[0], splits["batch"]), splits, (("batch",),), ()))(x)
    assert total.dtype == jnp.float32 and total == 263.0
