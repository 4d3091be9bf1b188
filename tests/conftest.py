"""Fakes 8 CPU devices for every test, before jax is imported anywhere; what is compiled is compiled once for all tests.

HSAI_TEST_PLATFORM=cuda (or tpu) leaves jax the accelerator: kernels/README.md says which tests are to run there. What
kernels are compared with is then multiplied exactly. HSAI_TEST_COMPILER=optimizing: XLA compiles as it does for users.
"""

import atexit
import gc
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

from tests.environments import PLAIN_COMPILER

PLATFORM = os.environ.get("HSAI_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = ",".join(dict.fromkeys([PLATFORM, "cpu"]))
if PLATFORM != "cpu":
    # XLA rounds float32 operands to TF32 on a GPU, and to bfloat16 on a TPU: references would miss their own tolerance.
    # Pallas takes this setting over as well (jax.lax.dot_general reads it while a kernel is traced), so that a kernel
    # which says nothing of its precision would pass here too, exact as it is not for users: on every platform
    # tests/kernels/test_programs.py, which traces without it, finds such a kernel.
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
if PLATFORM == "cpu" and os.environ.get("HSAI_TEST_COMPILER") != "optimizing":
    # What tests compile runs a few times, and compiling it was most of the suite's time: plainly it takes a third of
    # that. Processes that stand for a user's own have XLA as it is (tests/environments.py), and scripts/test.sh runs
    # the tests whose claims are of last bits a second time with it.
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *PLAIN_COMPILER])
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "HSAI_TEST_FOLDER" not in os.environ:  # workers and the programs that tests start find the session's
    os.environ["HSAI_TEST_FOLDER"] = tempfile.mkdtemp(prefix="hsai-tests-")
    atexit.register(shutil.rmtree, os.environ["HSAI_TEST_FOLDER"], ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.environ["HSAI_TEST_FOLDER"], "programs"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# The first example of a property may compile a program; time is measured by the benchmarks, never by a test.
hypothesis.settings.register_profile("hsai", deadline=None)
hypothesis.settings.load_profile("hsai")

# jax makes objects by the million while it traces, few of them in cycles: looking for those was 6% of the time.
gc.set_threshold(20_000, 20, 20)

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
