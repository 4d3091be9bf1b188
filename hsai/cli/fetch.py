"""Fetch a model or task data by name into a cache, verified, and print where it lies.

hsai fetch smollm2-135m
hsai fetch hf:HuggingFaceTB/SmolLM2-135M-Instruct
What is there already is verified and not fetched again. An interrupted download starts again, and is never half used.
"""

from pathlib import Path

from hsai.cli.parser import Parser
from hsai.cli.places import check_place, no_empty_directories
from hsai.fetch import CATALOG, default_cache, fetch
from hsai.fetch.hub import PREFIX
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
    """Fetches, and prints the path alone on stdout's last line."""
    arguments = parser.parse(argv)
    if arguments.cache is not None:
        check_place(arguments.cache, "--cache")
    with no_empty_directories([arguments.cache] if arguments.cache else []), ProgressBar() as progress:
        path = fetch(arguments.name, cache=arguments.cache, progress=progress)
    print(path)
