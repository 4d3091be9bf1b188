"""What a measurement was made on: a number without its machine is not a result."""

import datetime
import hashlib
import os
import platform
import re
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

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


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


def read_peak_memory() -> dict[str, int]:
    """The most memory, in bytes, that this process has held since it began, or since `reset_peak_memory`.

    Returns: "peak_memory", what was resident on the host; and where jax computes on accelerators "peak_device_memory",
      what its allocator had given out on the device that held most ("peak_bytes_in_use" of `jax.Device.memory_stats`).
    """
    accelerators = [device for device in jax.local_devices() if device.platform != "cpu"]
    stats = [device.memory_stats() or {} for device in accelerators]
    held = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return {"peak_memory": _read_resident_peak()} | ({"peak_device_memory": max(held)} if held else {})


def reset_peak_memory() -> frozenset[str]:
    """Lets `read_peak_memory` begin anew, at what is held now.

    Returns: the names of the peaks that do; others go on, as those of devices, and those of hosts other than Linux.
    """
    try:
        CLEAR_REFS.write_text("5")  # proc(5): the mark of VmHWM
    except OSError:
        return frozenset()
    return frozenset({"peak_memory"})


def digest_sources() -> str:
    """SHA-256 of all Python files of hsai and its kernels: two commits that are "dirty" may be different programs."""
    found = hashlib.sha256()
    for package in (hsai, hsai_kernels):
        root = Path(package.__file__ or "").parent
        for path in sorted(root.rglob("*.py")):
            found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _read_resident_peak() -> int:
    """Bytes. Not `ru_maxrss` on Linux, which begins with what the parent held when it made this process."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE) if STATUS.exists() else None
    if found is not None:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _name_processor() -> str:
    """Model and instruction-set landmarks from Linux's /proc/cpuinfo; elsewhere what Python knows."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    return named.get("model name", platform.machine())
