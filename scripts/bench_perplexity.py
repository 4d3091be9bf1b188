#!/usr/bin/env python
"""Compares hsai's perplexity with llama.cpp's: the same GGUF, text, context and chunks.

    python scripts/bench_perplexity.py MODEL.gguf [--text FILE] [--window 512] [--chunks 32] [--json FILE] [--quick]

Without --text the passages of LAMBADA are read, one after the other; --quick takes 4 chunks. What may differ is in
scripts/bench/perplexities.py. Needs llama-cpp-python: pip install '.[peers]'.
"""

import argparse
import math
import shlex
import sys
import time
from pathlib import Path

from bench.perplexities import cut_text, measure_llama, measure_ours, open_llama, read_passages

from hsai.evaluate.perplexity import read_text
from hsai.export.source import open_model
from hsai.files import write_json_atomic
from hsai.machine import describe_machine
from hsai.progress import ProgressBar, say

QUICK_CHUNKS = 4


def main() -> None:
    """Measures both, and says by how much they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    import llama_cpp

    model = open_llama(arguments.gguf, arguments.window)
    text = read_passages() if arguments.text is None else read_text(arguments.text)
    source = open_model(arguments.gguf)
    chunks = QUICK_CHUNKS if arguments.quick else arguments.chunks
    pairs = cut_text(model, source.tokenizer, text, arguments.window)[:chunks]
    with ProgressBar() as progress:
        times = [time.perf_counter()]
        theirs = measure_llama(model, pairs, progress)
        times.append(time.perf_counter())
        ours = measure_ours(source.model, pairs, progress)
        times.append(time.perf_counter())
    ratio = ours.value / theirs.value
    row = {
        "case": f"{arguments.gguf.name}, {len(pairs)} chunks of {arguments.window} tokens",
        "text": "the passages of LAMBADA" if arguments.text is None else arguments.text.name,
        "metric": "perplexity",
        "ours": ours.value,
        "peer": theirs.value,
        "peer_name": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})",
        "ratio": ratio,
        "standard_error": ours.standard_error,
        "n": ours.n,
        "seconds": {"ours": round(times[2] - times[1], 1), "peer": round(times[1] - times[0], 1)},
    }
    assert math.isfinite(ratio)
    say(f"{row['case']}: hsai {ours.value:.4f}, llama.cpp {theirs.value:.4f}, {100 * (ratio - 1):+.3f}%")
    if arguments.json is not None:
        machine = describe_machine() | {"command": shlex.join(["python", *sys.argv])}
        write_json_atomic(arguments.json, {"machine": machine, "rows": [row]})


if __name__ == "__main__":
    main()
