"""Talk with a model, on one device: it remembers what was said, as much as its context holds.

hsai chat bundles/int4
hsai chat SmolLM2-135M-Instruct.Q4_1.gguf --system "Answer in one sentence." --max-tokens 200
A line is a message. Ctrl-C ends an answer, /quit or the end of the input the conversation. Lines may come from a file,
too: each is answered, and nothing but the answers is printed.

How tokens are chosen is as in `hsai generate`.
"""

import contextlib
import io
import sys

from hsai.cli.answers import (
    add_answer_arguments,
    check_answer_arguments,
    describe_answer,
    prepare_answers,
    tell_ignored,
)
from hsai.cli.parser import Parser
from hsai.data.chat import ChatTemplate
from hsai.errors import InputError
from hsai.infer.conversation import Conversation
from hsai.infer.service import Closed

MAX_TOKENS = 512
QUIT = "/quit"
PROMPT = "> "


def add_arguments(parser: Parser) -> None:
    """Those of the command."""
    add_answer_arguments(parser, max_tokens=MAX_TOKENS)
    parser.add_argument("--system", metavar="TEXT", help="the message that stands before all")


def run(parser: Parser, argv: list[str]) -> None:
    """Streams answers to stdout, and at a terminal what they took to stderr."""
    arguments = parser.parse(argv)
    check_answer_arguments(arguments)
    answering = prepare_answers(arguments, max_tokens=MAX_TOKENS)
    ChatTemplate.of_model(answering.engine.assets, answering.engine.tokenizer)
    tell_ignored(answering)
    conversation = Conversation(answering.engine, system=arguments.system)
    at_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is refused, as that of arguments is
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() a history, and keys to edit a line
    while (message := _read_message(at_terminal)) is not None:
        if not message.strip():
            continue
        try:
            done = conversation.answer(
                message,
                max_tokens=answering.max_tokens,
                sampling=answering.sampling,
                on_text=lambda text: print(text, end="", flush=True),
            )
        except KeyboardInterrupt:
            print()
            if not at_terminal:
                raise
        except InputError as error:
            if not at_terminal:
                raise
            print(f"error: {error}", file=sys.stderr)
        except (RuntimeError, Closed) as error:  # a defect, of which the log says more
            print()
            if not at_terminal:
                raise
            print(f"error: {error}", file=sys.stderr)
        else:
            print(flush=True)
            if at_terminal:
                print(describe_answer(done), file=sys.stderr)


def _read_message(at_terminal: bool) -> str | None:
    """The next line; None at the end. Ctrl-C at the prompt begins the line anew."""
    while True:
        try:
            line = input(PROMPT if at_terminal else "")
        except EOFError:
            if at_terminal:
                print()
            return None
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print(f"\n{QUIT} or Ctrl-D ends the conversation", file=sys.stderr)
            continue
        return None if line.strip() == QUIT else line
