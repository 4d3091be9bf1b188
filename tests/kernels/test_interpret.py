"""The TPU interpreter's race detection finds races: what `no_races` asserts of every TPU kernel can fail. And what the
interpreters run is run where the accelerator is.
"""

import functools
import re
from pathlib import Path
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


def add_rows(semantics: tuple[str, str]) -> jax.Array:
    """Sums of two each: three of them on the first axis, so that two cores halve one if they share the second too."""

    def add(x: Any, out: Any, total: Any) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            total[...] = jnp.zeros(total.shape, jnp.float32)

        total[...] += x[...]

        @pl.when(pl.program_id(1) == 1)
        def _() -> None:
            out[...] = total[...]

    call = pl.pallas_call(
        add,
        grid=(3, 2),
        in_specs=[pl.BlockSpec((8, 128), lambda i, j: (2 * i + j, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((24, 128), jnp.float32),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
    )
    out: jax.Array = call(np.ones((48, 128), np.float32))
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


def test_a_sum_whose_axis_is_said_to_be_parallel_is_a_race(capfd: pytest.CaptureFixture[str]) -> None:
    with interpret_tpu(cores=2):
        with forbid_races(capfd):
            np.testing.assert_array_equal(add_rows(("parallel", "arbitrary")), np.full((24, 128), 2.0))
        with pytest.raises(AssertionError, match="RACE DETECTED"), forbid_races(capfd):
            jax.block_until_ready(add_rows(("parallel", "parallel")))


@pytest.mark.parametrize(("platform", "variable"), [("gpu", "cuda"), ("tpu", "tpu")])
def test_every_test_of_an_accelerators_numbers_is_to_be_run_on_it(platform: str, variable: str) -> None:
    """kernels/README.md has the command, with each file that makes use of the platform's interpreter."""
    folder = Path(__file__).parent
    command = re.search(rf"HSAI_TEST_PLATFORM={variable} [^`]*", (folder.parents[1] / "kernels/README.md").read_text())
    assert command is not None
    interpreted = {
        f"tests/kernels/{path.name}"
        for path in folder.glob("test_*.py")
        if f"interpret_{platform}" in path.read_text() and path != Path(__file__)
    }
    assert set(re.findall(r"tests/\S+", command[0])) == interpreted
