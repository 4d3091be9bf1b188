"""Continue a prompt with a model, or answer it, on one device.

hsai generate bundles/int4 "def main():" --max-tokens 64
hsai generate SmolLM2-135M-Instruct.Q4_1.gguf "What is the capital of France?" --chat
hsai generate bundles/int4 "Where is the Louvre?" --chat --prefill "The Louvre is in"
A prompt that begins with a hyphen stands last, behind two of them: hsai generate bundles/int4 --max-tokens 8 -- -x

Where you say nothing, tokens are drawn as the model's generation_config.json says (temperature, top-k, top-p, min-p,
new tokens), as its makers mean it; without one, or where it does not draw, the likeliest is taken. --temperature 0 does
that in any case. The tokens that end a text are always those of the model.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from hsai.cli.parser import Parser
from hsai.data.assets import Assets
from hsai.errors import InputError
from hsai.export.source import open_model
from hsai.infer import Engine
from hsai.infer.defaults import read_defaults
from hsai.interop.gguf import is_gguf
from hsai.models import CacheFormat

MAX_TOKENS = 64


def add_arguments(parser: Parser) -> None:
    """Those of the command."""
    parser.add_argument("model", type=Path, help="a run, a bundle, a checkpoint of transformers, or a GGUF file")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a message: answer it through the model's chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message before it")
    parser.add_argument("--prefill", metavar="TEXT", help="with --chat: how the answer begins")
    parser.add_argument(
        "--max-tokens", type=int, help=f"tokens to make at most (default: the model's, else {MAX_TOKENS})"
    )
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: the model's, else 0)")
    parser.add_argument("--top-k", type=int, help="draw among this many likeliest tokens (default: the model's)")
    parser.add_argument(
        "--top-p", type=float, help="draw among the likeliest tokens that hold this probability (default: the model's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--cache",
        choices=get_args(CacheFormat),
        help="how keys and values are stored: in the activations' dtype (default), bfloat16, int8, or int4",
    )
    parser.add_argument("--graphs", action="store_true", help="run the StableHLO graphs of the bundle as they are")


def run(parser: Parser, argv: list[str]) -> None:
    """Streams the text to stdout and what it took to stderr."""
    arguments = parser.parse(argv)
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise InputError(f"--max-tokens {arguments.max_tokens} must be at least 1")
    if not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed {arguments.seed} must be between 0 and {2**32 - 1}")
    if arguments.system is not None and not arguments.chat:
        raise InputError("--system needs --chat: a text that is continued has no system message")
    if arguments.prefill is not None and not arguments.chat:
        raise InputError("--prefill needs --chat: a text that is continued is its own beginning")
    engine = _load(arguments.model, graphs=arguments.graphs, cache=arguments.cache)
    defaults = read_defaults(engine.assets.generation_config)
    sampling = defaults.sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed
    )
    prefill = arguments.prefill or ""
    # What the text begins with is echoed with its first piece, when nothing can be wrong any more.
    unread = [prefill if arguments.chat else arguments.prompt]

    def show(text: str) -> None:
        print(*unread, text, sep="", end="", flush=True)
        unread.clear()

    settings: dict[str, Any] = {
        "max_tokens": arguments.max_tokens or defaults.max_tokens or MAX_TOKENS,
        "sampling": sampling,
        "on_text": show,
    }
    if arguments.chat:
        done = engine.chat(_converse(arguments), prefill=prefill, **settings)
    else:
        done = engine.generate(arguments.prompt, **settings)
    show("\n")
    if defaults.ignored:
        print(f"note: generation_config.json's {', '.join(defaults.ignored)} is not applied", file=sys.stderr)
    print(
        f"[{len(done.tokens)} tokens at {done.tokens_per_second:.0f} a second, stopped by {done.finish_reason}]",
        file=sys.stderr,
    )


def _converse(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """The messages."""
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return [*system, {"role": "user", "content": arguments.prompt}]


def _load(path: Path, *, graphs: bool, cache: CacheFormat | None) -> Engine:
    """The engine of a model; only a bundle has graphs."""
    if graphs and is_gguf(path):
        raise InputError(f"--graphs: {path} is a GGUF file, which has none; import and export it as a bundle first")
    if graphs:
        return Engine.load(path, graphs=True, cache=cache)
    source = open_model(path)
    return Engine.trace(source.model, source.tokenizer, Assets.parse(source.assets), cache=cache or "activations")
