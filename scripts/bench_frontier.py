#!/usr/bin/env python
"""Perplexity against bytes: bundles that `hsai compress` made beside llama.cpp's quantizations of the same model.

    python scripts/bench_frontier.py MODEL BUNDLE ... [--calibration TEXT --text HELDOUT]
        [--kinds Q4_K_M IQ2_XS/IQ4_NL ...] [--chunks 32] [--window 512] [--json FILE [--resume]] [--quick]

MODEL is the dense one (what `hsai compress` takes). llama.cpp quantizes it, written as float32, with an importance
matrix of the calibration text, and measures its own files; hsai measures MODEL and each BUNDLE. A kind is what
llama-quantize calls so, by itself or with the kind of its table behind a slash. All read the same chunks of the
held-out text, spread evenly over it. Without texts they are those of the corpus that MODEL was trained on, as for
`hsai compress`. llama.cpp multiplies by quantized weights with activations of 8 bits; hsai is measured with float32
ones and, where a bundle's weights are of integers, with those of 8 bits as well. A bundle that was calibrated on
another text is refused; llama.cpp's matrix is of the same windows as the bundles', and where they saw different ones of
the largest calibration among them: rows say how many tokens each saw. Chunks that stand in the calibration text are
left out. Ratios to the dense model are of each side's own, with the standard error of the differences, token by token.
Bytes are those of all weights, norm gains included; --quick takes 4 chunks and one kind.
FILE is written line by line. With --resume, the same command of the same hsai leaves the lines that are in it, but for
those of the dense model, without whose losses there are no ratios, and of bundles that have changed.
Needs llama-cpp-python: pip install '.[peers]'.
"""

import argparse
import contextlib
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench.frontier_record import (
    NOTHING,
    FrontierRecord,
    Row,
    choose_calibration,
    choose_chunks,
    describe_bundle,
    digest,
    list_calibrations,
)
from bench.llama_quantize import KINDS, measure_importance, quantize, read_kind
from bench.perplexities import cut_text, measure_llama, measure_ours, open_llama

from hsai.cli.corpora import open_own_corpus
from hsai.compress.calibration import CalibrationConfig, draw_windows
from hsai.configuration import to_dict
from hsai.errors import InputError
from hsai.evaluate.metrics import Metric, compare
from hsai.evaluate.perplexity import read_text
from hsai.export.gguf import export_gguf
from hsai.export.source import ModelSource, inspect_model, open_model
from hsai.formats import nbytes
from hsai.formats.activations import take_activations
from hsai.formats.storage import named_weights
from hsai.machine import describe_machine, digest_sources
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
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    try:
        _measure(arguments)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


def _measure(arguments: argparse.Namespace) -> None:
    if arguments.resume and arguments.json is None:
        raise InputError("--resume goes on with the record of --json FILE; give one")
    kinds = arguments.kinds[:1] if arguments.quick else arguments.kinds
    source = open_model(arguments.model)
    texts = _read_texts(source, arguments)
    abouts, calibrations = _inspect(arguments.bundles, texts.calibration)
    config = choose_calibration(calibrations)
    windows = draw_windows(texts.calibration, config) if kinds else None
    size = sum(param.get_value().size for param in named_weights(source.model).values())
    with tempfile.TemporaryDirectory() as scratch, ProgressBar() as progress:
        dense = Path(scratch) / "dense.gguf"
        export_gguf(dense, source, dtype="f32")
        llama = open_llama(dense, arguments.window)
        pairs = cut_text(llama, source.tokenizer, texts.heldout, arguments.window)
        most = 4 if arguments.quick else arguments.chunks
        pairs = choose_chunks(pairs, most, texts.calibration)
        if len(pairs) < most:
            say(f"{len(pairs)} chunks are left of the {most} that were asked for: others stand in the calibration text")
        words = [word for word in sys.argv if word != "--resume"]
        header = {
            "machine": describe_machine() | {"command": shlex.join(["python", *words])},
            "calibration": texts.calibration_name,
            "importance": to_dict(config) if kinds else None,
            "text": texts.heldout_name,
            "tokens_sha256": digest(pairs),
            "dense_sha256": source.sha256,
            "sources_sha256": digest_sources(),
        }
        known = {name: about["sha256"] for name, about in abouts.items()}
        record = FrontierRecord(arguments.json, header, resumed=arguments.resume, sha256=known)
        dense_of: dict[str, Metric] = {}

        def note(
            name: str, side: str, held: int, found: Metric, about: Row = NOTHING, rounded: Metric | None = None
        ) -> None:
            # Of the same tokens, one by one: that some of them are hard is no error of the ratio.
            ratio = compare(dense_of.setdefault(side, found), found)
            numbers = {
                "dense": arguments.model.name,
                "model": name,
                "side": side,
                "bytes": held,
                "bits_per_weight": 8 * held / size,
                "perplexity": found.value,
                "standard_error": found.standard_error,
                "ratio": ratio.value,
                "ratio_standard_error": ratio.standard_error,
                "rounded": None if rounded is None else rounded.value,
                "n": found.n,
            }
            record.add(numbers | about)
            tell(numbers | about)

        def tell(row: Row) -> None:
            line = f"{row['side']:9} {row['model']:24} {row['bytes'] / 1e6:8.2f} MB {row['bits_per_weight']:6.3f} bits"
            line += f" {row['perplexity']:10.4f}"
            line += f", {row['calibration_tokens']:,} tokens of calibration" if row["calibration_tokens"] else ""
            line += f", made at {row['commit']} on {row['date']}" if row["commit"] else ""
            say(line)

        def is_kept(name: str, side: str) -> bool:
            row = record.find(name, side)
            if row is not None:
                tell(row)
            return row is not None

        note("F32", "llama.cpp", _count_bytes(dense), measure_llama(llama, pairs, progress, "llama.cpp F32"))
        del llama
        note("dense", "hsai", _count_weights(source), measure_ours(source.model, pairs, progress, "dense"))
        for path in arguments.bundles:
            name = path.name
            if is_kept(name, "hsai"):
                continue
            bundle = open_model(path)
            found = measure_ours(bundle.model, pairs, progress, name)
            inexact = rounded = None
            with contextlib.suppress(InputError):  # no weight of integers
                inexact = take_activations(bundle.model, "int8")
            if inexact is not None:
                rounded = measure_ours(inexact, pairs, progress, f"{name}, activations of 8 bits")
            note(name, "hsai", _count_weights(bundle), found, abouts[name], rounded)
        left = [kind for kind in kinds if not is_kept(kind, "llama.cpp")]
        importance = {}
        if left and windows is not None:
            importance = measure_importance(source.model, windows, batch=config.batch)
        for kind in left:
            path = Path(scratch) / f"{kind.replace('/', '-')}.gguf"
            quantize(dense, path, kind, importance)
            found = measure_llama(open_llama(path, arguments.window), pairs, progress, kind)
            note(kind, "llama.cpp", _count_bytes(path), found, NOTHING | {"calibration_tokens": config.tokens})
            path.unlink()
        record.close()


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


def _inspect(paths: Sequence[Path], stream: np.ndarray) -> tuple[dict[str, Row], list[CalibrationConfig]]:
    """What rows say of bundles, by their names, and what all of them were calibrated on.

    Raises:
      InputError: two have one name, or one was calibrated on another text.
    """
    abouts: dict[str, Row] = {}
    calibrations: list[CalibrationConfig] = []
    for path in paths:
        if path.name in ("dense", *abouts):
            raise InputError(f"{path}: rows have the names of bundles, and {path.name} is another's; rename it")
        found = inspect_model(path)
        own = list_calibrations(path.name, found.origin, stream)
        abouts[path.name] = describe_bundle(found, own)
        calibrations += own
    return abouts, calibrations


def _count_weights(source: ModelSource) -> int:
    return sum(nbytes(param.get_value()) for param in named_weights(source.model).values())


def _count_bytes(path: Path) -> int:
    """Of all tensors of a GGUF file."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


if __name__ == "__main__":
    main()
