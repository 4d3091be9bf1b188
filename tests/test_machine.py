"""Memory as it is told: a process's own and not its parent's, that of one piece of work, and of devices by its name."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from hsai import machine
from hsai.machine import read_peak_memory, reset_peak_memory

GIGABYTE = 1 << 30
CHILD = """
import json, resource
from hsai.machine import read_peak_memory
print(json.dumps([read_peak_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="marks of /proc")


@linux
def test_a_process_does_not_count_what_its_parent_held() -> None:
    held = np.ones(GIGABYTE, np.int8)
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    peaks, carried = json.loads(done.stdout.splitlines()[-1])
    assert list(peaks) == ["peak_memory"] and 2**24 < peaks["peak_memory"] < held.nbytes
    assert carried >= held.nbytes  # which this test would notice


@linux
def test_a_piece_of_work_does_not_count_the_one_before() -> None:
    before = read_peak_memory()["peak_memory"]
    held = np.ones(GIGABYTE, np.int8)
    assert read_peak_memory()["peak_memory"] >= max(held.nbytes, before)
    del held
    assert reset_peak_memory() == {"peak_memory"}
    after = read_peak_memory()["peak_memory"]
    assert after < before + GIGABYTE // 2
    held = np.ones(GIGABYTE, np.int8)
    assert read_peak_memory()["peak_memory"] > after + GIGABYTE // 2
    del held


@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("linux", 1024)])
def test_other_systems_count_in_their_own_units(
    system: str, unit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "STATUS", tmp_path / "status")
    monkeypatch.setattr(machine, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(machine.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setattr(sys, "platform", system)
    assert read_peak_memory() == {"peak_memory": 5000 * unit} and reset_peak_memory() == frozenset()
    (tmp_path / "status").write_text("Name:\tpython\n")  # a kernel that does not say
    assert read_peak_memory() == {"peak_memory": 5000 * unit}


def test_devices_memory_is_told_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the one that held most; a device that does not count has no peak."""

    def device(platform: str, stats: dict[str, int] | None) -> SimpleNamespace:
        return SimpleNamespace(platform=platform, memory_stats=lambda: stats)

    devices = [device("gpu", {"peak_bytes_in_use": size, "bytes_in_use": 1}) for size in (30, 70)]
    devices += [device("gpu", None), device("cpu", {"peak_bytes_in_use": 900})]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    found = read_peak_memory()
    assert found["peak_device_memory"] == 70 and found["peak_memory"] > 2**24
    devices[:2] = []
    assert list(read_peak_memory()) == ["peak_memory"]
