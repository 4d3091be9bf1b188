"""SR-STE: what the forward pass sees, what the gradient is, and that the end packs without loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hsai.errors import InputError
from hsai.formats import NM, NMConfig
from hsai.formats.storage import named_arrays, named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from hsai.train.loop import TrainConfig
from hsai.train.sparsity import SparsityConfig, sparsify
from hsai.train.state import TrainState, build_state
from hsai.train.step import make_train_step
from tests.train.batches import MODEL, SMALL, draw_batch


@pytest.fixture(scope="module")
def model() -> Transformer:
    return jax.jit(lambda: Transformer(MODEL, rngs=nnx.Rngs(0)))()


def keep_largest(w: np.ndarray, n: int) -> np.ndarray:
    """Which weights are among the n largest of their 4 along the contraction; loops, of equals the earlier."""
    mask = np.zeros(w.shape, bool)
    for layer, group, column in np.ndindex(w.shape[0], w.shape[1] // 4, w.shape[2]):
        four = np.abs(w[layer, 4 * group : 4 * group + 4, column])
        for place in sorted(range(4), key=lambda place: (-four[place], place))[:n]:
            mask[layer, 4 * group + place, column] = True
    return mask


def is_pruned(name: str) -> bool:
    return name.startswith("layers.") and not name.endswith("gain")


@pytest.mark.parametrize("n", [1, 2])
def test_the_forward_pass_sees_n_of_every_4(model: Transformer, n: int) -> None:
    sparse = named_arrays(sparsify(model, SparsityConfig(n=n)))
    for name, dense in named_arrays(model).items():
        wanted = np.where(keep_largest(np.asarray(dense), n), dense, 0) if is_pruned(name) else dense
        assert np.array_equal(sparse[name], wanted), name
    assert np.mean(np.asarray(sparse["layers.mlp.gate"]) != 0) == n / 4


def test_the_gradient_goes_straight_through_and_pulls_what_is_masked(model: Transformer) -> None:
    """Of sum(c * sparse(w)): c everywhere, and lambda * scale * w where the mask is (2102.04010, eq. 10)."""
    draw = np.random.default_rng(0)
    factors = {name: draw.standard_normal(x.shape).astype(np.float32) for name, x in named_arrays(model).items()}

    def total(model: Transformer) -> jax.Array:
        sparse = named_arrays(sparsify(model, SparsityConfig(decay=0.03), gradient_scale=5.0))
        return sum(jnp.sum(factors[name] * x) for name, x in sparse.items())

    for name, grad in named_arrays(jax.jit(jax.grad(total))(model)).items():
        dense = np.asarray(named_arrays(model)[name])
        pull = 0.15 * np.where(keep_largest(dense, 2), 0, dense) if is_pruned(name) else 0
        np.testing.assert_allclose(grad, factors[name] + pull, rtol=1e-5, atol=1e-6, err_msg=name)


def descend(model: Transformer, accumulate: int, sparsity: SparsityConfig) -> dict[str, np.ndarray]:
    """The gradient of one training step on a batch with padding."""
    config = TrainConfig(batch_size=8, loss_chunk=8, accumulate=accumulate, sparsity=sparsity)
    copy = jax.tree.map(jnp.copy, model)
    state = TrainState(jnp.zeros((), jnp.int32), copy, optax.sgd(1.0).init(copy))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(optax.sgd(1.0), optax.constant_schedule(1.0), config, shardings)
    after, _ = step(state, draw_batch(0))
    return {name: np.asarray(x - named_arrays(after.model)[name]) for name, x in named_arrays(model).items()}


def test_the_pull_is_the_same_for_every_batch_however_it_is_cut(model: Transformer) -> None:
    """The loss is a sum that is divided by the number of targets; the pull on weights must not be."""
    plain = descend(model, 1, SparsityConfig(decay=0.0))
    pulled = descend(model, 4, SparsityConfig(decay=0.5))
    for name, array in named_arrays(model).items():
        dense = np.asarray(array)
        pull = 0.5 * np.where(keep_largest(dense, 2), 0, dense) if is_pruned(name) else np.zeros_like(dense)
        np.testing.assert_allclose(pulled[name] - plain[name], pull, rtol=0, atol=2e-6, err_msg=name)


def test_what_was_trained_sparse_packs_without_loss() -> None:
    config = TrainConfig(steps=4, batch_size=8, loss_chunk=16, sparsity=SparsityConfig())
    optimizer = optax.adam(3e-3)
    state = jax.jit(lambda: build_state(MODEL, optimizer, 1))()
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(optimizer, optax.constant_schedule(3e-3), config, shardings)
    losses = []
    for _ in range(config.steps):
        state, metrics = step(state, draw_batch(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]

    sparse = sparsify(state.model, SparsityConfig())
    values = {
        name: NMConfig(dtype="float32").pack(param.get_value())
        for name, param in named_weights(sparse).items()
        if is_pruned(name)
    }
    assert len(values) == 7
    for name, packed in values.items():
        assert isinstance(packed, NM) and np.array_equal(packed.dense(), named_arrays(sparse)[name]), name
    tokens = draw_batch(3).tokens
    forward = jax.jit(lambda model: model.logits(model(tokens)[0]))
    packed_logits, dense_logits = forward(replace_weights(sparse, values)), forward(sparse)
    np.testing.assert_allclose(packed_logits, dense_logits, rtol=0, atol=1e-5)  # the same products, summed otherwise


def test_a_pattern_that_cannot_be_packed_is_refused_before_training() -> None:
    with pytest.raises(InputError, match="sparsity 3:8 is not supported; valid are 1:4, 2:4, 3:4, 1:8, 2:8 and 4:8"):
        SparsityConfig(n=3, m=8)
    with pytest.raises(InputError, match="sparsity.decay=-1 must not be negative"):
        SparsityConfig(decay=-1)
    odd = dataclasses.replace(TransformerConfig(**SMALL), mlp=72)
    shapes = jax.eval_shape(lambda: Transformer(odd, rngs=nnx.Rngs(0)))
    with pytest.raises(
        InputError, match="2:4 sparsity of layers.mlp.down needs a contraction .* multiple of 32; .* 72"
    ):
        jax.eval_shape(lambda m: sparsify(m, SparsityConfig()), shapes)
