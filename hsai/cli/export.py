"""Write a model for where it is to run: a bundle with StableHLO graphs, a checkpoint of transformers, or a GGUF file.

hsai export runs/quickstart/int4 --out bundles/int4
hsai export runs/quickstart --to huggingface --out checkpoints/quickstart
hsai export runs/quickstart --to gguf --gguf-type q8_0 --out quickstart.gguf
Of several models each gets a directory (or file) of its name under --out.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from hsai.cli.parser import Parser
from hsai.cli.places import no_empty_directories
from hsai.cli.sizes import parse_size
from hsai.cli.targets import check_file, check_targets, is_kept
from hsai.configuration import to_dict
from hsai.errors import InputError
from hsai.export.bundle import write_bundle
from hsai.export.checkpoint import export_checkpoint
from hsai.export.gguf import export_gguf
from hsai.export.source import ModelRecord, inspect_model, open_model
from hsai.export.stablehlo import GraphConfig
from hsai.export.targets import TARGETS
from hsai.formats import Activations, take_activations
from hsai.interop.gguf import SUFFIX, is_gguf
from hsai.interop.gguf_write import GgufType
from hsai.interop.huggingface import CONFIG, SHARD_BYTES
from hsai.models import CacheFormat
from hsai.progress import ProgressBar, say

ONLY = {
    "bundle": ("prefill_buckets", "cache", "activations", "stablehlo_version", "kernels", "reuse"),
    "huggingface": ("dtype", "shard_size", "dequantize"),
    "gguf": ("gguf_type", "dequantize"),
}
"""What a model can be exported to, and the options that are for it."""


def add_arguments(parser: Parser) -> None:
    """Those of the command."""
    parser.add_argument("model", type=Path, nargs="+", help="runs, bundles, checkpoints of transformers, or GGUF files")
    parser.add_argument("--out", required=True, type=Path, help="directory, or GGUF file, to be made")
    parser.add_argument("--to", choices=tuple(ONLY), default="bundle", help="what is made (default: bundle)")
    parser.add_argument(
        "--prefill-buckets", type=int, nargs="+", help="bundle: prompt lengths that graphs are made for"
    )
    parser.add_argument(
        "--cache",
        choices=get_args(CacheFormat),
        help="bundle: how graphs store keys and values: in the activations' dtype (default), bfloat16, int8, or int4",
    )
    parser.add_argument(
        "--activations",
        choices=get_args(Activations),
        help="bundle: what weights of integers are multiplied by: as it is (default), or rounded to int8",
    )
    parser.add_argument(
        "--stablehlo-version", help="bundle: of the portable graphs, such as 1.0.0 for older runtimes (default: jax's)"
    )
    parser.add_argument(
        "--kernels", nargs="+", choices=tuple(TARGETS), help="bundle: targets of further graphs, with hsai's kernels"
    )
    parser.add_argument("--reuse", action="store_true", help="bundle: keep what was exported of the same weights")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="huggingface: of the tensors (default: as they are)"
    )
    parser.add_argument("--shard-size", help="huggingface: size of a file, such as 500MB (default: 5GB)")
    parser.add_argument(
        "--dequantize", action="store_true", help="huggingface, gguf: write packed weights as dense ones"
    )
    parser.add_argument("--gguf-type", choices=get_args(GgufType), help="gguf: of the matrices (default: f16)")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands there, once the new one is whole")


def run(parser: Parser, argv: list[str]) -> None:
    """Checks every model and directory first, then exports one model after the other."""
    arguments = parser.parse(argv)
    _check_options(arguments)
    many = len(arguments.model) > 1
    suffix = SUFFIX if arguments.to == "gguf" else ""
    names = [model.resolve().stem if is_gguf(model) else model.resolve().name for model in arguments.model]
    targets = [arguments.out / f"{name}{suffix}" if many else arguments.out for name in names]
    if len(set(targets)) < len(targets):
        raise InputError(f"models {' '.join(map(str, arguments.model))} share a name; export them one by one")
    if arguments.to == "bundle":
        _export_bundles(arguments, targets)
    elif arguments.to == "huggingface":
        _export_checkpoints(arguments, targets)
    else:
        _export_gguf(arguments, targets)


def _export_bundles(arguments: argparse.Namespace, targets: Sequence[Path]) -> None:
    buckets = arguments.prefill_buckets
    graphs = GraphConfig(
        cache=arguments.cache or "activations",
        stablehlo_version=arguments.stablehlo_version,
        kernels=tuple(arguments.kernels or ()),
    )
    if buckets is not None:
        graphs = dataclasses.replace(graphs, prefill_buckets=tuple(buckets))
    check_targets(targets, arguments)
    records = [inspect_model(model) for model in arguments.model]
    for record in records:
        _check_buckets(buckets or (), record)
    activations: Activations = arguments.activations or "float"
    what = {"graphs": to_dict(graphs), "activations": activations}
    made = [{"source_sha256": record.sha256} | what for record in records]
    kept = [is_kept(target, wanted, arguments) for target, wanted in zip(targets, made, strict=True)]
    with no_empty_directories(targets), ProgressBar() as progress:
        for index, target in enumerate(targets):
            progress("export", index, len(targets), str(target))
            if kept[index]:
                say(f"reusing {target}")
            else:
                source = open_model(arguments.model[index])
                write_bundle(
                    target,
                    take_activations(source.model, activations),
                    source.tokenizer,
                    graphs=graphs,
                    extra=source.origin | {"source_sha256": source.sha256} | what,
                    assets=source.assets,
                    overwrite=arguments.overwrite,
                )
            progress("export", index + 1, len(targets), str(target))
    say(f"bundles: {' '.join(map(str, targets))}")


def _export_checkpoints(arguments: argparse.Namespace, targets: Sequence[Path]) -> None:
    shard_bytes = SHARD_BYTES if arguments.shard_size is None else parse_size(arguments.shard_size, "--shard-size")
    check_targets(targets, arguments, holding=CONFIG)
    for model in arguments.model:
        inspect_model(model)  # a mistyped name is told before the first model is exported
    with no_empty_directories(targets), ProgressBar() as progress:
        for model, target in zip(arguments.model, targets, strict=True):
            family = export_checkpoint(
                target,
                open_model(model),
                dtype=arguments.dtype,
                shard_bytes=shard_bytes,
                dequantize=arguments.dequantize,
                overwrite=arguments.overwrite,
                progress=functools.partial(_report, progress, target),
            )
            say(f"wrote {target}, a {family.architecture}")


def _export_gguf(arguments: argparse.Namespace, targets: Sequence[Path]) -> None:
    for target in targets:
        check_file(target, overwrite=arguments.overwrite)
    for model in arguments.model:
        inspect_model(model)
    parents = [target.parent for target in targets]
    with no_empty_directories(parents), ProgressBar() as progress:
        for model, target in zip(arguments.model, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            record = export_gguf(
                target,
                open_model(model),
                dtype=arguments.gguf_type or "f16",
                dequantize=arguments.dequantize,
                progress=functools.partial(_report, progress, target),
            )
            if record.fallbacks:
                count, first = len(record.fallbacks), record.fallbacks[0]
                say(f"{count} tensors are f16: their rows are no whole blocks of {arguments.gguf_type} ({first}, ...)")
            if record.ignores_window:
                say("llama.cpp knows no window of this architecture: beyond it, it computes something else")
            say(f"wrote {target}, a {record.architecture}")


def _report(progress: ProgressBar, target: Path, done: int, total: int) -> None:
    progress("export", done, total, str(target))


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuses an option that would have no effect on what is made."""
    for name in dict.fromkeys(name for names in ONLY.values() for name in names):
        kinds = [kind for kind, names in ONLY.items() if name in names]
        if arguments.to not in kinds and getattr(arguments, name):
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is for --to {' or '.join(kinds)}, and this is --to {arguments.to}")


def _check_buckets(buckets: Sequence[int], record: ModelRecord) -> None:
    """Refuses sizes that were asked for and could not be had; the default ones are cut to the context."""
    for bucket in buckets:
        if bucket > record.config.max_length:
            raise InputError(
                f"--prefill-buckets {bucket} exceeds the context of {record.directory}, {record.config.max_length}"
            )
