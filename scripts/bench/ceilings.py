"""What this machine can do at best, measured where the kernels are measured: reading memory, and products."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench.peers import ONNX, find_absent, make_int8_peer
from bench.timing import Ceilings
from hsai.machine import count_cores

DEFAULT_CACHE = 32 * 2**20
SIDE = 2048
"""Of the square matrices that are multiplied."""


def find_cache_size() -> int:
    """Bytes of the last-level cache, from Linux's /sys; elsewhere 32 MiB."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * (2**20 if text.endswith("M") else 2**10))
    return max(sizes, default=DEFAULT_CACHE)


def measure_ceilings(known: Ceilings | None = None) -> Ceilings:
    """The best of several tries each, and of what was `known`: a ceiling is what can be done, not what is usual."""
    read, multiply, integers = _measure_reading(8), _measure_multiplying(3), _measure_integers(3)
    if known is not None:
        read, multiply = max(read, known.read), max(multiply, known.multiply)
        integers = max(filter(None, (integers, known.multiply_integers)), default=None)
    return Ceilings(read=read, multiply=multiply, multiply_integers=integers)


def _find_best(run: Callable[[], object], tries: int) -> float:
    """Seconds of the fastest run, after one that does not count."""
    run()
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _measure_reading(tries: int) -> float:
    """GB/s: on a CPU numpy's bitwise or over 64-bit words, one thread a core; elsewhere jax's maximum over float32."""
    nbytes = max(8 * find_cache_size(), 2**28)
    if jax.default_backend() != "cpu":
        values = jnp.ones(nbytes // 4, jnp.float32)
        largest = jax.jit(jnp.max)
        return nbytes / _find_best(lambda: largest(values).block_until_ready(), tries) / 1e9
    parts = np.array_split(np.ones(nbytes // 8, np.uint64), count_cores())
    with ThreadPoolExecutor(len(parts)) as pool:
        return nbytes / _find_best(lambda: list(pool.map(np.bitwise_or.reduce, parts)), tries) / 1e9


def _measure_multiplying(tries: int) -> float:
    """GFLOP/s of XLA's float32 product of two square matrices."""
    a = jnp.ones((SIDE, SIDE), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    return 2 * SIDE**3 / _find_best(lambda: multiply(a).block_until_ready(), tries) / 1e9


def _measure_integers(tries: int) -> float | None:
    """GFLOP/s of ONNX Runtime's int8 product of two square matrices on a CPU, if it is installed."""
    if jax.default_backend() != "cpu" or find_absent(ONNX) is not None:
        return None
    return 2 * SIDE**3 / _find_best(make_int8_peer(SIDE, SIDE, SIDE, 1).run, tries) / 1e9
