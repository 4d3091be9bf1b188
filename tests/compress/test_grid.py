"""The description that solvers work on agrees with what formats hold."""

import typing

import jax
import jax.numpy as jnp
import pytest

from hsai.compress.grid import grid_of
from hsai.formats import FormatConfig, OutliersConfig
from hsai.formats.outliers import PlainConfig


@pytest.mark.parametrize("kind", typing.get_args(FormatConfig), ids=lambda kind: kind.__name__)
def test_scales_may_be_negative_where_the_format_holds_such(kind: type) -> None:
    """Otherwise a reader refuses what a solver found, or half of the grid lies idle."""
    for base in typing.get_args(PlainConfig) if kind is OutliersConfig else (None,):
        format = kind() if base is None else OutliersConfig(base=base())
        packed = jax.eval_shape(format.pack, jax.ShapeDtypeStruct((512, 64), jnp.float32))
        grid = grid_of(format)
        held = packed if base is None else packed.base
        if grid is None:
            assert not hasattr(held, "scale")
        else:
            assert grid.is_signed == type(held).signed_scale
