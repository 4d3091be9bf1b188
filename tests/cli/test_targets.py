"""What stands already: `--reuse` keeps it only if it is the same and whole, `--overwrite` replaces it at the end."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import hsai.export.bundle
import hsai.files
from hsai.cli import main
from hsai.export.bundle import read_bundle
from tests.cli.conftest import Workshop, recipe
from tests.cli.snapshots import snapshot

Refuse = Callable[..., str]


@pytest.fixture
def bundle(workshop: Workshop, place: Path) -> Path:
    """A copy of a compressed bundle, to be overwritten or not."""
    return Path(shutil.copytree(workshop.compressed / "int4", place / "int4"))


def compress(workshop: Workshop, name: str, out: Path, *words: str) -> list[str]:
    return ["compress", str(workshop.run), "--recipe", recipe(name), "--out", str(out), *words]


def test_what_stands_is_kept_unless_told(workshop: Workshop, bundle: Path, place: Path, refuse: Refuse) -> None:
    (place / "file").write_text("x")
    (place / "notes").mkdir()
    (place / "notes" / "todo.txt").write_text("buy milk")
    names = ("exists", "--overwrite")
    refuse(*compress(workshop, "int4", bundle), names=("int4", *names))
    refuse("export", workshop.compressed / "int8", "--out", bundle, names=("int4", *names))
    for words in ((), ("--overwrite",), ("--reuse",), ("--reuse", "--overwrite")):
        refuse(*compress(workshop, "int4", Path("file"), *words), names=("file", "--out"))
        refuse(*compress(workshop, "int4", Path("file/below"), *words), names=("file", "--out"))
    for words in (("--overwrite",), ("--reuse",), ("--reuse", "--overwrite")):
        refuse(*compress(workshop, "int4", Path("notes"), *words), names=("notes", "manifest.json"))


def test_a_directory_that_may_not_be_written_to(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, refuse: Refuse
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refuse(*compress(workshop, "int4", Path("new")), names=("new", "may not be written to"))


def test_what_the_system_forbids(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, refuse: Refuse) -> None:
    def forbid(*arguments: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "new")

    monkeypatch.setattr(os, "mkdir", forbid)
    refuse(*compress(workshop, "int4", Path("new")), names=("new", "Permission denied"))


def test_reuse_keeps_the_same(
    workshop: Workshop, bundle: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(place)
    for words in (("--reuse",), ("--reuse", "--overwrite")):
        assert main(compress(workshop, "int4", bundle, *words)) == 0
        assert f"reusing {bundle}" in capsys.readouterr().out
        assert snapshot(place) == before


def test_reuse_keeps_the_same_export(workshop: Workshop, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, graphs = workshop.compressed / "int4", ("--prefill-buckets", "8", "32")
    shutil.copytree(workshop.bundles / "int4", place / "bundle")
    before = snapshot(place)
    assert main(["export", str(model), "--out", "bundle", "--reuse", *graphs]) == 0
    assert "reusing bundle" in capsys.readouterr().out and snapshot(place) == before
    # Other graphs are other work.
    assert main(["export", str(model), "--out", "bundle", "--reuse", "--prefill-buckets", "8"]) == 2
    assert "graphs" in capsys.readouterr().err and snapshot(place) == before
    assert main(["export", str(model), "--out", "bundle", "--reuse", "--overwrite", "--prefill-buckets", "8"]) == 0
    assert "is made again" in capsys.readouterr().out
    assert {graph.name for graph in read_bundle("bundle").manifest.graphs} == {"decode", "prefill_8"}


def test_another_recipe_is_not_reused(
    workshop: Workshop, bundle: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(*compress(workshop, "int8", bundle, "--reuse"), names=("int4", "recipe", "--overwrite"))
    assert main(compress(workshop, "int8", bundle, "--reuse", "--overwrite")) == 0
    assert "its recipe is another" in capsys.readouterr().out
    assert read_bundle(bundle).manifest.extra["recipe_name"] == "int8"


def test_what_other_sources_made_is_not_reused(
    workshop: Workshop,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Refuse,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A solver that was changed makes something else of the same recipe."""
    monkeypatch.setattr("hsai.cli.compress.digest_sources", lambda: "others")
    refuse(*compress(workshop, "int4", bundle, "--reuse"), names=("int4", "its sources_sha256 is another"))
    assert main(compress(workshop, "int4", bundle, "--reuse", "--overwrite")) == 0
    assert "its sources_sha256 is another" in capsys.readouterr().out
    assert read_bundle(bundle).manifest.extra["sources_sha256"] == "others"


def test_another_step_is_not_reused(workshop: Workshop, bundle: Path, place: Path, refuse: Refuse) -> None:
    shutil.copytree(workshop.run, place / "run")
    shutil.rmtree(place / "run" / "checkpoints" / "6")  # the newest is now the one of step 5
    words = ("compress", "run", "--recipe", recipe("int4"), "--out", bundle, "--reuse")
    refuse(*words, names=("source_sha256",))
    assert main([*map(str, words), "--overwrite"]) == 0
    assert read_bundle(bundle).manifest.extra["step"] == 5


@pytest.mark.parametrize("damage", ["weights", "manifest"])
def test_a_damaged_bundle_is_not_reused(damage: str, workshop: Workshop, bundle: Path, refuse: Refuse) -> None:
    path = bundle / ("weights.safetensors" if damage == "weights" else "manifest.json")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 1] = b"\x00"
    path.write_bytes(content)
    refuse(*compress(workshop, "int4", bundle, "--reuse"), names=(path.name, "--overwrite makes it again"))
    assert main(compress(workshop, "int4", bundle, "--reuse", "--overwrite")) == 0
    assert read_bundle(bundle).manifest.files == read_bundle(workshop.compressed / "int4").manifest.files


@pytest.mark.parametrize(("module", "function"), [(hsai.export.bundle, "write_manifest"), (hsai.files, "_publish")])
def test_overwriting_that_fails_keeps_the_old(
    module: ModuleType, function: str, workshop: Workshop, bundle: Path, monkeypatch: pytest.MonkeyPatch, refuse: Refuse
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, function, fail)
    refuse(*compress(workshop, "int8", bundle, "--overwrite"), names=("No space left on device",))
    read_bundle(bundle)


def test_a_bundle_may_replace_itself(workshop: Workshop, bundle: Path) -> None:
    assert main(["export", str(bundle), "--out", str(bundle), "--overwrite", "--prefill-buckets", "8"]) == 0
    assert read_bundle(bundle).manifest.graphs
