"""What this machine can do, measured where and when the kernels are: reading memory, and products."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench.activations import find_dtype
from bench.peers import ONNX, find_absent, make_int8_peer
from bench.timing import Ceilings, Probe, Runner
from hsai.machine import count_cores
from hsai_kernels.dispatch import find_platform

DEFAULT_CACHE = 32 * 2**20

SIDE, LARGE_SIDE = 2048, 8192
"""Of the square matrices that are multiplied; on an accelerator large ones, so that they outweigh a program's start."""

LARGE_READ = 2**31
"""Bytes that are read on an accelerator, likewise."""


def find_cache_size() -> int:
    """Bytes of the last-level cache, from Linux's /sys; elsewhere 32 MiB."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * (2**20 if text.endswith("M") else 2**10))
    return max(sizes, default=DEFAULT_CACHE)


def make_ceilings() -> Ceilings:
    """Probes of this machine; each is built when it is first run."""
    known = find_platform() == "cpu" and find_absent(ONNX) is None
    integers = make_int8_peer(SIDE, SIDE, SIDE, 1) if known else None
    return Ceilings(
        read=_make_reading(),
        multiply=_make_product(),
        multiply_integers=None if integers is None else Probe(amount=2 * SIDE**3, runner=integers),
    )


def _make_reading() -> Probe:
    """On a CPU numpy's bitwise or over 64-bit words, one thread a core; elsewhere jax's maximum over float32."""
    cpu = find_platform() == "cpu"
    nbytes = max(8 * find_cache_size(), 2**28) if cpu else LARGE_READ

    def build() -> Callable[[], object]:
        if not cpu:
            values = jnp.ones(nbytes // 4, jnp.float32)
            largest = jax.jit(jnp.max)
            return lambda: largest(values).block_until_ready()
        parts = np.array_split(np.ones(nbytes // 8, np.uint64), count_cores())
        pool = ThreadPoolExecutor(len(parts))
        return lambda: list(pool.map(np.bitwise_or.reduce, parts))

    return Probe(amount=nbytes, runner=Runner(name="reading", build=build))


def _make_product() -> Probe:
    """XLA's, of matrices in the activations' dtype."""
    dtype = find_dtype()
    side = SIDE if find_platform() == "cpu" else LARGE_SIDE

    def build() -> Callable[[], object]:
        a = jnp.ones((side, side), dtype)
        multiply = jax.jit(lambda a: a @ a)
        return lambda: multiply(a).block_until_ready()

    return Probe(amount=2 * side**3, runner=Runner(name=f"XLA's {dtype.name} product", build=build))
