"""Continue a prompt with a model, or answer it, on one device.

hsai generate bundles/int4 "def main():" --max-tokens 64
hsai generate SmolLM2-135M-Instruct.Q4_1.gguf "What is the capital of France?" --chat
hsai generate bundles/int4 "Where is the Louvre?" --chat --prefill "The Louvre is in"
hsai generate bundles/int4 "A town in France:" --regex " [A-Z][a-z]+"
hsai generate bundles/int4 "def main():" --speculate bundles/nm24_int4
A prompt that begins with a hyphen stands last, behind two of them: hsai generate bundles/int4 --max-tokens 8 -- -x

Where you say nothing, tokens are drawn as the model's generation_config.json says (temperature, top-k, top-p, min-p,
repetition penalty, new tokens), as its makers mean it; without one, or where it does not draw, the likeliest is taken.
--temperature 0 does that in any case. The tokens that end a text are always those of the model.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from hsai.cli.answers import (
    add_answer_arguments,
    check_answer_arguments,
    describe_answer,
    prepare_answers,
    tell_ignored,
)
from hsai.cli.parser import Parser
from hsai.errors import InputError
from hsai.infer.request import Constraint, JsonSchema, Regex

MAX_TOKENS = 64


def add_arguments(parser: Parser) -> None:
    """Those of the command."""
    add_answer_arguments(parser, max_tokens=MAX_TOKENS)
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a message: answer it through the model's chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message before it")
    parser.add_argument("--prefill", metavar="TEXT", help="with --chat: how the answer begins")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be given several times"
    )
    parser.add_argument("--json-schema", metavar="FILE", type=Path, help="make JSON that this schema accepts")
    parser.add_argument("--regex", metavar="PATTERN", help="make a text that this regular expression matches")


def run(parser: Parser, argv: list[str]) -> None:
    """Streams the text to stdout and what it took to stderr."""
    arguments = parser.parse(argv)
    check_answer_arguments(arguments)
    if arguments.system is not None and not arguments.chat:
        raise InputError("--system needs --chat: a text that is continued has no system message")
    if arguments.prefill is not None and not arguments.chat:
        raise InputError("--prefill needs --chat: a text that is continued is its own beginning")
    constraint = _read_constraint(arguments)
    answering = prepare_answers(arguments, max_tokens=MAX_TOKENS)
    prefill = arguments.prefill or ""
    # What the text begins with is echoed with its first piece, when nothing can be wrong any more.
    unread = [prefill if arguments.chat else arguments.prompt]

    def show(text: str) -> None:
        print(*unread, text, sep="", end="", flush=True)
        unread.clear()

    options: dict[str, Any] = {
        "max_tokens": answering.max_tokens,
        "sampling": answering.sampling,
        "stop": tuple(arguments.stop),
        "constraint": constraint,
        "on_text": show,
    }
    if arguments.chat:
        done = answering.engine.chat(_converse(arguments), prefill=prefill, **options)
    else:
        done = answering.engine.generate(arguments.prompt, **options)
    show("\n")
    tell_ignored(answering)
    print(describe_answer(done), file=sys.stderr)


def _converse(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """The messages."""
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return [*system, {"role": "user", "content": arguments.prompt}]


def _read_constraint(arguments: argparse.Namespace) -> Constraint | None:
    """What the text must be."""
    if arguments.json_schema is not None and arguments.regex is not None:
        raise InputError("--json-schema and --regex exclude each other: a text follows one of them")
    if arguments.speculate is not None and (arguments.json_schema is not None or arguments.regex is not None):
        raise InputError("--speculate has no effect with --json-schema or --regex: such a text is made token by token")
    if arguments.json_schema is None:
        return None if arguments.regex is None else Regex(arguments.regex)
    try:
        return JsonSchema(arguments.json_schema.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"--json-schema {arguments.json_schema}: byte {error.start} is not UTF-8") from error
