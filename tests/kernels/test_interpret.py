"""The TPU interpreter's race detection finds races: what `no_races` asserts of every TPU kernel can fail."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hsai_kernels.interpret import interpret_tpu
from tests.kernels.conftest import forbid_races

X = np.arange(8 * 128, dtype=np.float32).reshape(8, 128)


def _copy_through(waits: bool, source: Any, out: Any, scratch: Any, done: Any) -> None:
    """The core reads what a copy brings: behind the copy's end, or at any time."""
    copy = pltpu.make_async_copy(source, scratch, done)
    copy.start()
    if waits:
        copy.wait()
    out[...] = scratch[...]
    if not waits:
        copy.wait()


def copy_by(waits: bool) -> jax.Array:
    call = pl.pallas_call(
        functools.partial(_copy_through, waits),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(X.shape, X.dtype),
        scratch_shapes=[pltpu.VMEM(X.shape, jnp.float32), pltpu.SemaphoreType.DMA],
    )
    out: jax.Array = call(X)
    return out


def fill_blocks(apart: bool) -> jax.Array:
    """Two programs of a parallel axis, a core each, write a block: each its own, or both the same."""

    def fill(out: Any) -> None:
        out[...] = jnp.full(out.shape, 1.0, jnp.float32)

    call = pl.pallas_call(
        fill,
        grid=(2,),
        out_specs=pl.BlockSpec((8, 128), lambda i: (i if apart else 0, 0)),
        out_shape=jax.ShapeDtypeStruct((16, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )
    out: jax.Array = call()
    return out


def test_a_copy_that_is_not_waited_for_is_a_race(capfd: pytest.CaptureFixture[str]) -> None:
    with interpret_tpu():
        with forbid_races(capfd):
            np.testing.assert_array_equal(copy_by(waits=True), X)
        with pytest.raises(AssertionError, match="RACE DETECTED"), forbid_races(capfd):
            jax.block_until_ready(copy_by(waits=False))


def test_two_cores_at_one_block_are_a_race(capfd: pytest.CaptureFixture[str]) -> None:
    with interpret_tpu(cores=2):
        with forbid_races(capfd):
            jax.block_until_ready(fill_blocks(apart=True))
        with pytest.raises(AssertionError, match="RACE DETECTED"), forbid_races(capfd):
            jax.block_until_ready(fill_blocks(apart=False))
