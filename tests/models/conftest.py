"""Models small enough for loops in numpy, with no weight at a value that could hide a mistake."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer

SMALL: dict[str, Any] = dict(
    vocab=61, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, max_length=64, dtype="float32"
)

MakeModel = Callable[..., Transformer]


def fill_model(**changes: Any) -> Transformer:
    """A model of SMALL with changes. Gains lie around one, matrices around zero; nothing is compiled to make them."""
    draw = np.random.default_rng(5)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = draw.standard_normal(leaf.shape).astype(np.float32)
        is_gain = leaf.ndim < 2 or leaf.shape[0] == config.layers and leaf.ndim == 2
        return jnp.asarray(1 + 0.1 * values if is_gain else 0.2 * values)

    config = TransformerConfig(**SMALL | changes)
    return jax.tree.map(fill, abstract_transformer(config))


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """`fill_model`."""
    return fill_model
