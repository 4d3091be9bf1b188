"""`hsai export`: what it makes, and what it refuses before anything is made."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hsai.cli import main
from hsai.export.manifest import read_manifest
from tests.cli.conftest import RECIPES, Workshop

Refuse = Callable[..., str]


def test_bundles_hold_graphs_and_their_origin(workshop: Workshop) -> None:
    for name in RECIPES:
        manifest, source = read_manifest(workshop.bundles / name), read_manifest(workshop.compressed / name)
        assert sorted(graph.name for graph in manifest.graphs) == ["decode", "prefill_32", "prefill_8"]
        assert manifest.files["weights.safetensors"] == source.files["weights.safetensors"]
        assert manifest.extra["recipe"] == source.extra["recipe"] and manifest.extra["step"] == 6


def test_a_run_is_exported_as_it_is(workshop: Workshop, place: Path) -> None:
    assert main(["export", str(workshop.run), "--out", "dense", "--prefill-buckets", "8", "--cache", "int8"]) == 0
    manifest = read_manifest(Path("dense"))
    assert manifest.extra["run"] == "run" and manifest.extra["graphs"]["cache"] == "int8"
    for graph in manifest.graphs:
        kinds = {array.name: array.dtype for array in graph.inputs}
        assert (kinds["keys"], kinds["value_scales"]) == ("int8", "float32")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--prefill-buckets", "0"), ("prefill_buckets: 0", "at least 1")),
        (("--prefill-buckets", "8", "129"), ("--prefill-buckets 129", "128")),
        (("--prefill-buckets",), ("--prefill-buckets", "at least one")),
        (("--cache", "int2"), ("--cache", "'int2'", "'activations', 'bfloat16', 'int8', 'int4'")),
    ],
)
def test_graphs_that_cannot_be(
    words: tuple[str, ...], names: tuple[str, ...], workshop: Workshop, refuse: Refuse
) -> None:
    model = workshop.compressed / "int4"
    refuse("export", model, "--out", "out", *words, names=names, beside=(model,))


def test_all_models_are_checked_before_the_first(workshop: Workshop, refuse: Refuse) -> None:
    model = workshop.compressed / "int4"
    refuse("export", model, "nowhere", "--out", "out", names=("nowhere", "does not exist"), beside=(model,))
    refuse("export", model, model, "--out", "out", names=("share a name",), beside=(model,))


def test_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch, workshop: Workshop, refuse: Refuse) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    words = (workshop.compressed / "int4", "--out", "a/b", "--prefill-buckets", "8")
    refuse("export", *words, names=("No space left on device",))
