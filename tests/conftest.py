"""Fakes 8 CPU devices for every test, before jax is imported anywhere.

HSAI_TEST_PLATFORM=cuda (or tpu) leaves jax the accelerator: kernels/README.md says which tests are to run there.
"""

import os

os.environ["JAX_PLATFORMS"] = ",".join(dict.fromkeys([os.environ.get("HSAI_TEST_PLATFORM", "cpu"), "cpu"]))
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import gc
import resource
from collections.abc import Iterator

import hypothesis
import pytest

# The first example of a property may compile a program; time is measured by the benchmarks, never by a test.
hypothesis.settings.register_profile("hsai", deadline=None)
hypothesis.settings.load_profile("hsai")

CROWDED = 4 << 30
"""Bytes of a process beyond which compiled programs go: jax keeps each of them, and a suite compiles thousands."""


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """Between modules, a process that has grown large lets go of what it compiled."""
    yield
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[1]) * resource.getpagesize()
    if held > CROWDED:
        import jax

        jax.clear_caches()
        gc.collect()
