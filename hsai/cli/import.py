"""Take a model from elsewhere: a checkpoint of transformers or a GGUF file in, a bundle (without graphs) out.

Weights go from file to file, a tensor at a time, so that a model need not fit the memory of the machine.

hsai import checkpoints/SmolLM2-135M bundles/smollm2
hsai import SmolLM2-135M-Instruct.Q4_1.gguf bundles/smollm2
hsai export then writes the bundle with graphs, or as another checkpoint.
"""

from pathlib import Path

from hsai.cli.parser import Parser
from hsai.cli.places import no_empty_directories
from hsai.cli.targets import check_targets, is_kept
from hsai.export.bundle import import_bundle
from hsai.export.source import open_foreign
from hsai.progress import ProgressBar, say


def add_arguments(parser: Parser) -> None:
    """Those of the command."""
    parser.add_argument("model", type=Path, help="directory with config.json and safetensors, or GGUF file")
    parser.add_argument("out", type=Path, help="directory of the bundle to be made")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of stored weights (default: the one that rounds none)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what stands there, once the new one is whole")
    parser.add_argument("--reuse", action="store_true", help="keep what was imported of the same weights")


def run(parser: Parser, argv: list[str]) -> None:
    """Checks both places first; the weights are read when all else is known to fit."""
    arguments = parser.parse(argv)
    check_targets([arguments.out], arguments, option="OUT")
    source = open_foreign(arguments.model)
    made = {"source_sha256": source.sha256, "dtype": arguments.dtype}
    if is_kept(arguments.out, made, arguments):
        say(f"reusing {arguments.out}")
        return
    with no_empty_directories([arguments.out]), ProgressBar() as progress:
        import_bundle(
            arguments.out,
            source.checkpoint,
            source.tokenizer,
            dtype=arguments.dtype,
            extra=source.origin | made,
            assets=source.assets,
            overwrite=arguments.overwrite,
            progress=lambda done, total: progress("import", done, total),
        )
    say(f"wrote {arguments.out}")
