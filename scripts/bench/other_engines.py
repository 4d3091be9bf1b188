"""Whole models in other engines: onnxruntime-genai (int4) and CTranslate2 (int8), on all cores of this process.

Their own converters make their files, each in a process of its own, from the checkpoint of transformers that our export
writes of the same weights.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.llama_context import Work
from bench.processes import Apart
from bench.timing import Runner
from hsai.machine import count_cores

ONNX_GENAI = ("onnxruntime_genai", "onnx_ir", "torch", "transformers")
CTRANSLATE2 = ("ctranslate2", "torch", "transformers")
"""Packages that each needs, converters included."""

FIRST = 5
"""Of the tokens that are read; those before it are special ones in most vocabularies."""


def convert_onnx_genai(checkpoint: Path, folder: Path) -> None:
    """Writes an int4 model of a checkpoint: groups of 32, activations rounded to int8, the head too."""
    _run(
        *("onnxruntime_genai.models.builder", "-m", checkpoint, "-o", folder, "-p", "int4", "-e", "cpu"),
        *("-c", folder / "cache", "--extra_options", "int4_accuracy_level=4"),
    )


def convert_ctranslate2(checkpoint: Path, folder: Path) -> None:
    """Writes an int8 model of a checkpoint: a scale a row, activations rounded to int8."""
    _run(
        *("ctranslate2.converters.transformers", "--model", checkpoint, "--output_dir", folder),
        *("--quantization", "int8"),
    )


def _run(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} failed: {done.stderr[-2000:]}")


def make_onnx_genai(folder: Path, *, work: Work, read: int, written: int) -> Runner:
    """Reads `read` tokens; or writes `written` behind so many, each of which is given, and its logits are made."""
    build = functools.partial(_build_onnx_genai, folder, work, read, written)
    return Runner(name="onnxruntime-genai int4", build=lambda: Apart(build, {}), times=1 if work == "read" else written)


def _build_onnx_genai(folder: Path, work: Work, read: int, written: int) -> Callable[[], object]:
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    options = {"intra_op_num_threads": count_cores()}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = onnxruntime_genai.Model(config)
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=read + written + 1, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    tokens = FIRST + np.arange(read + written, dtype=np.int32)

    def prefill() -> None:
        generator.rewind_to(0)
        generator.append_tokens(tokens[:read])
        generator.get_logits()

    def decode() -> None:
        generator.rewind_to(read)
        for token in tokens[read:]:
            generator.append_tokens(token[None])
            generator.get_logits()

    if work == "read":
        return prefill
    prefill()
    return decode


def make_ctranslate2(folder: Path, *, work: Work, read: int, written: int) -> Runner:
    """Reads `read` tokens and writes one; or writes `written` behind one, the likeliest: it takes no cache to go on."""
    build = functools.partial(_build_ctranslate2, folder, work, read, written)
    return Runner(name="CTranslate2 int8", build=lambda: Apart(build, {}), times=1 if work == "read" else written)


def _build_ctranslate2(folder: Path, work: Work, read: int, written: int) -> Callable[[], object]:
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type="int8", inter_threads=1, intra_threads=count_cores()
    )
    words = json.loads((folder / "vocabulary.json").read_text())[FIRST:]
    prompt, length = (words[:read], 1) if work == "read" else (words[:1], written)
    return functools.partial(
        generator.generate_batch,
        [prompt],
        min_length=length,
        max_length=length,
        include_prompt_in_result=False,
        beam_size=1,
        sampling_topk=1,
    )
