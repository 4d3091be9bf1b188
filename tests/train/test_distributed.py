"""One run in two real processes, joined by `jax.distributed` over loopback: the same numbers, and one end for both."""

import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import finish, launch, launch_together, metrics, weights

pytestmark = pytest.mark.slow
MODEL = ("--model.heads", 4, "--model.head-dim", 32)  # as many heads as there are devices
STEPS = ("--train.steps", 8, "--train.evaluate-every", 4, "--train.evaluate-tokens", 1000)
# What Gloo prints, piece by piece: its threads write at the same time, and their lines are torn where pieces end.
GLOO = re.compile(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+|\s+")
WORDS = (*MODEL, *STEPS, "--data.max-bytes", 200_000)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the compiled programs, the corpus and the runs are."""
    return tmp_path_factory.mktemp("distributed")


def where(base: Path, name: str) -> tuple[object, ...]:
    return ("--directory", base / name, "--data-directory", base / "corpus")


@pytest.fixture(scope="module")
def alone(base: Path) -> Path:
    """One process with one device."""
    status, _, error = finish(launch(*WORDS, *where(base, "alone"), devices=1, cache=base / "compiled"))
    assert status == 0, error
    return base / "alone"


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("data", ("--mesh.data", 4)),
        ("fsdp and model", ("--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.model", 2)),
        # One product then has its parts in both processes.
        ("model", ("--mesh.data", 1, "--mesh.model", 4)),
    ],
)
def test_two_processes_train_as_one_does(name: str, mesh: tuple[object, ...], base: Path, alone: Path) -> None:
    """Losses to 2e-5 of themselves, and weights to 1 % of their own size; the checkpoint is one that anybody reads."""
    ends = [finish(p) for p in launch_together(*WORDS, *mesh, *where(base, name), cache=base / "compiled")]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert "4 cpu devices, 2 processes" in ends[0][1]
    # Only the first one talks; but for the library that carries the messages, which does so on every process.
    assert GLOO.sub("", ends[1][1]) == ""
    found, wanted = metrics(base / name), metrics(alone)
    assert [row["step"] for row in found] == list(range(1, 9))
    for key in ("loss", "grad_norm", "heldout_loss"):
        pairs = [(row[key], other[key]) for row, other in zip(found, wanted, strict=True) if key in other]
        assert len(pairs) >= 2
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=2e-4 if key == "grad_norm" else 2e-5, err_msg=key)
    trained = weights(base / name)
    for key, array in weights(alone).items():
        assert np.linalg.norm(trained[key] - array) < 0.01 * np.linalg.norm(array), key
    assert (base / name / "loss.png").exists() and (base / name / "result.json").exists()


def test_two_processes_resume_what_one_began(base: Path, alone: Path) -> None:
    half = ("--checkpoint.every", 4)
    process = launch(*WORDS, *half, *where(base, "shared"), devices=1, cache=base / "compiled")
    while process.poll() is None and not (base / "shared" / "checkpoints" / "4").exists():
        time.sleep(0.001)
    process.kill()
    finish(process)
    # Had the one been quick enough to save its last step, there would be nothing left to do.
    shutil.rmtree(base / "shared" / "checkpoints" / "8", ignore_errors=True)
    words = (*WORDS, *half, "--mesh.data", 4, *where(base, "shared"))
    ends = [finish(p) for p in launch_together(*words, cache=base / "compiled")]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert "at step 4 of 8" in ends[0][1], ends[0][1]
    losses = [[row["loss"] for row in metrics(base / name)] for name in ("shared", "alone")]
    np.testing.assert_allclose(*losses, rtol=2e-5)


def test_what_one_process_is_told_otherwise_both_refuse(base: Path, alone: Path) -> None:
    each = ((), ("--optim.learning-rate", 0.5))
    ends = [finish(p) for p in launch_together(*WORDS, *where(base, "other"), each=each, cache=base / "compiled")]
    wanted = "error: process 1 has another config than process 0; all processes need the same\n"
    assert [(status, error) for status, _, error in ends] == [(2, wanted), (2, wanted)]
    assert not (base / "other").exists()


def test_what_one_process_cannot_read_both_refuse(base: Path, alone: Path, tmp_path: Path) -> None:
    """The second process looks for its corpus elsewhere, and finds a file of something else."""
    (tmp_path / "meta.json").write_text("{}")
    each = (("--data-directory", base / "corpus"), ("--data-directory", tmp_path))
    words = (*WORDS, "--directory", base / "unread")
    ends = [finish(p) for p in launch_together(*words, each=each, cache=base / "compiled")]
    assert [status for status, _, _ in ends] == [2, 2], ends
    for index, (_, _, error) in enumerate(ends):
        assert error.startswith("error: process 1: " if index == 0 else "error: "), error
        assert "meta.json does not describe a corpus" in error and error.count("\n") == 1
    assert not (base / "unread").exists()


def test_what_the_first_process_alone_does_and_cannot_ends_both(base: Path, alone: Path) -> None:
    """Only the first one touches metrics.jsonl, which holds something else here: the other must not wait for it."""
    (base / "foreign").mkdir()
    (base / "foreign" / ".lock").touch()  # or it would not pass for the directory of a run at all
    (base / "foreign" / "metrics.jsonl").write_text("dear diary\n" * 2)
    ends = [finish(p, 60) for p in launch_together(*WORDS, *where(base, "foreign"), cache=base / "compiled")]
    assert [status for status, _, _ in ends] == [2, 2], ends
    for _, _, error in ends:
        assert "metrics.jsonl line 1 is not a row of metrics" in error and error.count("\n") == 1
    assert (base / "foreign" / "metrics.jsonl").read_text() == "dear diary\n" * 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set and JAX_COORDINATOR_ADDRESS is not"),
        (
            {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2 must be a number below JAX_NUM_PROCESSES=2",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_PROCESS_ID=0 must be a number below JAX_NUM_PROCESSES=two",
        ),
    ],
)
def test_half_an_announcement_is_refused(
    environment: dict[str, str], message: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, _, error = finish(launch(*WORDS, *where(base, "half"), devices=1, cache=base / "compiled"))
    assert status == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1
