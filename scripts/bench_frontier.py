#!/usr/bin/env python
"""Perplexity against bytes: bundles that `hsai compress` made beside llama.cpp's quantizations of the same model.

    python scripts/bench_frontier.py MODEL BUNDLE ... [--calibration TEXT --text HELDOUT]
        [--kinds Q4_K_M IQ2_XS/IQ4_NL ...] [--chunks 32] [--window 512] [--json FILE] [--quick]

MODEL is the dense one (what `hsai compress` takes). llama.cpp quantizes it, written as float32, with an importance
matrix of the calibration text, and measures its own files; hsai measures MODEL and each BUNDLE. A kind is what
llama-quantize calls so, by itself or with the kind of its table behind a slash. All read the same chunks of the
held-out text, spread evenly over it. Without texts they are those of the corpus that MODEL was trained on, as for
`hsai compress`. llama.cpp multiplies by quantized weights with activations of 8 bits; hsai is measured with float32
ones and, where a bundle's weights are of integers, with those of 8 bits as well. A bundle that was calibrated on other
tokens is refused, and chunks that stand in the calibration text are left out. Ratios to the dense model are of each
side's own, with the standard error of the differences, token by token. Bytes are those of all weights, norm gains
included; --quick takes 4 chunks and one kind.
Needs llama-cpp-python: pip install '.[peers]'.
"""

import argparse
import contextlib
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench.frontier import check_calibration, choose_chunks, digest
from bench.llama_quantize import KINDS, measure_importance, quantize, read_kind
from bench.perplexities import cut_text, measure_llama, measure_ours, open_llama

from hsai.cli.corpora import open_own_corpus
from hsai.compress.calibration import CalibrationConfig, draw_windows
from hsai.errors import InputError
from hsai.evaluate.metrics import Metric, compare
from hsai.evaluate.perplexity import read_text
from hsai.export.gguf import export_gguf
from hsai.export.source import ModelSource, inspect_model, open_model
from hsai.files import write_json_atomic
from hsai.formats import nbytes
from hsai.formats.activations import take_activations
from hsai.formats.storage import named_weights
from hsai.machine import describe_machine
from hsai.progress import ProgressBar, say


def main() -> None:
    """Measures all, and prints a line for each as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--kinds", nargs="*", type=_read_kind, default=KINDS)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    kinds = arguments.kinds[:1] if arguments.quick else arguments.kinds
    source = open_model(arguments.model)
    texts = _read_texts(source, arguments)
    for path in arguments.bundles:
        check_calibration(path.name, inspect_model(path).origin, texts.calibration)
    size = sum(param.get_value().size for param in named_weights(source.model).values())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, ProgressBar() as progress:
        dense = Path(scratch) / "dense.gguf"
        export_gguf(dense, source, dtype="f32")
        llama = open_llama(dense, arguments.window)
        pairs = cut_text(llama, source.tokenizer, texts.heldout, arguments.window)
        most = 4 if arguments.quick else arguments.chunks
        pairs = choose_chunks(pairs, most, texts.calibration)
        if len(pairs) < most:
            say(f"{len(pairs)} chunks are left of the {most} that were asked for: others stand in the calibration text")

        dense_of: dict[str, Metric] = {}

        def note(
            name: str, side: str, held: int, found: Metric, rounded: Metric | None = None, recipe: str | None = None
        ) -> None:
            # Of the same tokens, one by one: that some of them are hard is no error of the ratio.
            ratio = compare(dense_of.setdefault(side, found), found)
            rows.append(
                {
                    "dense": arguments.model.name,
                    "model": name,
                    "side": side,
                    "recipe": recipe,
                    "bytes": held,
                    "bits_per_weight": 8 * held / size,
                    "perplexity": found.value,
                    "standard_error": found.standard_error,
                    "ratio": ratio.value,
                    "ratio_standard_error": ratio.standard_error,
                    "rounded": None if rounded is None else rounded.value,
                    "n": found.n,
                }
            )
            say(f"{side:9} {name:24} {held / 1e6:8.2f} MB {8 * held / size:6.3f} bits {found.value:10.4f}")

        note("F32", "llama.cpp", _count_bytes(dense), measure_llama(llama, pairs, progress, "llama.cpp F32"))
        del llama
        note("dense", "hsai", _count_weights(source), measure_ours(source.model, pairs, progress, "dense"))
        for path in arguments.bundles:
            bundle, name = open_model(path), path.name
            found = measure_ours(bundle.model, pairs, progress, name)
            inexact = rounded = None
            with contextlib.suppress(InputError):  # no weight of integers
                inexact = take_activations(bundle.model, "int8")
            if inexact is not None:
                rounded = measure_ours(inexact, pairs, progress, f"{name}, activations of 8 bits")
            note(name, "hsai", _count_weights(bundle), found, rounded, bundle.origin.get("recipe_name"))
        for kind, path in _quantize_all(source, dense, kinds, texts.calibration, Path(scratch)):
            found = measure_llama(open_llama(path, arguments.window), pairs, progress, kind)
            note(kind, "llama.cpp", _count_bytes(path), found)
            path.unlink()
    if arguments.json is not None:
        machine = describe_machine() | {"command": shlex.join(["python", *sys.argv])}
        names = {"calibration": texts.calibration_name, "text": texts.heldout_name, "tokens_sha256": digest(pairs)}
        write_json_atomic(arguments.json, {"machine": machine, **names, "frontier": rows})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """What is calibrated on, and what is measured on."""

    calibration: np.ndarray
    """Token ids."""

    calibration_name: str
    heldout: str
    heldout_name: str


def _read_kind(text: str) -> str:
    """For argparse, which shows only errors of its own."""
    try:
        return read_kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _read_texts(source: ModelSource, arguments: argparse.Namespace) -> Texts:
    """The files that are named, else the splits of the model's own corpus."""
    own = None
    if arguments.calibration is None or arguments.text is None:
        own = open_own_corpus(source, None, "--calibration and --text")
    if arguments.calibration is not None:
        stream = np.asarray(source.tokenizer.encode(read_text(arguments.calibration)), np.int32)
        calibration, calibration_name = stream, arguments.calibration.name
    else:
        assert own is not None
        calibration, calibration_name = np.asarray(own.train), "the training text"
    if arguments.text is not None:
        heldout, heldout_name = read_text(arguments.text), arguments.text.name
    else:
        assert own is not None
        heldout, heldout_name = own.tokenizer.decode(own.heldout), "the held-out text"
    return Texts(calibration=calibration, calibration_name=calibration_name, heldout=heldout, heldout_name=heldout_name)


def _quantize_all(
    source: ModelSource, dense: Path, kinds: Sequence[str], calibration: np.ndarray, scratch: Path
) -> Iterator[tuple[str, Path]]:
    """Each kind's file, for as long as the next one is not asked for."""
    config = CalibrationConfig()
    importance = measure_importance(source.model, draw_windows(calibration, config), batch=config.batch)
    for kind in kinds:
        path = scratch / f"{kind.replace('/', '-')}.gguf"
        quantize(dense, path, kind, importance)
        yield kind, path


def _count_weights(source: ModelSource) -> int:
    return sum(nbytes(param.get_value()) for param in named_weights(source.model).values())


def _count_bytes(path: Path) -> int:
    """Of all tensors of a GGUF file."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


if __name__ == "__main__":
    main()
