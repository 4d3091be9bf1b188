"""How fast a model decodes and reads prompts, and the memory that takes, each model in a process of its own.

    python -m hsai.cli.speed MODEL KV_CACHE ACTIVATIONS

Prints one line of JSON. A process of its own, because the peak of memory is a process's, and because what an earlier
model left behind (compiled programs, freed blocks) would count for the next one.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

from hsai.errors import InputError
from hsai.export.source import open_model
from hsai.formats import Activations, take_activations
from hsai.infer import Engine
from hsai.machine import read_peak_memory
from hsai.models import CacheFormat

PROMPT = 512
"""Tokens of the prompt that is read; less where the model's context is shorter."""


def measure_speed(path: Path, kv_cache: CacheFormat, activations: Activations) -> dict[str, Any]:
    """The rows of `describe_speed`, measured in a new process.

    Raises:
      InputError: the process fails; what it says last.
    """
    command = [sys.executable, "-m", "hsai.cli.speed", str(path), kv_cache, activations]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        raise InputError(f"the speed of {path} could not be measured: {said[-1]}")
    rows: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return rows


def describe_speed(path: Path, kv_cache: CacheFormat, activations: Activations) -> dict[str, Any]:
    """Medians and [slowest, fastest] in tokens a second, of decoding at batch 1 and of reading a prompt; and what
    `read_peak_memory` says of this process, compilation included."""
    source = open_model(path)
    model = take_activations(source.model, activations)
    engine = Engine.trace(model, source.tokenizer, cache=kv_cache)
    decode = engine.decode_speeds()
    prompt = min(PROMPT, engine.runtime.slots)
    prefill = engine.prefill_speeds(prompt)
    return {
        "decode_tokens_per_second": statistics.median(decode),
        "decode_spread": [decode[0], decode[-1]],
        "prefill_tokens_per_second": statistics.median(prefill),
        "prefill_spread": [prefill[0], prefill[-1]],
        "prefill_tokens": prompt,
        **read_peak_memory(),
    }


if __name__ == "__main__":
    _, path, kv_cache, activations = sys.argv
    print(json.dumps(describe_speed(Path(path), cast(CacheFormat, kv_cache), cast(Activations, activations))))
