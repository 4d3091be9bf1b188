"""`hsai COMMAND ...`: parses words, calls the rooms below, prints what came out.

Whatever the user can mend ends as one line on stderr and exit status 2. Any other exception is a defect of ours and
keeps its traceback. Each command is a module with `add_arguments(parser)` and `run(parser, argv)`, and its docstring is
its help. It is imported only when it is called, so that a mistyped command is answered at once.
"""

import errno
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from hsai.cli.parser import Parser
from hsai.configuration import suggest
from hsai.errors import InputError
from hsai.signals import Terminated, unwinding

COMMANDS = {
    "train": "train a config on a mesh, or resume it",
    "compress": "make a model's weights sparse and low-bit",
    "import": "take a model from elsewhere as a bundle",
    "export": "write a model as a bundle with StableHLO graphs, as a checkpoint of transformers, or as a GGUF file",
    "eval": "measure models on held-out text and benchmarks, side by side",
    "generate": "continue a prompt with a model, or answer it",
    "chat": "talk with a model",
    "serve": "answer over HTTP in the form of OpenAI's API, with a chat page",
    "fetch": "bring a model or task data by name into a cache",
}

QUICK = ("generate", "chat", "serve")
"""Commands whose user waits for the first word: they keep their programs on disk."""

_REMEDIES = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space, or write elsewhere",
    errno.EFBIG: "raise the limit on the size of files, or write elsewhere",
    errno.EACCES: "give a path that this user may use",
    errno.EPERM: "give a path that this user may use",
    errno.EROFS: "write elsewhere",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def main(argv: Sequence[str] | None = None, *, keep_programs: bool = False) -> int:
    """Runs a command.

    Args:
      argv: its words, by default those of this process.
      keep_programs: whether quick commands keep what this process compiles on disk.
    Returns: its exit status: 0; 2 for input, or a machine, that cannot be used; 128 + the signal that ended it.
    """
    logging.basicConfig(format="note: %(message)s", level=logging.WARNING)
    logging.getLogger("asyncio").setLevel(
        logging.CRITICAL
    )  # tells of each write that failed, and Orbax raises the first
    words = list(sys.argv[1:] if argv is None else argv)
    again = "; the same command goes on from the last checkpoint" if words[:1] == ["train"] else ""
    try:
        with unwinding():
            if keep_programs and words[:1] and words[0] in QUICK:
                importlib.import_module("hsai.infer.program_cache").keep_programs()
            _dispatch(words)
            sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # Whoever read our output (`head`) has enough. What is still buffered must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except InputError as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(_describe(error), 2)
    except Exception as error:
        refused = _find_os_error(error)
        if refused is not None:
            return _fail(_describe(refused), 2)
        if (found := re.search(r"[Oo]ut of memory[^.\n]*", str(error))) is None:
            raise
        return _fail(f"{found[0]}; take a smaller model or batch, or more devices to split it over", 2)
    except KeyboardInterrupt:
        return _fail(f"interrupted{again}", 128 + signal.SIGINT)
    except Terminated:
        return _fail(f"terminated{again}", 128 + signal.SIGTERM)


def run() -> NoReturn:
    """The `hsai` script: `main`, and out.

    Where a signal ended it, at once: threads of XLA that still compile outlive the interpreter's own end badly.
    """
    status = main(keep_programs=True)
    if status > 128:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: hsai COMMAND ...\n\nOne transformer definition, from a supercomputer to a phone.\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()))
        print("\nhsai COMMAND --help tells more.")
        return
    name = words[0]
    if name not in COMMANDS:
        raise InputError(f"no command {name!r}; {suggest(name, COMMANDS)}")
    command: Any = importlib.import_module(f"hsai.cli.{name}")
    parser = Parser(prog=f"hsai {name}", description=command.__doc__, add_help=name != "train")
    command.add_arguments(parser)
    command.run(parser, words[1:])


def _find_os_error(error: BaseException | None) -> OSError | None:
    """What the operating system refused to a library that writes files itself, and tells of it only in its words.

    safetensors says "No space left on device (os error 28)", TensorStore "[os_error_code='28']" behind the file's name.
    """
    while error is not None:
        text = str(error)
        if found := re.search(r"os[ _]error(?:_code)?[ =]'?(\d+)", text):
            number = int(found[1])
            named = re.search(r'Failed writing: "([^"]+)"', text)
            return OSError(number, os.strerror(number), *([named[1]] if named else []))
        error = error.__cause__ or error.__context__
    return None


def _describe(error: OSError) -> str:
    """What the operating system refused, in one line: on which file, why, and what may help."""
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    remedy = "" if error.errno not in _REMEDIES else f"; {_REMEDIES[error.errno]}"
    return " ".join(f"{place}{error.strerror or error}{remedy}".split())


def _fail(message: str, status: int) -> int:
    print(f"error: {message}" if status == 2 else message, file=sys.stderr)
    return status
