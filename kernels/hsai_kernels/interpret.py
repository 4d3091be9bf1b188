"""Runs TPU kernels in Pallas' interpreter, on any platform: for tests of their numbers, and for nothing else.

The interpreter shows what a kernel computes; that it compiles for a chip, and how fast it is there, it does not show.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from jax.experimental.pallas import tpu as pltpu

from hsai_kernels.dispatch import compile_for


@contextmanager
def interpret_tpu(*, cores: int = 1) -> Iterator[None]:
    """Makes TPU backends available for everything that is traced inside, in the interpreter.

    The automatic choice then takes them first, as on a TPU. Memory that a kernel did not write reads as NaN, and
    whatever lies outside an array is an error: a kernel that depends on either cannot pass. Where a core and a copy
    touch the same memory unordered, or two of `cores` that share the parallel axes of a grid, jax prints RACE DETECTED.
    An exception in a kernel leaves the interpreter as it was then: pltpu.reset_tpu_interpret_mode_state() clears it.
    """
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores, uninitialized_memory="nan")
    with compile_for("tpu"), pltpu.force_tpu_interpret_mode(params):
        yield
