"""The part of `hsai eval` that measures benchmarks: its options, and one model's results."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from jax.sharding import Mesh

from hsai.cli.meshes import read_mesh
from hsai.cli.parser import Parser
from hsai.errors import InputError
from hsai.evaluate import EvaluationConfig, Scorer, evaluate_tasks
from hsai.evaluate.divergence import Reference
from hsai.evaluate.fewshot import SEED
from hsai.evaluate.report import describe_evaluation, describe_result
from hsai.evaluate.runner import NAMES
from hsai.export.source import ModelSource
from hsai.fetch.cache import Progress
from hsai.formats import find_activations
from hsai.formats.storage import describe, named_arrays, restore
from hsai.models import CacheFormat, Transformer
from hsai.models.transformer import abstract_transformer

BATCH_TOKENS = 2048
Dtype = Literal["bfloat16", "float32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """What `--tasks` and its companions ask for."""

    config: EvaluationConfig
    dtype: Dtype | None
    batch_tokens: int
    mesh: Mesh | None
    cache: Path | None
    kv_caches: tuple[CacheFormat, ...]
    """How keys and values are stored, one after the other for each model."""


def add_task_arguments(parser: Parser) -> None:
    """--tasks, and what goes with it."""
    names = ",".join((*NAMES, "perplexity:FILE", "perplexity_llamacpp:FILE"))
    parser.add_argument("--tasks", help=f"benchmarks, with commas between them: {names}")
    parser.add_argument(
        "--few-shot", type=int, help="solved examples before each question (default: 5 of mmlu, else 0)"
    )
    parser.add_argument("--limit", type=int, help="only the first documents of each task")
    parser.add_argument("--seed", type=int, help=f"of the draws of examples (default: {SEED}, the harness's)")
    parser.add_argument("--window", type=int, help="of perplexity: tokens that are read together (default: 512)")
    parser.add_argument("--stride", type=int, help="of perplexity: how far windows are apart (default: a whole window)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of activations and products (default: float32 on a CPU, elsewhere the model's own)",
    )
    parser.add_argument("--batch-tokens", type=int, help=f"computed together (default: {BATCH_TOKENS} a device)")
    parser.add_argument("--mesh", help="DATAxFSDPxMODEL, such as 4x1x2 (default: one device); see `hsai train`")
    parser.add_argument("--cache", type=Path, help="directory of the cache (default: $XDG_CACHE_HOME/hsai)")
    parser.add_argument(
        "--kv-cache",
        choices=get_args(CacheFormat),
        nargs="+",
        help="how keys and values are stored before they are read, several to compare (default: activations)",
    )


def plan_tasks(arguments: argparse.Namespace) -> TaskPlan | None:
    """What to do; None without --tasks.

    Raises:
      InputError: an unknown task, a value that cannot be, a mesh that this machine has not, or an option that only
        goes with --tasks and stands alone.
    """
    given = ("few_shot", "limit", "seed", "window", "stride", "dtype", "batch_tokens", "mesh", "cache", "kv_cache")
    if arguments.tasks is None:
        for name in given:
            if getattr(arguments, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} goes with --tasks")
        return None
    config = EvaluationConfig(
        tasks=tuple(name for name in arguments.tasks.split(",") if name),
        few_shot=arguments.few_shot,
        limit=arguments.limit,
        seed=SEED if arguments.seed is None else arguments.seed,
        window=arguments.window,
        stride=arguments.stride,
    )
    mesh = None if arguments.mesh is None else read_mesh(arguments.mesh)
    batch_tokens = (
        BATCH_TOKENS * (mesh.size if mesh else 1) if arguments.batch_tokens is None else arguments.batch_tokens
    )
    if batch_tokens < 1:
        raise InputError(f"--batch-tokens {batch_tokens} must be at least 1")
    dtype: Dtype | None = arguments.dtype
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"  # a CPU has no fast products of bfloat16
    kv_caches = tuple(arguments.kv_cache or ("activations",))
    if len(set(kv_caches)) < len(kv_caches):
        raise InputError(f"--kv-cache {' '.join(kv_caches)} names one twice")
    return TaskPlan(
        config=config,
        dtype=dtype,
        batch_tokens=batch_tokens,
        mesh=mesh,
        cache=arguments.cache,
        kv_caches=kv_caches,
    )


def measure_tasks(
    source: ModelSource,
    plan: TaskPlan,
    reference: Reference | None,
    progress: Progress,
    *,
    kv_cache: CacheFormat = "activations",
) -> tuple[dict[str, Any], Reference]:
    """One model's results with one cache, as JSON, compared on texts with `reference`; and the one to compare the next
    with, by default this one."""
    model = compute_in(source.model, plan.dtype or source.config.dtype)
    scorer = Scorer(model, batch_tokens=plan.batch_tokens, mesh=plan.mesh, cache=kv_cache)
    name = name_row(source, kv_cache)
    about = describe_evaluation(
        name, model, source.tokenizer, batch_tokens=plan.batch_tokens, mesh=plan.mesh, kv_cache=kv_cache
    )
    reference = reference or Reference(scorer, source.tokenizer)
    results = evaluate_tasks(
        scorer, source.tokenizer, plan.config, cache=plan.cache, reference=reference, progress=progress
    )
    return {**about, "tasks": [describe_result(result, plan.config) for result in results]}, reference


def name_row(source: ModelSource, kv_cache: CacheFormat) -> str:
    """What a model with a cache is called in tables: "int4", or "int4, int8 activations, int8 cache"."""
    name = source.directory.name + (", int8 activations" if find_activations(source.model) == "int8" else "")
    return name + ("" if kv_cache == "activations" else f", {kv_cache} cache")


def compute_in(model: Transformer, dtype: Dtype) -> Transformer:
    """`model` with its activations and products in another dtype; the weights are the same arrays."""
    if dtype == model.config.dtype:
        return model
    config = dataclasses.replace(model.config, dtype=dtype)
    return restore(abstract_transformer(config), describe(model), named_arrays(model))
