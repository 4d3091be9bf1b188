"""What a measurement was made on: a number without its machine is not a result."""

import datetime
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import jax

from hsai_kernels.dispatch import BackendMissing
from hsai_kernels.native import name_instruction_set


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory (GiB), devices, versions, the kernels in use, and the date (UTC)."""
    try:
        kernels = name_instruction_set()
    except BackendMissing:
        kernels = "reference"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _name_processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpu_kernels": kernels,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["hsai", *sys.argv[1:]]),
    }


def _name_processor() -> str:
    """Model and instruction-set landmarks from Linux's /proc/cpuinfo; elsewhere what Python knows."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    return named.get("model name", platform.machine())
