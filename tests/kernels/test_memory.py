"""Arrays that nobody has written yet: what they are, what they cost, and where they are zeros instead."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import native
from hsai_kernels.dispatch import BackendMissing, compile_for
from hsai_kernels.memory import allocate

STATM = Path("/proc/self/statm")
SHAPE = jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint16"])
def test_an_array_of_any_dtype(dtype: str) -> None:
    array = jax.jit(lambda: allocate(jax.ShapeDtypeStruct((3, 5), dtype)).at[1].set(2))()
    assert array.shape == (3, 5) and array.dtype == dtype
    assert np.all(np.asarray(array[1]) == 2)


def test_each_array_has_memory_of_its_own() -> None:
    program = jax.jit(lambda: (allocate(SHAPE), allocate(SHAPE))).lower().compile()
    assert program.as_text().count(f'custom_call_target="{native.ALLOCATE}"') == 2
    first, second = program()
    assert first.unsafe_buffer_pointer() != second.unsafe_buffer_pointer()


@pytest.mark.skipif(not STATM.exists(), reason="this system does not say what a process has in memory")
def test_what_is_not_written_takes_no_memory() -> None:
    run = jax.jit(lambda: allocate(jax.ShapeDtypeStruct((1 << 30,), jnp.int8))).lower().compile()

    def count_resident() -> int:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = count_resident()
    array = jax.block_until_ready(run())
    assert array.nbytes == 1 << 30
    assert count_resident() - before < 1 << 26


def test_it_is_zeros_on_other_platforms() -> None:
    with compile_for("tpu"):
        text = jax.jit(lambda: allocate(SHAPE)).lower().as_text()
    assert native.ALLOCATE not in text


def test_it_is_zeros_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def miss() -> None:
        raise BackendMissing("not built")

    monkeypatch.setattr(native, "load_library", miss)
    array = jax.jit(lambda: allocate(SHAPE))()
    assert array.shape == (3, 5) and array.dtype == jnp.bfloat16
    assert np.all(np.asarray(array) == 0)
