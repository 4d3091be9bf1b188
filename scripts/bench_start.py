#!/usr/bin/env python
"""From a cold start to the first token, and the memory that a process takes: `hsai generate`, again and again.

    python scripts/bench_start.py BUNDLE [--repeats 9] [--json FILE]

Each repeat is a process of its own. The first one of all compiles, and is told apart; the others find its programs in
the cache ($XDG_CACHE_HOME/hsai/programs), and the weights in the page cache of the system. Memory is told beside the
bytes of the bundle's weights, and beside a process that has imported the same and no model: the most that was resident,
and what of it is the process' own and not a mapped file (from /proc, so Linux).
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hsai.files import write_json_atomic
from hsai.machine import describe_machine

PROMPT = "The capital of France is"
TOKENS = 64
"""New tokens of a process: long enough to be looked at while it writes."""

MEMORY = {"resident": "VmHWM", "anonymous": "RssAnon"}
"""Lines of /proc/PID/status."""

BARE = "import jax, hsai.cli.generate, hsai.infer.engine; jax.numpy.zeros(1).block_until_ready(); print(1); input()"
"""What a process is before it has a model."""


def main() -> None:
    """Starts, measures, prints, and writes the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeats", type=int, default=9, help="after the first (default: 9)")
    parser.add_argument("--json", type=Path, help="writes machine and numbers to this file")
    arguments = parser.parse_args()
    machine = describe_machine() | {"command": shlex.join(["python", *sys.argv])}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    size = sum(path.stat().st_size for path in arguments.bundle.glob("*.safetensors"))
    first = start(arguments.bundle)
    print(f"first start, which may compile: {first['seconds']:.2f} s to the first token", flush=True)
    others = [start(arguments.bundle) for _ in range(arguments.repeats)]
    seconds = sorted(run["seconds"] for run in others)
    print(f"to the first token: {statistics.median(seconds):.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f})")
    bare = measure_bare()
    for name in MEMORY:
        held = statistics.median(run[name] for run in others)
        print(
            f"{name}: {held / 1e6:.0f} MB, {held / size:.2f} of the {size / 1e6:.0f} MB of weights; "
            f"{bare[name] / 1e6:.0f} MB without a model"
        )
    if arguments.json is not None:
        found = {"machine": machine, "bytes": size, "bare": bare, "first": first, "starts": others}
        write_json_atomic(arguments.json, found)


def start(bundle: Path) -> dict[str, Any]:
    """One process: seconds until its first token was printed, and its memory when it had printed all."""
    words = [sys.executable, "-m", "hsai.cli", "generate", str(bundle), PROMPT, "--temperature", "0"]
    words += ["--max-tokens", str(TOKENS)]
    begun = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        output = process.stdout.fileno()
        # The prompt comes with the first piece of text.
        read = os.read(output, 1 << 16)
        taken: dict[str, Any] = {"seconds": time.perf_counter() - begun}
        taken |= read_memory(process.pid)
        while read and os.read(output, 1 << 16):
            taken |= read_memory(process.pid)
        errors = process.stderr.read()
        if process.wait() or "resident" not in taken:
            sys.exit(f"{shlex.join(words)} gave {process.returncode}: {errors.decode()}")
    return taken


def measure_bare() -> dict[str, int]:
    """The memory of a process that has imported what the command does, and run a program without a model."""
    with subprocess.Popen([sys.executable, "-c", BARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        taken = read_memory(process.pid)
        process.communicate(b"\n")
    return taken


def read_memory(pid: int) -> dict[str, int]:
    """Bytes that a process holds now; none of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.split()[-1:] == ["kB"]}
    return {name: 1024 * int(found[key]) for name, key in MEMORY.items() if key in found}


if __name__ == "__main__":
    main()
