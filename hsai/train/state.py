"""What a run carries from step to step, and its birth on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from hsai.models import Transformer, TransformerConfig
from hsai.sharding import tree_shardings, use_mesh
from hsai.train.formats import Rules, begin


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step int32 (): how many updates were made; model: float32 parameters, with learned scales where `hsai.train.formats`
    has some; optimizer: optax's state."""

    step: jax.Array
    model: Transformer
    optimizer: optax.OptState


def build_state(
    config: TransformerConfig, optimizer: optax.GradientTransformation, seed: int, formats: Rules = ()
) -> TrainState:
    """A fresh state; pure, so it can be evaluated for shapes alone or be compiled straight onto a mesh."""
    model = begin(Transformer(config, rngs=nnx.Rngs(seed)), formats)
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model))


def abstract_state(
    config: TransformerConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, formats: Rules = ()
) -> TrainState:
    """The state with `jax.ShapeDtypeStruct`s that carry their shardings on `mesh`."""
    shapes = jax.eval_shape(lambda: build_state(config, optimizer, seed, formats))
    shardings = tree_shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def init_state(
    config: TransformerConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, formats: Rules = ()
) -> TrainState:
    """A fresh state, each device making only its own part; the same numbers on every mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh, seed, formats))
    with use_mesh(mesh):
        return jax.jit(lambda: build_state(config, optimizer, seed, formats), out_shardings=shardings)()
