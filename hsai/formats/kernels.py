"""Which formats a platform has kernels for: asked of the kernels themselves, of which none runs.

A product with any format works everywhere: where no kernel serves it, the dense weight is rebuilt, which costs more
than a dense model's product. Whoever compresses for speed wants to know that before the work.
"""

import typing
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.errors import InputError
from hsai.formats.multiply import multiply_packed
from hsai.formats.outliers import Outliers, OutliersConfig, PlainConfig
from hsai.formats.packed import DenseConfig, Packed
from hsai_kernels.dispatch import compile_for

Platform = Literal["cpu", "gpu", "tpu"]


def explain_missing(
    format: DenseConfig | PlainConfig | OutliersConfig, shape: tuple[int, ...], platform: Platform
) -> str | None:
    """Why the platform has no kernel for one row times a weight in this format; None if it has one.

    Args:
      format: of the weight.
      shape: (D, F); (L, D, F) of stacked layers; or (L, E, D, F) of their experts.
    Raises:
      InputError: the format cannot hold such a weight.
    """
    weight = jax.eval_shape(format.pack, jax.ShapeDtypeStruct(shape[-2:], jnp.float32))
    if isinstance(weight, Outliers):
        weight = weight.base
    if not isinstance(weight, Packed):
        return None
    if len(shape) > 3:
        return "it is of experts, whose products read dense weights alone"  # hsai/formats/ragged.py, hsai/models/moe.py
    row = jax.ShapeDtypeStruct((1, shape[-2]), jnp.float32 if platform == "cpu" else jnp.bfloat16)
    with compile_for(platform):
        try:
            jax.eval_shape(lambda x, w: multiply_packed(x, w, implementation=platform), row, weight)
        except NotImplementedError as error:
            return str(error)
    return None


def list_present(shape: tuple[int, ...], platform: Platform) -> Iterator[PlainConfig]:
    """The formats, as they are by default, that can hold such a weight and that the platform has kernels for."""
    for kind in typing.get_args(PlainConfig):
        try:
            if explain_missing(kind(), shape, platform) is None:
                yield kind()
        except InputError:
            continue
