"""What a measurement was made on: a number without its machine is not a result."""

import datetime
import hashlib
import os
import platform
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import hsai
import hsai_kernels
from hsai_kernels.dispatch import BackendMissing
from hsai_kernels.native import name_instruction_set


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory (GiB), devices, versions, the kernels in use, the commit, and the date (UTC)."""
    try:
        kernels = name_instruction_set()
    except BackendMissing:
        kernels = "reference"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _name_processor(),
        "cores": count_cores(),
        "memory_gib": round(memory, 1),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpu_kernels": kernels,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": find_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["hsai", *sys.argv[1:]]),
    }


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_commit() -> str | None:
    """The commit of the checkout that hsai runs from, with "-dirty" where files differ; None if it is installed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_peak_memory() -> int:
    """The most memory that this process has held so far, in MiB."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held // (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def digest_sources() -> str:
    """SHA-256 of all Python files of hsai and its kernels: two commits that are "dirty" may be different programs."""
    found = hashlib.sha256()
    for package in (hsai, hsai_kernels):
        root = Path(package.__file__ or "").parent
        for path in sorted(root.rglob("*.py")):
            found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _name_processor() -> str:
    """Model and instruction-set landmarks from Linux's /proc/cpuinfo; elsewhere what Python knows."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    return named.get("model name", platform.machine())
