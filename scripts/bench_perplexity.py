#!/usr/bin/env python
"""Compares hsai's perplexity with llama.cpp's: the same GGUF, text, context and chunks.

    python scripts/bench_perplexity.py MODEL.gguf [--text FILE] [--window 512] [--chunks 32] [--json FILE] [--quick]

Without --text the passages of LAMBADA are read, one after the other; --quick takes 4 chunks. Both sides score the
second half of each chunk (hsai/evaluate/perplexity.py tells why), from float32 logits. llama.cpp multiplies by the
quantized weights, with activations rounded to 8 bits; hsai by the dequantized ones in float32: that is what they may
differ by. Needs llama-cpp-python: pip install '.[peers]'.
"""

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsai.cli.tasks import compute_in
from hsai.errors import InputError
from hsai.evaluate import Pair, Scorer
from hsai.evaluate.documents import load_documents
from hsai.evaluate.metrics import Metric, perplexity
from hsai.evaluate.perplexity import cut_chunks, read_text
from hsai.export.source import ModelSource, open_model
from hsai.files import write_json_atomic
from hsai.machine import describe_machine
from hsai.progress import ProgressBar, say

QUICK_CHUNKS = 4


def read_passages() -> str:
    """LAMBADA's passages with their last words."""
    documents = load_documents("lambada")
    return "\n\n".join(f"{document['context']} {document['word']}" for document in documents)


def measure_ours(source: ModelSource, pairs: Sequence[Pair], progress: ProgressBar) -> Metric:
    """hsai, in float32."""
    scorer = Scorer(compute_in(source.model, "float32"))
    scores = scorer.score([[pair] for pair in pairs], lambda done, total: progress("hsai", done, total))
    return perplexity([value for (score,) in scores for value in score.token_log_likelihoods])


def measure_llama(model: Any, pairs: Sequence[Pair], progress: ProgressBar) -> Metric:
    """llama.cpp, chunk by chunk."""
    values: list[float] = []
    for index, pair in enumerate(pairs):
        tokens = [*pair.context, *pair.continuation]
        model.reset()
        model.eval(tokens)
        logits = np.asarray(model.scores[len(pair.context) - 1 : len(tokens) - 1], np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        picked = logits[np.arange(len(logits)), pair.continuation]
        values += (picked - np.log(np.exp(logits).sum(axis=1))).tolist()
        progress("llama.cpp", index + 1, len(pairs))
    return perplexity(values)


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

    model = llama_cpp.Llama(
        str(arguments.gguf),
        n_ctx=arguments.window,
        n_batch=arguments.window,
        n_threads=len(os.sched_getaffinity(0)),
        logits_all=True,
        verbose=False,
    )
    text = read_passages() if arguments.text is None else read_text(arguments.text)
    source = open_model(arguments.gguf)
    tokenizer = source.tokenizer
    tokens = model.tokenize(text.encode(), add_bos=False, special=False)
    theirs_prefix = model.tokenize(b"", add_bos=True, special=False)
    if theirs_prefix != list(tokenizer.prefix):
        raise InputError(f"llama.cpp puts {theirs_prefix} before a text, and hsai {list(tokenizer.prefix)}")
    if tokens != tokenizer.encode(text):
        raise InputError("hsai and llama.cpp cut the text into different tokens: their numbers cannot be compared")
    chunks = QUICK_CHUNKS if arguments.quick else arguments.chunks
    pairs = cut_chunks(tokens, prefix=tokenizer.prefix, context=arguments.window)[:chunks]
    with ProgressBar() as progress:
        times = [time.perf_counter()]
        theirs = measure_llama(model, pairs, progress)
        times.append(time.perf_counter())
        ours = measure_ours(source, pairs, progress)
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
