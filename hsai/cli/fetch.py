"""Fetch a model or task data by name into a cache, verified, and print where it lies.

hsai fetch smollm2-135m
hsai fetch wikipedia
hsai fetch hf:HuggingFaceTB/SmolLM2-135M-Instruct
A model of the catalog is imported as a bundle, and the bundle's directory is printed; wikipedia is a directory with
train.txt and heldout.txt; of a repository of the hub it is the snapshot, which hsai import, export and eval take as it
is.
What is there already is verified and not fetched again. An interrupted download starts again, and is never half used.
"""

import argparse
import shutil
from pathlib import Path

from hsai.cli.parser import Parser
from hsai.cli.places import check_place, no_empty_directories
from hsai.cli.targets import is_kept
from hsai.export.bundle import write_bundle
from hsai.export.source import inspect_model, open_model
from hsai.fetch import CATALOG, default_cache, fetch
from hsai.fetch.articles import ARTICLES, write_articles
from hsai.fetch.cache import hold
from hsai.fetch.hub import PREFIX
from hsai.interop.gguf import is_gguf
from hsai.progress import ProgressBar

_NAMES = "; ".join(f"{name}: {entry.about}" for name, entry in CATALOG.items())


def add_arguments(parser: Parser) -> None:
    """Those of the command."""
    parser.add_argument(
        "name", help=f"{_NAMES}; {PREFIX}ORG/NAME or {PREFIX}ORG/NAME@REVISION: a repository of the Hugging Face hub"
    )
    cache = f"directory of the cache (default: $XDG_CACHE_HOME/hsai, now {default_cache()}; for {PREFIX} the hub's own)"
    parser.add_argument("--cache", type=Path, metavar="DIR", help=cache.replace("%", "%%"))


def run(parser: Parser, argv: list[str]) -> None:
    """Fetches, imports what is a model in a file, and prints the path alone on stdout's last line."""
    arguments = parser.parse(argv)
    if arguments.cache is not None:
        check_place(arguments.cache, "--cache")
    with no_empty_directories([arguments.cache] if arguments.cache else []), ProgressBar() as progress:
        path = fetch(arguments.name, cache=arguments.cache, progress=progress)
        made = (arguments.cache or default_cache()) / arguments.name
        if is_gguf(path):
            path = _import(path, made.with_name(f"{arguments.name}-bundle"), progress)
        elif path.name.startswith(ARTICLES):
            path = _write_texts(path, made.with_name(f"{arguments.name}-text"), progress)
    print(path)


def _import(path: Path, bundle: Path, progress: ProgressBar) -> Path:
    """The bundle of the model in `path`; what stands there is kept if it is that, and whole."""
    with hold(bundle, progress):
        made = {"source_sha256": inspect_model(path).sha256}
        if not is_kept(bundle, made, argparse.Namespace(reuse=True, overwrite=True)):
            source = open_model(path, progress=lambda done, total: progress("import", done, total))
            shutil.rmtree(bundle, ignore_errors=True)  # an entry of the cache, whatever was left of it
            write_bundle(bundle, source.model, source.tokenizer, extra=source.origin | made, assets=source.assets)
    return bundle


def _write_texts(summaries: Path, directory: Path, progress: ProgressBar) -> Path:
    """The texts of the articles in `summaries`; written again each time, which takes less than comparing them."""
    with hold(directory, progress):
        write_articles(summaries, directory)
    return directory
