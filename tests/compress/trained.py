"""A model of 0.2M parameters that has learned a little Python, byte by byte: formats cost it something, not alike."""

import functools
import os
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from filelock import FileLock
from flax import nnx

from hsai.compress.calibration import CalibrationConfig, draw_windows
from hsai.models import Transformer, TransformerConfig
from hsai.train.loss import cross_entropy_sum
from tests.environments import OPTIMIZING

CONFIG = TransformerConfig(
    vocab=128, embed=64, layers=4, heads=2, kv_heads=1, head_dim=32, mlp=192, max_length=64, dtype="float32"
)
CALIBRATION = CalibrationConfig(tokens=8192, sequence_length=64, batch=16)
STEPS = 400


UNSEEN = Path(str(typing.__file__))


def read_bytes(*paths: Path) -> np.ndarray:
    """Files as tokens; what is not ASCII is left out."""
    content = np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8)
    return content[content < CONFIG.vocab].astype(np.int32)


@functools.cache
def training_stream() -> np.ndarray:
    """All modules of the standard library but one: more than training reads, so that nothing is learned by heart."""
    return read_bytes(*sorted(path for path in UNSEEN.parent.glob("*.py") if path != UNSEEN))


@functools.cache
def calibration_windows() -> np.ndarray:
    """Of the training text, as `compress` takes them."""
    return draw_windows(training_stream(), CALIBRATION)


@functools.cache
def unseen_windows() -> np.ndarray:
    """Of the module that neither training nor calibration saw, int32 (N, 64)."""
    stream = read_bytes(UNSEEN)
    return stream[: len(stream) // 64 * 64].reshape(-1, 64)[:512]


@functools.cache
def trained_model(steps: int = STEPS) -> Transformer:
    """Trained once a session, half a minute: of several processes the first that asks for it does, and the others
    wait for its file."""
    path = Path(os.environ["HSAI_TEST_FOLDER"]) / f"trained-{steps}.npz"
    structure = jax.tree.structure(jax.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0))))
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            leaves = jax.tree.leaves(_train(steps))
            np.savez(path, **{str(i): leaf for i, leaf in enumerate(leaves)})
        with np.load(path) as file:
            model: Transformer = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in file.values()])
    return model


def _train(steps: int) -> Transformer:
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=OPTIMIZING)
    def step(model: Transformer, state: optax.OptState, tokens: jax.Array) -> tuple[Transformer, optax.OptState]:
        updates, state = optimizer.update(jax.grad(lambda m: measure(m, tokens))(model), state)
        return optax.apply_updates(model, updates), state

    state = optimizer.init(model)
    stream, draw = training_stream(), np.random.default_rng(0)
    for _ in range(steps):
        starts = draw.integers(0, len(stream) - 64, 16)
        model, state = step(model, state, jnp.asarray(np.stack([stream[at : at + 64] for at in starts])))
    return model


def measure(model: Transformer, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of all tokens but the first of each row, in nats."""
    hidden, _ = model(tokens[:, :-1])
    weights = jnp.ones(tokens[:, 1:].shape, jnp.float32)
    total = cross_entropy_sum(hidden, model.head.get_value(), tokens[:, 1:], weights, chunk=64)
    return total / weights.size


@jax.jit
def unseen_losses(model: Transformer) -> jax.Array:
    """The mean cross-entropy of each of the unseen windows, float32 (N,), in nats."""
    tokens = jnp.asarray(unseen_windows())
    log_p = jax.nn.log_softmax(model.logits(model(tokens[:, :-1])[0]))
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0], axis=1)


@jax.jit
def divergence(dense: Transformer, model: Transformer, tokens: jax.Array) -> jax.Array:
    """KL(dense || model), the mean over all positions, in nats."""
    p, q = (jax.nn.log_softmax(m.logits(m(tokens)[0])) for m in (dense, model))
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
