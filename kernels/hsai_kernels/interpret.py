"""Runs TPU and GPU kernels in Pallas' interpreters, on any platform: for tests of their numbers, and nothing else.

The interpreter shows what a kernel computes; that it compiles for a chip, and how fast it is there, it does not show.
Where jax's default platform is the accelerator itself, the same tests run the compiled kernels on it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental.pallas import tpu as pltpu

from hsai_kernels.dispatch import compile_for

# A user context is part of the key of jit's caches, so that no program traced here is used elsewhere.
_interpreting_gpu = jax.make_user_context(default_value=False)


@contextmanager
def interpret_tpu(*, cores: int = 1) -> Iterator[None]:
    """Makes TPU backends available for everything that is traced inside, in the interpreter.

    The automatic choice then takes them first, as on a TPU. Memory that a kernel did not write reads as NaN, and
    whatever lies outside an array is an error: a kernel that depends on either cannot pass. Where a core and a copy
    touch the same memory unordered, or two of `cores` that share the parallel axes of a grid, jax prints RACE DETECTED.
    An exception in a kernel leaves the interpreter as it was then: pltpu.reset_tpu_interpret_mode_state() clears it.
    On a TPU there is no interpreter: kernels run, on one of its cores.
    """
    if jax.default_backend() == "tpu":
        yield
        return
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores, uninitialized_memory="nan")
    with compile_for("tpu"), pltpu.force_tpu_interpret_mode(params):
        yield


@contextmanager
def interpret_gpu() -> Iterator[None]:
    """Makes GPU backends available for everything that is traced inside, in the interpreter.

    The automatic choice then takes them first, as on a GPU. A gradient is interpreted iff its forward pass was.
    On a GPU there is no interpreter: kernels run.
    """
    if jax.default_backend() == "gpu":
        yield
        return
    with compile_for("gpu"), _interpreting_gpu(True):
        yield


def is_interpreting_gpu() -> bool:
    """Whether GPU kernels that are traced now go to the interpreter."""
    return bool(_interpreting_gpu.value)
