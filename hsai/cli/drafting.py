"""The words of `hsai generate`, `chat` and `serve` that say who drafts tokens for a model, and how many."""

import argparse

from hsai.cli.parser import Parser
from hsai.errors import InputError
from hsai.export.source import ModelSource
from hsai.infer.speculator import DRAFTS, LOOKUP, MOST_DRAFTS, Drafting, open_drafting


def add_drafting_arguments(parser: Parser) -> None:
    """Those of speculation."""
    parser.add_argument(
        "--speculate",
        metavar=f"{LOOKUP}|MODEL",
        help="draft the next tokens, so that the same text comes sooner: by looking up what followed in the text "
        "before, or by a smaller or sparser model of the same tokenizer",
    )
    parser.add_argument(
        "--draft-tokens", type=int, metavar="N", help=f"with --speculate: drafted at a time at most (default: {DRAFTS})"
    )


def check_drafting_arguments(arguments: argparse.Namespace) -> None:
    """Raises `InputError` for what can be seen to be wrong before a model is read."""
    if arguments.draft_tokens is None:
        return
    if arguments.speculate is None:
        raise InputError(f"--draft-tokens {arguments.draft_tokens} needs --speculate: nobody drafts")
    if not 1 <= arguments.draft_tokens <= MOST_DRAFTS:
        raise InputError(f"--draft-tokens {arguments.draft_tokens} must be between 1 and {MOST_DRAFTS}")


def read_drafting(arguments: argparse.Namespace, source: ModelSource) -> Drafting | None:
    """Who drafts for the model `source`, if anybody; raises as `open_drafting`."""
    if arguments.speculate is None:
        return None
    tokens = arguments.draft_tokens or DRAFTS
    return open_drafting(arguments.speculate, tokens, target=arguments.model, tokenizer=source.tokenizer)
