"""A run that is killed goes on as if it had not been: the same bits, wherever and however often it was killed.

The killing is SIGKILL, at which nothing is written, closed or removed. Bit for bit holds for the same devices; another
mesh sums in another order, and holds to float tolerance.
"""

import random
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from hsai.formats.storage import named_arrays
from hsai.train.checkpoint import Checkpointer
from hsai.train.optimizer import make_optimizer
from hsai.train.restore import read_run
from hsai.train.state import abstract_state
from tests.train.runs import finish, launch, metrics, weights

pytestmark = pytest.mark.slow
STEPS = 20
WORDS = ("--train.steps", STEPS, "--data.max-bytes", 200_000, "--train.evaluate-tokens", 1000)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the compiled programs, the corpus and the run that nobody killed are."""
    return tmp_path_factory.mktemp("resume")


def start(base: Path, name: str, *more: object, devices: int = 2) -> subprocess.Popen[str]:
    where = ("--directory", base / name, "--data-directory", base / "corpus")
    return launch(*WORDS, *where, *more, devices=devices, cache=base / "compiled")


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    """A run from step 0 to the last without a break."""
    status, _, error = finish(start(base, "whole"))
    assert status == 0, error
    return base / "whole"


def whole_state(directory: Path) -> dict[str, np.ndarray]:
    """Everything a checkpoint carries: weights, both moments, counters."""
    run = read_run(directory).run
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "model"))
    like = abstract_state(run.model, make_optimizer(run.optim, run.train.steps), mesh, run.train.seed)
    with Checkpointer(directory / "checkpoints", None) as checkpointer:
        return {name: np.asarray(array) for name, array in named_arrays(checkpointer.restore(like)).items()}


def assert_same_run(found: Path, wanted: Path) -> None:
    """The same state to the bit, and the same rows of metrics: each step once, with the same numbers."""
    assert metrics(found) == metrics(wanted)
    wanted_state = whole_state(wanted)
    found_state = whole_state(found)
    assert list(found_state) == list(wanted_state)
    different = [name for name, array in wanted_state.items() if found_state[name].tobytes() != array.tobytes()]
    assert different == []


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path}"
        time.sleep(0.001)


def test_killed_half_way_it_ends_in_the_same_bits(base: Path, whole: Path) -> None:
    process = start(base, "half")
    wait_for(base / "half" / "checkpoints" / "10", process)
    process.kill()
    finish(process)
    assert not (base / "half" / "result.json").exists()
    status, said, error = finish(start(base, "half"))
    assert status == 0, error
    newest = [step for step in (10, 15) if f"resuming {base / 'half'} at step {step} of {STEPS}\n" in said]
    assert len(newest) == 1, said
    assert_same_run(base / "half", whole)
    assert (base / "half" / "result.json").read_text() == (whole / "result.json").read_text()


def test_killed_ten_times_at_random_moments_it_ends_in_the_same_bits(base: Path, whole: Path) -> None:
    """Moments are drawn over the whole life of a process: start-up, compilation, steps, and a checkpoint each step."""
    draw = random.Random(time.time_ns())
    every_step = ("--checkpoint.every", 1)
    begun = time.monotonic()
    status, _, error = finish(start(base, "timed", *every_step))
    assert status == 0, error
    life = time.monotonic() - begun
    assert_same_run(base / "timed", whole)
    moments: list[float] = []
    progress: list[int] = []
    for _ in range(10):
        process = start(base, "killed", *every_step)
        # Of what a life has left, so that a moment can be any, but seldom lies after the end.
        moments.append(draw.uniform(0.02, 0.98) * life)
        time.sleep(moments[-1])
        process.kill()
        finish(process)
        steps = [int(path.name) for path in (base / "killed" / "checkpoints").glob("*") if path.name.isdigit()]
        progress.append(max(steps, default=0))
    assert progress == sorted(progress), f"a checkpoint was lost: {progress} after {moments}"
    status, _, error = finish(start(base, "killed", *every_step))
    assert status == 0, f"{error} after kills at {moments}"
    assert_same_run(base / "killed", whole)
    left = sorted(path.name for path in (base / "killed" / "checkpoints").iterdir())
    assert left == ["19", "20"], "what the kills tore was not cleared away"


def test_another_mesh_goes_on_to_the_same_numbers(base: Path, whole: Path) -> None:
    """From 2 devices to 4, and from data to fsdp x model: losses to 1e-4 of themselves."""
    process = start(base, "moved")
    wait_for(base / "moved" / "checkpoints" / "10", process)
    process.kill()
    finish(process)
    mesh = ("--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.model", 2)
    status, said, error = finish(start(base, "moved", *mesh, devices=4))
    assert status == 0 and "resuming" in said, error
    found, wanted = metrics(base / "moved"), metrics(whole)
    assert [row["step"] for row in found] == [row["step"] for row in wanted] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([row["loss"] for row in found], [row["loss"] for row in wanted], rtol=1e-4)


def test_a_run_that_is_going_on_keeps_others_out(base: Path, whole: Path) -> None:
    process = start(base, "busy", "--train.steps", 5000, "--checkpoint.every", 2)
    wait_for(base / "busy" / "checkpoints" / "2", process)
    status, _, error = finish(start(base, "busy", "--train.steps", 5000, "--checkpoint.every", 2))
    assert status == 2
    assert error == f"error: {base / 'busy'} is in use by another run; wait for it, or give another --directory\n"
    assert process.poll() is None  # and the first goes on
    process.kill()
    finish(process)
    assert weights(base / "busy")  # its checkpoints are whole
