"""Results as a table for people and as JSON for scripts: each number with what it was measured on."""

import collections
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
from rich.table import Table

import hsai
from hsai.data.tokenizer import Tokenizer
from hsai.evaluate.metrics import Metric
from hsai.evaluate.runner import EvaluationConfig, TaskResult
from hsai.formats import find_activations
from hsai.formats.storage import ROUNDED, describe
from hsai.machine import find_commit
from hsai.models import CacheFormat, Transformer


def describe_evaluation(
    name: str,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    batch_tokens: int,
    mesh: jax.sharding.Mesh | None,
    kv_cache: CacheFormat = "activations",
) -> dict[str, Any]:
    """What the results of one model share, as JSON."""
    records = describe(model).values()
    formats = collections.Counter(
        record["base"]["format"] if record["format"] == ROUNDED else record["format"] for record in records
    )
    return {
        "model": name,
        "weights": dict(sorted(formats.items())),
        "dtype": model.config.dtype,
        "activations": find_activations(model),
        "tokenizer": {
            "tokens": tokenizer.vocab_size,
            "sha256": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
        },
        "batch_tokens": batch_tokens,
        "mesh": None if mesh is None else dict(mesh.shape),
        "kv_cache": kv_cache,
        "hsai": hsai.__version__,
        "commit": find_commit(),
    }


def describe_result(result: TaskResult, config: EvaluationConfig) -> dict[str, Any]:
    """One task's numbers, as JSON."""
    return {
        "task": result.task,
        "part_of": result.part_of,
        "metrics": {
            metric.name: {"value": metric.value, "standard_error": metric.standard_error, "n": metric.n}
            | _describe_change(result.changes.get(metric.name))
            for metric in result.metrics
        },
        "few_shot": result.few_shot,
        "limit": config.limit,
        "seed": config.seed,
        **result.settings,
        "scored_tokens": result.scored_tokens,
        "seconds": round(result.seconds, 1),
    }


def _describe_change(change: Metric | None) -> dict[str, Any]:
    """ "difference" or "ratio" to the first model, and the same with "_standard_error"."""
    if change is None:
        return {}
    return {change.name: change.value, f"{change.name}_standard_error": change.standard_error}


def make_table(reports: Sequence[dict[str, Any]]) -> Table:
    """A row a metric and a column a model, with changes to the first model below values; the subjects of MMLU are left
    to the JSON, unless asked for by name.

    Args:
      reports: of each model, `describe_evaluation` with the tasks' `describe_result` as "tasks".
    """
    table = Table()
    for name in ("task", "few-shot", "n", "metric"):
        table.add_column(name, justify="right" if name in ("few-shot", "n") else "left", no_wrap=True)
    for report in reports:
        table.add_column(report["model"], justify="right", no_wrap=True)
    for tasks in zip(*(report["tasks"] for report in reports), strict=True):
        if tasks[0]["part_of"]:
            continue
        # What is measured against the first model, the others have alone.
        for name, any_found in {name: found for task in tasks for name, found in task["metrics"].items()}.items():
            found = [task["metrics"].get(name) for task in tasks]
            cells = ["-" if each is None else f"{write_value(each)}\n{write_change(each)}".strip() for each in found]
            table.add_row(tasks[0]["task"], str(tasks[0]["few_shot"]), str(any_found["n"]), name, *cells)
    return table


def write_value(metric: dict[str, Any]) -> str:
    """A metric of `describe_result`: "0.4210 ± 0.0101"."""
    return f"{metric['value']:.4f}{_write_error(metric['standard_error'])}"


def write_change(metric: dict[str, Any]) -> str:
    """What it is to the first model's: "-0.0120 ± 0.0031", "1.0310x ± 0.0024"; nothing where it is not compared."""
    if "ratio" in metric:
        return f"{metric['ratio']:.4f}x{_write_error(metric['ratio_standard_error'])}"
    if "difference" in metric:
        return f"{metric['difference']:+.4f}{_write_error(metric['difference_standard_error'])}"
    return ""


def _write_error(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"
