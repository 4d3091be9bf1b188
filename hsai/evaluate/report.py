"""Results as a table for people and as JSON for scripts: each number with what it was measured on."""

import collections
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
from rich.table import Table

import hsai
from hsai.data.tokenizer import Tokenizer
from hsai.evaluate.runner import EvaluationConfig, TaskResult
from hsai.formats.storage import describe
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
    formats = collections.Counter(record["format"] for record in describe(model).values())
    return {
        "model": name,
        "weights": dict(sorted(formats.items())),
        "dtype": model.config.dtype,
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
            for metric in result.metrics
        },
        "few_shot": result.few_shot,
        "limit": config.limit,
        "seed": config.seed,
        **result.settings,
        "scored_tokens": result.scored_tokens,
        "seconds": round(result.seconds, 1),
    }


def make_table(reports: Sequence[dict[str, Any]]) -> Table:
    """A row a metric and a column a model; the subjects of MMLU are left to the JSON, unless asked for by name.

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
            cells = [_write_number(task["metrics"][name]) if name in task["metrics"] else "-" for task in tasks]
            table.add_row(tasks[0]["task"], str(tasks[0]["few_shot"]), str(any_found["n"]), name, *cells)
    return table


def _write_number(metric: dict[str, Any]) -> str:
    error = metric["standard_error"]
    return f"{metric['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")
