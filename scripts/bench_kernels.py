#!/usr/bin/env python
"""Measures the kernels: time, rates, percent of what this machine can do, and the ratio to the reference and to peers.

    python scripts/bench_kernels.py [--quick] [--ops decode attention] [--json FILE] [--tune]

With --tune, the kernels' tiles are searched instead (scripts/bench/tuning.py); those that are faster by 5% at least go
to kernels/hsai_kernels/tuned/DEVICE.json, where the kernels find them, and rows compare with the tiles as they were.

Activations are float32 on a CPU. On an accelerator they are bfloat16, as a model's by default, and cases say so: tiles
are looked up by their dtype.

Ceilings are measured in the same process and by the same turns (scripts/bench/ceilings.py says how). That of 8-bit
integers, which our products of low bits are made of on a CPU, is ONNX Runtime's product, and not known where that is
not installed. Peers are XLA (dense products, attention as jax has it, the loss as one would write it), the
kernel's reference, for sparse formats our int4, and, where they are installed, ONNX Runtime's int4 and int8 for single
products and llama.cpp for those of a whole model (scripts/bench/llama.py says what either side counts):

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install '.[peers]'      # builds llama.cpp for this processor; minutes

Ours and peers take turns, and a ratio above 1 means that ours is faster; scripts/bench/timing.py
says what a row holds.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from bench import attention, layers, llama, peers, products
from bench.ceilings import make_ceilings
from bench.timing import Case, measure, write_line
from bench.tuning import find_tiles

from hsai.files import write_json_atomic
from hsai.machine import count_cores, describe_machine
from hsai_kernels.tuning import Key, Sides, name_device, write_tuned

OPS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "decode": lambda quick: products.make_products((1,) if quick else (1, 4, 8), quick=quick),
    "prefill": lambda quick: products.make_products((128,) if quick else (128, 512), quick=quick),
    "attention": lambda quick: attention.make_attention(quick=quick),
    "paged_attention": lambda quick: attention.make_paged_attention(quick=quick),
    "cross_entropy": lambda quick: layers.make_cross_entropy(quick=quick),
    "gated_mlp": lambda quick: layers.make_gated_mlp(quick=quick),
    "norm_matmul": lambda quick: layers.make_norm_matmul(quick=quick),
    "rope": lambda quick: layers.make_rope(quick=quick),
    "model": lambda quick: llama.make_model((1, 128) if quick else (1, 128, 512), quick=quick),
}

WORTH_STORING = 1.05
"""A tile is stored for a ratio of at least this."""

WAITING = "times are then of no use, llama.cpp's least of all: its threads wait for one another by spinning"
INSTALL_PEERS = "install it with CMAKE_ARGS=-DGGML_NATIVE=ON pip install '.[peers]'"


def main() -> None:
    """Parses the command line, measures, prints, and writes the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ops", nargs="+", choices=OPS, default=list(OPS), help="what to measure (default: everything)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds: under a minute")
    parser.add_argument("--tune", action="store_true", help="search faster tiles of the kernels, and store them")
    parser.add_argument(
        "--json", type=Path, help="writes machine and rows to this file, and at the end that it is complete"
    )
    arguments = parser.parse_args()

    machine = describe_machine() | {"command": shlex.join(["python", *sys.argv])}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for peer, packages in (("onnxruntime", peers.ONNX), ("llama.cpp", llama.PACKAGES)):
        absent = peers.find_absent(packages)
        print(f"peer {peer}: " + ("present" if absent is None else f"absent ({absent}); {INSTALL_PEERS}"))
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > count_cores() / 2:
        print(f"warning: others use this machine (load {load:.1f}); {WAITING}")
    rounds, seconds = (5, 0.5) if arguments.quick else (15, 3.0)

    ceilings = make_ceilings()
    rows: list[dict[str, Any]] = []
    for op in arguments.ops:
        for case in OPS[op](arguments.quick):
            tiles: dict[Key, Sides] = {}
            if arguments.tune:
                print(case.name, flush=True)
                tiles, case = find_tiles(case, rounds=rounds, seconds=seconds)
                if not tiles:
                    continue
            measured = measure(case, ceilings, rounds=rounds, seconds=seconds)
            print(write_line(case, measured), flush=True)
            if case.explain is not None:
                print(case.explain(measured), flush=True)
            rows += measured
            if arguments.json is not None:  # after each, for whoever does not wait for the last
                write_json_atomic(arguments.json, {"machine": machine, "rows": rows})
            if tiles and measured[1]["ratio"] >= WORTH_STORING:
                print(f"stored in {write_tuned(name_device(), machine['command'], tiles)}", flush=True)
    if arguments.json is not None:
        write_json_atomic(arguments.json, {"machine": machine, "rows": rows, "complete": True})


if __name__ == "__main__":
    with jax.default_matmul_precision("float32"):
        main()
