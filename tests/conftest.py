"""Fakes 8 CPU devices for every test, before jax is imported anywhere; what is compiled is compiled once for all tests.

HSAI_TEST_PLATFORM=cuda (or tpu) leaves jax the accelerator: kernels/README.md says which tests are to run there.
"""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = ",".join(dict.fromkeys([os.environ.get("HSAI_TEST_PLATFORM", "cpu"), "cpu"]))
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers and the programs that tests start find the session's
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="hsai-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

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
