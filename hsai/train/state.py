"""What a run carries from step to step, and its birth on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer
from hsai.sharding import tree_shardings, use_mesh
from hsai.train.formats import Rules, begin


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step int32 (): how many updates were made; model: float32 parameters, of which some may be `Latent`; optimizer:
    optax's state."""

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


def adopt_state(
    config: TransformerConfig,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    formats: Rules = (),
) -> TrainState:
    """The state that begins from an existing model with dense or packed weights; `config` says how it computes."""
    weights = {name: param.get_value() for name, param in named_weights(model).items()}
    placed = place_model(replace_weights(abstract_transformer(config), weights), mesh)

    def build(model: Transformer) -> TrainState:
        begun = begin(model, formats)
        return TrainState(jnp.zeros((), jnp.int32), begun, optimizer.init(begun))

    shardings = tree_shardings(jax.eval_shape(build, placed), mesh)
    with use_mesh(mesh):
        return jax.jit(build, out_shardings=shardings)(placed)


def fill_signs(name: str) -> float | None:
    """For `Checkpointer.restore`: before scales could be negative there were no signs; all were 1, and had no
    moments."""
    if not name.endswith(".sign"):
        return None
    return 1.0 if name.startswith("model.") else 0.0


def place_model(model: Transformer, mesh: Mesh) -> Transformer:
    """A model that every process holds, on the mesh: each device gets its part."""

    def place(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, model, tree_shardings(model, mesh))


def init_state(
    config: TransformerConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, formats: Rules = ()
) -> TrainState:
    """A fresh state, each device making only its own part; the same numbers on every mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh, seed, formats))
    with use_mesh(mesh):
        return jax.jit(lambda: build_state(config, optimizer, seed, formats), out_shardings=shardings)()
