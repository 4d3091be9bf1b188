"""The command line as the shell sees it: exit status, one line on stderr, and signals."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hsai.export import write_bundle
from hsai.export.source import open_model
from tests.cli.conftest import SHORT, TEMPLATE, TINY, Workshop
from tests.environments import as_a_user
from tests.export.tiny_models import make_model, make_tokenizer

HSAI = (sys.executable, "-m", "hsai.cli")
USERS = as_a_user(PYTHONUNBUFFERED="1")
AGAIN = "the same command goes on from the last checkpoint\n"


def run(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [*HSAI, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=USERS, timeout=120, **more)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A suite in the background may have been told to ignore Ctrl-C, and what it starts would be too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def started(command: list[str], **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A program that does not outlive its test, also where that fails."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **more) as process:
        try:
            yield process
        finally:
            process.kill()


def test_bad_words(place: Path) -> None:
    done = run("trian")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: no command 'trian'; did you mean train?\n")


def test_a_bad_config(place: Path) -> None:
    done = run("train", TINY, "--mesh.model", "3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: mesh")
    assert list(place.iterdir()) == []


def test_a_bad_bundle(workshop: Workshop, place: Path) -> None:
    (place / "empty").mkdir()
    done = run("generate", place / "empty", "x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert "empty" in done.stderr


def test_a_reader_that_has_enough(workshop: Workshop) -> None:
    """As in `hsai eval ... | head -0`: no traceback, and the status that a shell gives for a broken pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as closed:
        command = [*HSAI, "generate", str(workshop.bundles / "int8"), "x", "--max-tokens", "2"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, env=USERS, timeout=120)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that writes for minutes what it is asked: its context is long, and nothing ends its texts."""
    directory = tmp_path_factory.mktemp("endless") / "int8"
    model = make_model("int8", layers=1, max_length=1 << 15)
    write_bundle(directory, model, make_tokenizer(), assets={"chat_template.jinja": TEMPLATE.encode()})
    return directory


ENDLESS = ("--max-tokens", "30000", "--temperature", "0")


def test_ctrl_c_while_a_text_is_written(endless: Path) -> None:
    words = ("generate", str(endless), "x = 1", *ENDLESS, "--regex", "(a|b|c| )*d{30000}")
    with started([*HSAI, *words], stderr=subprocess.PIPE, env=USERS) as process:
        assert process.stdout is not None
        assert process.stdout.read(len("x = 1") + 8).startswith("x = 1")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")


def test_ctrl_c_in_a_conversation_that_comes_from_a_file(endless: Path) -> None:
    with started(
        [*HSAI, "chat", str(endless), *ENDLESS], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=USERS
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("x\ny\n")
        process.stdin.flush()
        assert process.stdout.read(8)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")


def test_ctrl_c_at_a_terminal_ends_the_answer_and_not_the_conversation(endless: Path) -> None:
    """A real terminal, where Ctrl-C is a key that is typed; twice, and then the conversation ends as it should."""
    ours, theirs = os.openpty()
    with os.fdopen(ours, "r+b", buffering=0) as keyboard:
        screen = b""

        def wait_for(text: bytes, more: int = 0) -> None:
            """Until the screen shows it, and so many bytes after it."""
            nonlocal screen
            deadline = time.monotonic() + 120
            while (place := screen.find(text)) < 0 or len(screen) < place + len(text) + more:
                assert time.monotonic() < deadline and select.select([ours], [], [], 120)[0], screen
                screen += keyboard.read(1 << 12)
            screen = screen[place + len(text) :]

        process = subprocess.Popen(
            ["setsid", "--ctty", *HSAI, "chat", str(endless), *ENDLESS],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env={**USERS, "TERM": "dumb"},
        )
        os.close(theirs)
        try:
            for message in (b"first", b"second"):
                wait_for(b"> ")
                keyboard.write(message + b"\n")
                wait_for(message + b"\r\n", more=8)
                keyboard.write(b"\x03")
                wait_for(b"\r\n")
            wait_for(b"> ")
            keyboard.write(b"/quit\n")
            wait_for(b"/quit\r\n")
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert (process.returncode, error) == (0, b"")


@pytest.mark.slow
def test_a_signal_while_the_step_compiles(workshop: Workshop, place: Path) -> None:
    """XLA's threads must not outlive the interpreter: that ended in a segmentation fault."""
    command = [*HSAI, "train", TINY, *SHORT, "--directory", "run", "--data-directory", str(workshop.corpus)]
    uncached = {**USERS, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with started(command, stderr=subprocess.PIPE, env=uncached) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "reusing corpus" in line:
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (130, f"interrupted; {AGAIN}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "what"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_training_so_that_it_goes_on(
    number: signal.Signals, status: int, what: str, workshop: Workshop, place: Path
) -> None:
    words = ("train", TINY, *SHORT, "--train.steps", "5000", "--train.evaluate-every", "5000")
    where = ("--checkpoint.every", "20", "--directory", "run", "--data-directory", str(workshop.corpus))
    command = [*HSAI, *words, *where]
    with started(command, stderr=subprocess.PIPE, env=USERS) as process:
        deadline = time.monotonic() + 120
        while not (place / "run" / "checkpoints" / "20").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (status, f"{what}; {AGAIN}")
    saved = [path.name for path in (place / "run" / "checkpoints").iterdir()]
    assert saved and all(name.isdigit() for name in saved)  # what was being written was ended, not left
    newest = max(map(int, saved))
    assert open_model(place / "run").origin["step"] == newest
    with started(command, stderr=subprocess.DEVNULL, env=USERS) as process:
        assert process.stdout is not None
        assert f"resuming run at step {newest} of 5000\n" in iter(process.stdout.readline, "")
