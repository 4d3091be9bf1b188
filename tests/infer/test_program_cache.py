"""Programs on disk: a second process compiles nothing; and what a command does not import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hsai.infer.program_cache import keep_programs, name_processor

PROGRAM = """
import json, pathlib, sys, time
from hsai.infer import Engine
from hsai.infer.program_cache import keep_programs
from tests.export.tiny_models import make_model, make_tokenizer

model, tokenizer = make_model("int4", layers=1), make_tokenizer()
keep_programs(pathlib.Path(sys.argv[1]))
import jax
compiled = []
jax.monitoring.register_event_listener(lambda name, **_: compiled.append(name))
tokens = Engine.trace(model, tokenizer).generate("def", max_tokens=3).tokens
hits, misses = (sum(name.endswith(end) for name in compiled) for end in ("cache_hits", "cache_misses"))
print(json.dumps({"tokens": tokens, "hits": hits, "misses": misses}))
"""


def run(program: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    first, second = (json.loads(run(PROGRAM, str(tmp_path / "programs"))) for _ in range(2))
    # At least what reads a prompt, and what writes a block.
    assert first["misses"] >= 2 and second["misses"] == 0 and second["hits"] >= first["misses"]
    assert first["tokens"] == second["tokens"]
    assert [path.name for path in (tmp_path / "programs").iterdir()] == [name_processor()]


CROWD = """
import json, pathlib, sys
from hsai.infer import program_cache

program_cache.MOST_BYTES = int(sys.argv[2])
program_cache.keep_programs(pathlib.Path(sys.argv[1]))
import jax
(folder,) = pathlib.Path(sys.argv[1]).iterdir()
for number in (0, 1, 2, 0, 3, 0, 4, 0, 5, 0, 6):
    jax.clear_caches()
    jax.jit(lambda x: x * number + 1)(1.0).block_until_ready()
    print(json.dumps({path.name: path.stat().st_size for path in folder.glob("*-cache")}))
"""


def test_what_was_not_used_for_longest_goes_when_the_folder_is_full(tmp_path: Path) -> None:
    """Programs of about one size; what is used in between stays, however old it is."""

    def fill(name: str, most: int) -> list[dict[str, int]]:
        """The bytes of what is kept after each use."""
        return [json.loads(line) for line in run(CROWD, str(tmp_path / name), str(most)).splitlines()]

    unbounded = fill("unbounded", 1 << 30)
    assert len(unbounded[-1]) == 7
    most = int(3.5 * max(unbounded[-1].values()))
    assert sum(unbounded[-1].values()) > most
    bounded = fill("bounded", most)
    assert [len(kept) for kept in bounded] == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    assert max(sum(kept.values()) for kept in bounded) <= most
    seen: dict[str, None] = {}
    for kept in bounded:
        seen |= dict.fromkeys(kept)
    first, *_, one_before, last = seen  # in the order in which they were compiled
    assert len(seen) == 7 and set(bounded[-1]) == {first, one_before, last}


def test_a_place_that_cannot_be_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    keep_programs(tmp_path / "file" / "programs")
    assert "programs are compiled at every start" in caplog.text and len(caplog.records) == 1


def test_what_answers_does_not_wait_for_what_trains() -> None:
    """Each of these takes longer to import than a small model to answer."""
    program = "import sys, hsai.cli.chat, hsai.cli.generate; print(*sys.modules)"
    loaded = set(run(program).split())
    slow = {"jax.experimental.pallas", "matplotlib", "orbax.checkpoint", "tensorboardX", "torch"}
    assert "jax" in loaded and not slow & loaded
