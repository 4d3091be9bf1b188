"""Continue a prompt with a bundle, on one device.

hsai generate bundles/int4 "def main():" --max-tokens 64
A prompt that begins with a hyphen stands last, behind two of them: hsai generate bundles/int4 --max-tokens 8 -- -x
"""

import sys
from pathlib import Path
from typing import get_args

from hsai.cli.parser import Parser
from hsai.errors import InputError
from hsai.infer import Engine, SamplingConfig
from hsai.models import CacheFormat


def add_arguments(parser: Parser) -> None:
    """Those of the command."""
    parser.add_argument("bundle", type=Path, help="the directory of a bundle")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to make at most (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--top-k", type=int, help="draw among this many likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--cache",
        choices=get_args(CacheFormat),
        help="how keys and values are stored: in the activations' dtype (default), in bfloat16, or in int8",
    )
    parser.add_argument("--graphs", action="store_true", help="run the StableHLO graphs of the bundle as they are")


def run(parser: Parser, argv: list[str]) -> None:
    """Streams the text to stdout and what it took to stderr."""
    arguments = parser.parse(argv)
    if arguments.max_tokens < 1:
        raise InputError(f"--max-tokens {arguments.max_tokens} must be at least 1")
    if not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed {arguments.seed} must be between 0 and {2**32 - 1}")
    sampling = SamplingConfig(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed
    )
    engine = Engine.load(arguments.bundle, graphs=arguments.graphs, cache=arguments.cache)
    unread = [arguments.prompt]

    def show(text: str) -> None:
        # The prompt is echoed with the first text, when nothing can be wrong with it any more.
        print(*unread, text, sep="", end="", flush=True)
        unread.clear()

    done = engine.generate(arguments.prompt, max_tokens=arguments.max_tokens, sampling=sampling, on_text=show)
    show("\n")
    print(
        f"[{len(done.tokens)} tokens at {done.tokens_per_second:.0f} a second, stopped by {done.finish_reason}]",
        file=sys.stderr,
    )
