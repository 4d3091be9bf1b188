"""The command line as the shell sees it: exit status, one line on stderr, and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hsai.export.source import open_model
from tests.cli.conftest import SHORT, TINY, Workshop

HSAI = (sys.executable, "-m", "hsai.cli")
ONE_DEVICE = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1"}
AGAIN = "the same command goes on from the last checkpoint\n"


def run(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [*HSAI, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=ONE_DEVICE, timeout=120, **more)


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
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, env=ONE_DEVICE, timeout=120)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.slow
def test_a_signal_while_the_step_compiles(workshop: Workshop, place: Path) -> None:
    """XLA's threads must not outlive the interpreter: that ended in a segmentation fault."""
    command = [*HSAI, "train", TINY, *SHORT, "--directory", "run", "--data-directory", str(workshop.corpus)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ONE_DEVICE, "JAX_ENABLE_COMPILATION_CACHE": "false"},
    ) as process:
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
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_DEVICE
    ) as process:
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
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ONE_DEVICE
    ) as process:
        assert process.stdout is not None
        assert f"resuming run at step {newest} of 5000\n" in iter(process.stdout.readline, "")
        process.kill()
