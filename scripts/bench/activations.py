"""What activations are made of here: on an accelerator what a model's are by default, on a CPU float32.

A tuned tile is stored under the dtype of the activations, so that it must be searched with those of the models that are
to find it.
"""

import jax.numpy as jnp
import numpy as np

from hsai.models import TransformerConfig
from hsai_kernels.dispatch import find_platform


def find_dtype() -> np.dtype:
    """The dtype of activations on the platform that programs are traced for."""
    return jnp.dtype("float32" if find_platform() == "cpu" else TransformerConfig.dtype)


def name_case(name: str) -> str:
    """A case's name, with the dtype of its activations where that is not float32."""
    dtype = find_dtype().name
    return name if dtype == "float32" else f"{name}, {dtype} activations"
