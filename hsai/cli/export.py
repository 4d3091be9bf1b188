"""Write a model as a bundle: weights, tokenizer, and StableHLO graphs for prefill and decoding.

hsai export runs/quickstart/int4 --out bundles/int4
Of several models each gets a directory of its name under --out.
"""

from collections.abc import Sequence
from pathlib import Path

from hsai.cli.parser import Parser
from hsai.cli.places import no_empty_directories
from hsai.cli.targets import check_targets, is_kept
from hsai.configuration import to_dict
from hsai.errors import InputError
from hsai.export.bundle import write_bundle
from hsai.export.source import ModelRecord, inspect_model, open_model
from hsai.export.stablehlo import GraphConfig
from hsai.progress import ProgressBar, say


def add_arguments(parser: Parser) -> None:
    """Those of the command."""
    parser.add_argument("model", type=Path, nargs="+", help="directories of runs or bundles")
    parser.add_argument("--out", required=True, type=Path, help="directory to be made")
    parser.add_argument("--prefill-buckets", type=int, nargs="+", help="prompt lengths that graphs are made for")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands there, once the new one is whole")
    parser.add_argument("--reuse", action="store_true", help="keep what was exported of the same weights")


def run(parser: Parser, argv: list[str]) -> None:
    """Checks every model and directory first, then exports one model after the other."""
    arguments = parser.parse(argv)
    many = len(arguments.model) > 1
    targets = [arguments.out / model.resolve().name if many else arguments.out for model in arguments.model]
    if len(set(targets)) < len(targets):
        raise InputError(f"models {' '.join(map(str, arguments.model))} share a name; export them one by one")
    buckets = arguments.prefill_buckets
    graphs = GraphConfig() if buckets is None else GraphConfig(prefill_buckets=tuple(buckets))
    check_targets(targets, arguments)
    records = [inspect_model(model) for model in arguments.model]
    for record in records:
        _check_buckets(buckets or (), record)
    made = [{"source_sha256": record.sha256, "graphs": to_dict(graphs)} for record in records]
    kept = [is_kept(target, wanted, arguments) for target, wanted in zip(targets, made, strict=True)]
    with no_empty_directories(targets), ProgressBar() as progress:
        for index, target in enumerate(targets):
            progress("export", index, len(targets), str(target))
            if kept[index]:
                say(f"reusing {target}")
            else:
                source = open_model(arguments.model[index])
                extra = source.origin | {"source_sha256": source.sha256, "graphs": to_dict(graphs)}
                overwrite = arguments.overwrite
                write_bundle(
                    target,
                    source.model,
                    source.tokenizer,
                    assets=source.assets,
                    graphs=graphs,
                    extra=extra,
                    overwrite=overwrite,
                )
            progress("export", index + 1, len(targets), str(target))
    say(f"bundles: {' '.join(map(str, targets))}")


def _check_buckets(buckets: Sequence[int], record: ModelRecord) -> None:
    """Refuses sizes that were asked for and could not be had; the default ones are cut to the context."""
    for bucket in buckets:
        if bucket > record.config.max_length:
            raise InputError(
                f"--prefill-buckets {bucket} exceeds the context of {record.directory}, {record.config.max_length}"
            )
