"""Training runs in processes of their own: the only ones that can be killed, or be several."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsai.formats.storage import named_arrays
from hsai.train.restore import read_run

TINY = str(Path(__file__).resolve().parents[2] / "configs" / "tiny.py")
# Measured, not computed: these differ from one run of the same numbers to the next.
CLOCKS = ("step_seconds", "tokens_per_second")


def launch(
    *words: object, devices: int, cache: Path, process: int = 0, processes: int = 1, port: int = 0
) -> subprocess.Popen[str]:
    """Starts `hsai train configs/tiny.py WORDS...`; `cache` keeps compiled programs, so that all runs share them."""
    several = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
    }
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **(several if processes > 1 else {}),
    }
    command = [sys.executable, "-m", "hsai.cli", "train", TINY, *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def launch_together(*words: object, cache: Path, each: Sequence[Sequence[object]] = ((), ())) -> list[Any]:
    """Two processes of two devices each that make one run, joined over loopback; `each` adds words to one of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        launch(*words, *own, devices=2, cache=cache, process=index, processes=2, port=port)
        for index, own in enumerate(each)
    ]


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str, str]:
    """Waits for the end: exit status, stdout, stderr. One that does not come to its end fails the test."""
    try:
        out, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, error = process.communicate()
        raise AssertionError(f"did not end in {seconds} seconds: {out} {error}") from None
    return process.returncode, out, error


def weights(directory: Path) -> dict[str, np.ndarray]:
    """The trained weights of a run, by name."""
    return {name: np.asarray(array) for name, array in named_arrays(read_run(directory).model).items()}


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows that a run logged, without what a clock measured."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]
