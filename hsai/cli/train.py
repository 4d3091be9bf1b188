"""Train a config, or resume it: run the same command again.

Every field of the config is an option: hsai train configs/tiny.py --optim.learning-rate 1e-3 --train.steps 50
hsai train CONFIG --help lists them all.
"""

import difflib
import hashlib
import json
from pathlib import Path

import jax

from hsai.cli.parser import Parser, is_option
from hsai.cli.places import check_place, no_empty_directories
from hsai.config import RunConfig
from hsai.config_file import Loaded, load_config
from hsai.configuration import difference, to_dict
from hsai.data.corpus import content_fields
from hsai.data.corpus_files import META, open_corpus
from hsai.devices import prepare_devices
from hsai.errors import InputError
from hsai.export.source import open_model
from hsai.files import write_json_atomic
from hsai.overrides import list_options, parse_overrides
from hsai.processes import agree
from hsai.progress import say
from hsai.train.checkpoint import LOCK, RUN_FILES
from hsai.train.loop import train
from hsai.train.plot import plot_loss

DIRECTORY = "directory of the run: checkpoints, metrics, curves (default: runs/<name of the config>)"
DATA_DIRECTORY = "directory of the corpus, which is built if it is not there (default: runs/data/<source>-<hash>)"


HELP = f"""Train a config, or resume it: run the same command again.

Every field of the config is an option, and they follow below. Two more belong to the command:

--directory PATH: {DIRECTORY}

--data-directory PATH: {DATA_DIRECTORY}"""


def add_arguments(parser: Parser) -> None:
    """Those of the command itself; the config's fields come on top."""
    parser.add_argument("config", metavar="CONFIG", help="a Python file with get_config() -> RunConfig")
    parser.add_argument("--directory", type=Path, metavar="PATH", help=DIRECTORY)
    parser.add_argument("--data-directory", type=Path, metavar="PATH", help=DATA_DIRECTORY)


def run(parser: Parser, argv: list[str]) -> None:
    """Loads the config, says how it differs from its parent, trains, and draws the loss."""
    if argv[:1] in (["-h"], ["--help"]):
        parser.print_help()
        return
    if argv and is_option(argv[0]) and argv[0].partition("=")[0] not in parser.options:
        raise InputError(f"{argv[0]} stands where the config should; give that first: hsai train CONFIG {argv[0]} ...")
    arguments, rest = parser.parse_known_args(argv)
    loaded = load_config(arguments.config, RunConfig)
    _check_own(parser, rest, loaded.config)
    config = parse_overrides(loaded.config, rest, prog=f"hsai train {arguments.config}", description=HELP)
    directory = arguments.directory or Path("runs") / Path(arguments.config).stem
    data_directory = arguments.data_directory or default_data_directory(config)
    _check_directory(directory, data_directory)
    with no_empty_directories((directory, data_directory)):
        _train(loaded, config, arguments.config, directory, data_directory)


def _check_own(parser: Parser, rest: list[str], config: RunConfig) -> None:
    """Refuses a mistyped option that is nearer to one of the command itself than to any field of the config."""
    fields = [f"--{name}" for name in list_options(type(config), to_dict(config))]
    for token in filter(is_option, rest):
        name = token.partition("=")[0].replace("_", "-")
        near = difflib.get_close_matches(name, [*fields, *parser.options], n=1)
        if near and near[0] in parser.options:
            raise InputError(f"unknown option {token}; did you mean {near[0]}?")


def _check_directory(directory: Path, data_directory: Path) -> None:
    """Refuses places that cannot be written to, and bundles and corpora: the run would replace their tokenizer."""
    check_place(directory, "--directory")
    check_place(data_directory, "--data-directory")
    for name, kind in (("manifest.json", "a bundle"), ("meta.json", "a corpus")):
        if (directory / name).exists():
            raise InputError(f"--directory {directory} holds {kind}; give a new directory, or one of the same run")
    if not (directory / LOCK).exists():  # every run makes it first, and leaves it
        for name in RUN_FILES:
            if (directory / name).exists():
                raise InputError(f"--directory {directory} holds a {name} that no run made; give a new directory")
    if directory.resolve() == data_directory.resolve():
        raise InputError(f"--directory and --data-directory are both {directory}; give each one of its own")


def _train(loaded: Loaded[RunConfig], config: RunConfig, path: str, directory: Path, data_directory: Path) -> None:
    prepare_devices(config.mesh)

    parent = "" if loaded.parent is None else f" to its parent {loaded.parent_name}"
    changes = difference(config, loaded.parent or loaded.config)
    say(f"config {path}" + (f", with these changes{parent}:" if changes else ""))
    for change in changes:
        say(f"  {change}")
    first = jax.process_index() == 0
    agree(lambda: _verify_corpus(data_directory) if first else None)
    result = train(config, directory, data_directory, open_model)
    if result.started_at == config.train.steps and (directory / "result.json").exists():
        say(f"{directory} was trained to its last step before; nothing to do")
    elif first:
        write_json_atomic(directory / "config.json", to_dict(config))
        quality = result.quality
        write_json_atomic(
            directory / "result.json",
            {
                "step": config.train.steps,
                "heldout_bits_per_byte": quality.bits_per_byte,
                "heldout_loss": quality.loss,
                "heldout_tokens": quality.tokens,
                "config": to_dict(config),
            },
        )
        plot_loss(directory / "metrics.jsonl", directory / "loss.png", title=Path(path).stem)
    say(f"held-out: {result.quality.bits_per_byte:.4f} bits/byte over {result.quality.tokens} tokens")
    say(f"in {directory}: checkpoints, metrics.jsonl, tensorboard and the loss curve loss.png")


def _verify_corpus(directory: Path) -> None:
    """Reads all of a corpus that was built before: altered tokens would go into the weights unseen."""
    if (directory / META).exists():
        open_corpus(directory, verify=True)


def default_data_directory(config: RunConfig) -> Path:
    """runs/data/<source>-<hash of what decides its content>: configs with the same text and words share a corpus."""
    content = content_fields(config.data)
    if config.data.vocab_size is None:
        content["tokenizer"] = str(config.train.initialize_from)
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
    name = "".join(c if c.isalnum() or c in "_-" else "_" for c in Path(config.data.source).name) or "text"
    return Path("runs") / "data" / f"{name}-{digest}"
