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


def test_graphs_of_another_version_and_with_kernels(workshop: Workshop, place: Path) -> None:
    """The version is what stands in the module's head; the manifest names what a runtime must bring."""
    words = ("--prefill-buckets", "8", "--stablehlo-version", "1.0.0", "--kernels", "cpu", "cuda")
    assert main(["export", str(workshop.compressed / "int4"), "--out", "out", *words]) == 0
    manifest = read_manifest(Path("out"))
    assert manifest.extra["graphs"]["stablehlo_version"] == "1.0.0"
    portable = [graph for graph in manifest.graphs if graph.kernels is None]
    assert [graph.name for graph in portable] == ["prefill_8", "decode"]
    for graph in portable:
        assert (graph.stablehlo_version, graph.custom_calls) == ("1.0.0", ())
        assert (Path("out") / graph.stablehlo_file).read_bytes().startswith(b"ML\xefR\rStableHLO_v1.0.0\0")
    calls = {(graph.kernels, graph.name): graph.custom_calls for graph in manifest.graphs if graph.kernels is not None}
    assert {target for target, _ in calls} == {"cpu", "cuda"} and len(calls) == 4
    for (target, _), names in calls.items():
        assert names and all(name.startswith("hsai_" if target == "cpu" else "__gpu$xla.gpu.triton") for name in names)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--prefill-buckets", "0"), ("prefill_buckets: 0", "at least 1")),
        (("--prefill-buckets", "8", "129"), ("--prefill-buckets 129", "128")),
        (("--prefill-buckets",), ("--prefill-buckets", "at least one")),
        (("--stablehlo-version", "0.0.1"), ("stablehlo_version='0.0.1'", "valid are 0.9.0 to ")),
        (("--stablehlo-version", "99.0.0"), ("stablehlo_version='99.0.0'", "valid are 0.9.0 to ")),
        (("--stablehlo-version", "latest"), ("stablehlo_version='latest'", "valid are 0.9.0 to ")),
        (("--kernels", "cpu", "tpu"), ("--kernels", "'tpu'", "'tpu-v5e'")),
        (("--kernels", "cpu", "cpu"), ("kernels=cpu, cpu", "twice")),
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
