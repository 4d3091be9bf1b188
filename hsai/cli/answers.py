"""What `hsai generate` and `hsai chat` have in common: which model, how its tokens are chosen, what is told."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import get_args

from hsai.cli.drafting import add_drafting_arguments, check_drafting_arguments, read_drafting
from hsai.cli.parser import Parser
from hsai.data.assets import Assets
from hsai.errors import InputError
from hsai.export.source import open_model
from hsai.formats import Activations, take_activations
from hsai.infer import Engine, Generation, SamplingConfig
from hsai.infer.defaults import read_defaults
from hsai.interop.gguf import is_gguf
from hsai.models import CacheFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answering:
    """A model, and how it is asked."""

    engine: Engine
    """Of the model."""

    max_tokens: int
    """New tokens of an answer at most."""

    sampling: SamplingConfig
    """How they are chosen."""

    ignored: tuple[str, ...]
    """Settings of the model's makers that the sampler does not have."""


def add_answer_arguments(parser: Parser, *, max_tokens: int) -> None:
    """Those of the model, of sampling and of the cache; `max_tokens` holds where neither user nor model says one."""
    parser.add_argument("model", type=Path, help="a run, a bundle, a checkpoint of transformers, or a GGUF file")
    parser.add_argument(
        "--max-tokens", type=int, help=f"tokens to make at most (default: the model's, else {max_tokens})"
    )
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: the model's, else 0)")
    parser.add_argument("--top-k", type=int, help="draw among this many likeliest tokens (default: the model's)")
    parser.add_argument(
        "--top-p", type=float, help="draw among the likeliest tokens that hold this probability (default: the model's)"
    )
    parser.add_argument(
        "--min-p", type=float, help="draw among tokens of this fraction of the likeliest's probability (likewise)"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, help="makes tokens that were there less likely, above 1 (likewise)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--cache",
        choices=get_args(CacheFormat),
        help="how keys and values are stored: in the activations' dtype (default), bfloat16, int8, or int4",
    )
    add_activations_argument(parser)
    add_drafting_arguments(parser)
    parser.add_argument("--graphs", action="store_true", help="run the StableHLO graphs of the bundle as they are")


def add_activations_argument(parser: Parser) -> None:
    """That of how products take activations."""
    parser.add_argument(
        "--activations",
        choices=get_args(Activations),
        default="float",
        help="what weights of integers are multiplied by: as it is (default), or rounded to int8",
    )


def check_answer_arguments(arguments: argparse.Namespace) -> None:
    """Raises `InputError` for what can be seen to be wrong before a model is read."""
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise InputError(f"--max-tokens {arguments.max_tokens} must be at least 1")
    if not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed {arguments.seed} must be between 0 and {2**32 - 1}")
    check_drafting_arguments(arguments)


def prepare_answers(arguments: argparse.Namespace, *, max_tokens: int) -> Answering:
    """Reads the model, and what its makers say of sampling; what the user says comes first.

    Raises:
      InputError: the model cannot be read, or asked like this.
    """
    engine = _load(arguments)
    defaults = read_defaults(engine.assets.generation_config)
    sampling = defaults.sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    if arguments.speculate is not None and sampling.repetition_penalty != 1:
        raise InputError(
            f"--speculate has no effect with repetition_penalty={sampling.repetition_penalty}: "
            "--repetition-penalty 1 does without"
        )
    return Answering(
        engine=engine,
        max_tokens=arguments.max_tokens or defaults.max_tokens or max_tokens,
        sampling=sampling,
        ignored=defaults.ignored,
    )


def describe_answer(done: Generation) -> str:
    """What an answer took, in one line."""
    drafts = f", {done.accepted_tokens} of {done.drafted_tokens} drafts accepted" if done.drafted_tokens else ""
    speed = f"{len(done.tokens)} tokens at {done.tokens_per_second:.0f} a second"
    return f"[{speed}{drafts}, stopped by {done.finish_reason}]"


def tell_ignored(answering: Answering) -> None:
    """Says on stderr what the makers asked for in vain."""
    if answering.ignored:
        print(f"note: generation_config.json's {', '.join(answering.ignored)} is not applied", file=sys.stderr)


def _load(arguments: argparse.Namespace) -> Engine:
    """The engine of a model; only a bundle has graphs."""
    path, cache = arguments.model, arguments.cache
    if arguments.graphs and is_gguf(path):
        raise InputError(f"--graphs: {path} is a GGUF file, which has none; import and export it as a bundle first")
    if arguments.graphs and arguments.activations != "float":
        raise InputError(f"--activations {arguments.activations} cannot be chosen with --graphs: theirs are fixed")
    if arguments.graphs:
        return Engine.load(path, graphs=True, cache=cache, speculate=arguments.speculate)
    return trace_engine(arguments)


def trace_engine(arguments: argparse.Namespace, *, context: int | None = None) -> Engine:
    """The engine of a model that is traced here, in a context of so many tokens, by default its longest."""
    source = open_model(arguments.model)
    return Engine.trace(
        take_activations(source.model, arguments.activations),
        source.tokenizer,
        Assets.parse(source.assets),
        context=context,
        cache=arguments.cache or "activations",
        drafting=read_drafting(arguments, source),
    )
