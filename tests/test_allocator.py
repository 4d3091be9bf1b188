"""What was freed goes back to the system, and a server's threads share their heaps; each in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told how to allocate")

RETURN = """
import os
from hsai.allocator import return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

held = [bytearray(b"x" * 100_000) for _ in range(1000)]
last = held[-1]  # at the top of the heap: what is free below it stays
full = resident()
del held
kept = resident()
assert not return_freed_memory() and return_freed_memory(every=0)
print((full - kept) // 10**6, (kept - resident()) // 10**6)
"""

SHARE = """
import ctypes, os, sys, threading
from hsai.allocator import share_heaps

if "shared" in sys.argv:
    share_heaps()
done, begin = threading.Event(), threading.Barrier(9)

def allocate():
    begin.wait()
    held = [bytearray(100_000) for _ in range(100)]
    begin.wait()  # all have their heap now
    done.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
begin.wait()
begin.wait()
done.set()
for thread in threads:
    thread.join()
library = ctypes.CDLL(None)
library.fopen.restype = ctypes.c_void_p
stream = library.fopen(b"/dev/stdout", b"w")
library.malloc_info(0, ctypes.c_void_p(stream))
library.fclose(ctypes.c_void_p(stream))
"""


def run(program: str, *words: str) -> str:
    told = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if name not in told}
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment).stdout


def test_what_was_freed_goes_back() -> None:
    by_itself, by_being_told = map(int, run(RETURN).split())
    assert by_itself < 20 and by_being_told > 70


def test_threads_share_heaps() -> None:
    own, shared = (run(SHARE, word).count("<heap nr=") for word in ("own", "shared"))
    assert own > 2 and shared <= 2
