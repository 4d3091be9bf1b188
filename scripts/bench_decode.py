#!/usr/bin/env python
"""A whole model in our engine beside others: tokens a second, one by one, of a prompt, and of many streams.

    python scripts/bench_decode.py MODEL [--tiny-llama] [--formats int4 ...] [--activations float int8]
        [--streams 4 16 64] [--json FILE] [--quick]

MODEL is a GGUF file, a bundle, a run or a folder of transformers, dense or not; its weights are packed in each format
here, and written for llama.cpp (q4_0, q8_0), onnxruntime-genai (int4) and CTranslate2 (int8), as far as these are
installed; scripts/bench/decoding.py says what is compared. With --tiny-llama, random weights of TinyLlama-1.1B's shape
take their place, with MODEL's vocabulary. Under each case stand tokens a second of all sides, the weights' bytes a
token, and how much of our time is not in kernels. --quick takes one format and no streams. The peers, built for this
processor:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install '.[peers]'

Peers run in processes of their own, stopped while it is not their turn (scripts/bench/processes.py). It wants a machine
to itself: threads that wait for one another by spinning, llama.cpp's most of all, lose most where others run.
"""

import argparse
import dataclasses
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from bench.ceilings import make_ceilings
from bench.decoding import FORMATS, PEERS, Contest, draw_model, make_tiny_llama, write_peers
from bench.peers import find_absent
from bench.timing import measure, write_line

from hsai.export.source import open_model
from hsai.files import write_json_atomic
from hsai.machine import describe_machine


def main() -> None:
    """Parses the command line, measures, prints, and writes the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tiny-llama", action="store_true", help="random weights of 1.1 billion")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--activations", nargs="+", choices=("float", "int8"), default=("float", "int8"))
    parser.add_argument("--streams", nargs="*", type=int, default=(4, 16, 64))
    parser.add_argument("--quick", action="store_true", help="one format, few rounds, no streams")
    parser.add_argument("--json", type=Path, help="writes machine and rows to this file")
    arguments = parser.parse_args()
    machine = describe_machine() | {"command": shlex.join(["python", *sys.argv])}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for peer, packages in PEERS.items():
        absent = find_absent(packages)
        print(f"peer {peer}: {'present' if absent is None else f'absent ({absent})'}", flush=True)
    rounds, seconds = (3, 1.0) if arguments.quick else (9, 10.0)

    source = open_model(arguments.model)
    name = arguments.model.stem
    if arguments.tiny_llama:
        name = "TinyLlama-1.1B's shape"
        config = make_tiny_llama(source.model.config.vocab)
        source = dataclasses.replace(source, model=draw_model(config), directory=Path("tiny-llama"), origin={})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hsai_bench_") as folder:
        alone, together = write_peers(source, Path(folder))
        contest = Contest(
            name=name,
            source=source,
            formats=arguments.formats[:1] if arguments.quick else arguments.formats,
            activations=arguments.activations[:1] if arguments.quick else arguments.activations,
            alone=alone,
            together=together,
            streams=() if arguments.quick else arguments.streams,
        )
        ceilings = make_ceilings()
        for case in contest.make_cases():
            measured = measure(case, ceilings, rounds=rounds, seconds=seconds)
            print(write_line(case, measured), case.explain(measured) if case.explain else "", sep="\n", flush=True)
            rows += measured
            if arguments.json is not None:  # after each, for whoever does not wait for the last
                write_json_atomic(arguments.json, {"decoding": name, "machine": machine, "rows": rows})


if __name__ == "__main__":
    with jax.default_matmul_precision("float32"):
        main()
