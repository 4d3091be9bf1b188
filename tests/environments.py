"""What tests that start processes put into their environment, and how XLA compiles for tests (tests/conftest.py)."""

import os

PLAIN_COMPILER = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
"""Flags of XLA: what it makes for a CPU is the same arithmetic, neither vectorized nor fused by MLIR's emitters."""

OPTIMIZING = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
OPTIMIZING |= {"xla_cpu_use_fusion_emitters": True}
"""`compiler_options` of jax.jit for a program of tests that runs often enough to be worth it: XLA as users have it."""


def as_a_user(**more: str) -> dict[str, str]:
    """The environment of a process that stands for a user's: XLA optimizes, and there is one device."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in PLAIN_COMPILER]
    return {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": " ".join(flags), **more}
