"""Bundles: what is written is read back, nothing is half written, and no damage is believed."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export import GraphConfig, read_bundle, write_bundle
from hsai.export import bundle as bundles
from hsai.files import sha256
from hsai.formats import DenseConfig
from hsai.formats.storage import describe, named_arrays, named_weights, replace_weights
from hsai.interop.safetensors_file import map_tensors
from hsai.models import Transformer
from hsai.sharding import MeshConfig, make_mesh, tree_shardings, use_mesh
from tests.export.manifests import edit
from tests.export.tiny_models import FORMATS, make_model, snapshot

WEIGHTS = "weights.safetensors"


def refusal(directory: Path, **options: Any) -> str:
    """The one line with which `read_bundle` refuses."""
    with pytest.raises(InputError) as caught:
        read_bundle(directory, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_arrays(one: Transformer, other: Transformer) -> None:
    first, second = named_arrays(one), named_arrays(other)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert np.asarray(first[name]).tobytes() == np.asarray(second[name]).tobytes(), name


def change_weights(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Changes the arrays of a bundle and lists the new file, as a faulty writer would."""
    path = directory / WEIGHTS
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path)
    relist(directory, WEIGHTS)


def relist(directory: Path, name: str) -> None:
    path = directory / name
    record = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    edit(directory / "manifest.json", lambda content: content["files"].update({name: record}))


@pytest.mark.parametrize("format_name", FORMATS)
def test_bundle_returns_what_was_written(format_name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = make_model(format_name, qk_norm=True, tie_embeddings=False, sliding_window=7)
    written = write_bundle(tmp_path / "b", model, tokenizer, extra={"source": "runs/a", "bits": 4.5, "steps": [1, 2]})
    bundle = read_bundle(tmp_path / "b")
    assert bundle.config == model.config
    assert bundle.manifest == written
    assert bundle.manifest.extra == {"source": "runs/a", "bits": 4.5, "steps": [1, 2]}
    assert describe(bundle.model) == describe(model)
    assert_same_arrays(bundle.model, model)
    assert bundle.tokenizer.eot == tokenizer.eot
    assert bundle.tokenizer.encode("def 数据 x") == tokenizer.encode("def 数据 x")


def test_weights_stay_in_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """On a CPU no array is copied, whatever sizes there are, but for those that fill no whole lines of memory."""
    write_bundle(tmp_path / "b", make_model("nm_int4", vocab=515), tokenizer)
    arrays = named_arrays(read_bundle(tmp_path / "b").model)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "b") in line]
    ranges = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in maps]
    copied = [
        array.nbytes
        for array in arrays.values()
        if not any(first <= array.unsafe_buffer_pointer() < last for first, last in ranges)
    ]
    assert ranges and all(size % 64 for size in copied) and len(copied) < len(arrays) / 4


def test_a_bundle_that_is_replaced_while_it_is_read_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of the same shapes, and neither manifest says that they are the other's."""
    model = make_model("int8")
    other = jax.tree.map(lambda leaf: leaf[..., ::-1], model)
    write_bundle(tmp_path / "b", model, tokenizer)

    def replace_and_map(path: Path) -> dict[str, np.ndarray]:
        write_bundle(tmp_path / "b", other, tokenizer, overwrite=True)
        return map_tensors(path)

    monkeypatch.setattr(bundles, "map_tensors", replace_and_map)
    assert f"{tmp_path / 'b'} was replaced while it was read" in refusal(tmp_path / "b")


def test_bundle_keeps_bfloat16(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = make_model("dense", dtype="bfloat16")
    model = replace_weights(model, {n: DenseConfig().pack(p.get_value()) for n, p in named_weights(model).items()})
    write_bundle(tmp_path / "b", model, tokenizer)
    assert_same_arrays(read_bundle(tmp_path / "b").model, model)


def test_sharded_model_is_gathered_and_read_to_one_device(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = make_model("int4")
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, model=2))) as mesh:
        sharded = jax.device_put(model, tree_shardings(model, mesh))
    assert len(jax.tree.leaves(sharded)[0].devices()) == 8
    write_bundle(tmp_path / "b", sharded, tokenizer, graphs=GraphConfig(prefill_buckets=(8,)))
    read = read_bundle(tmp_path / "b").model
    assert_same_arrays(read, model)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(read)} == {1}


def test_manifest_lists_every_file_and_graphs_are_optional(plain: Path) -> None:
    on_disk = {str(path.relative_to(plain)) for path in plain.rglob("*") if path.is_file()}
    assert on_disk == {"manifest.json", WEIGHTS, "tokenizer.json"}
    manifest = read_bundle(plain).manifest
    assert set(manifest.files) == on_disk - {"manifest.json"}
    assert manifest.graphs == ()
    assert manifest.created_by["jax"] == jax.__version__


def test_existing_directory_is_refused_and_left_alone(copy: Path, tokenizer: Tokenizer) -> None:
    before = snapshot(copy.parent)
    with pytest.raises(InputError, match=re.escape(f"{copy} exists; choose another name, or say --overwrite")):
        write_bundle(copy, make_model("int8"), tokenizer)
    assert snapshot(copy.parent) == before


def test_overwrite_replaces_the_whole_bundle(copy: Path, tokenizer: Tokenizer) -> None:
    (copy / "stale").write_text("of the old bundle")
    write_bundle(copy, make_model("int8"), tokenizer, overwrite=True)
    assert read_bundle(copy).manifest.weights["embed"] == {"format": "int8"}
    assert not (copy / "stale").exists()
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_overwrite_spares_what_is_no_bundle(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="is not overwritten: it has no manifest.json"):
        write_bundle(tmp_path / "home", make_model(), tokenizer, overwrite=True)
    with pytest.raises(InputError, match="is a file; give the name of a directory"):
        write_bundle(tmp_path / "file", make_model(), tokenizer, overwrite=True)
    assert snapshot(tmp_path) == before


def test_failed_write_leaves_the_old_bundle_and_nothing_else(copy: Path, tokenizer: Tokenizer) -> None:
    before = snapshot(copy.parent)
    with pytest.raises(TypeError):
        write_bundle(copy, make_model("int8"), tokenizer, extra={"not JSON": object()}, overwrite=True)
    assert snapshot(copy.parent) == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_failed_rename_puts_the_old_bundle_back(
    copy: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = snapshot(copy.parent), os.rename

    def fail_to_publish(source: Path, target: Path) -> None:
        if target == copy and not source.name.endswith(".old"):
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_to_publish)
    with pytest.raises(OSError, match="disk gone"):
        write_bundle(copy, make_model("int8"), tokenizer, overwrite=True)
    assert snapshot(copy.parent) == before


def test_what_does_not_fit_is_refused_before_anything_is_made(tmp_path: Path, tokenizer: Tokenizer) -> None:
    target = tmp_path / "new" / "b"
    with pytest.raises(InputError, match="the tokenizer has 280 tokens, more than model.vocab=256"):
        write_bundle(target, make_model(vocab=256), tokenizer)
    with pytest.raises(InputError, match="context=49 exceeds the model's max_length=48"):
        write_bundle(target, make_model(), tokenizer, graphs=GraphConfig(context=49))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_damaged_file_is_named(name: str, copy: Path) -> None:
    path = copy / name
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    assert f"{path} is truncated: it has {len(content) - 7} bytes, and the manifest says {len(content)}" in refusal(
        copy
    )
    path.write_bytes(content + b" ")
    assert f"{path} is altered: it has {len(content) + 1} bytes" in refusal(copy)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert f"{path} is altered: its SHA-256 is" in refusal(copy)
    path.unlink()
    assert f"{path} is missing from the bundle" in refusal(copy)


def test_verification_can_be_limited_to_sizes(copy: Path) -> None:
    path = copy / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    read_bundle(copy, verify=False)
    path.write_bytes(content[:-1])
    assert "is truncated" in refusal(copy, verify=False)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'} is not a bundle: there is no such directory"
    assert refusal(tmp_path) == f"{tmp_path} is not a bundle: it has no manifest.json"


def cut_scale(arrays: dict[str, np.ndarray]) -> None:
    arrays["embed.scale"] = arrays["embed.scale"][:, :-1].copy()


def spoil(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    """Puts a value into an array, at its second place."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name].reshape(-1)[1] = value

    return change


def widen_words(arrays: dict[str, np.ndarray]) -> None:
    arrays["layers.mlp.up.words"] = arrays["layers.mlp.up.words"].astype(np.float32)


def cut_gain(arrays: dict[str, np.ndarray]) -> None:
    arrays["final_norm.gain"] = arrays["final_norm.gain"][:-1].copy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("layers.mlp.up.scale"), "array 'layers.mlp.up.scale' is missing"),
        (lambda arrays: arrays.pop("final_norm.gain"), "array 'final_norm.gain' is missing"),
        (lambda arrays: arrays.update(extra=np.zeros(1)), "array 'extra' is unknown"),
        (cut_gain, r"'final_norm.gain' has shape \[127\], the model needs \[128\]"),
        (cut_scale, "'embed'"),
        (widen_words, "float32"),
        (spoil("embed.scale", np.nan), r"'embed.scale' holds nan at \[0, 1\], and it must be finite"),
        (
            spoil("layers.mlp.up.scale", np.inf),
            r"'layers.mlp.up.scale' holds inf at \[0, 0, 1\].*\(1 of \d+ numbers are",
        ),
        (spoil("final_norm.gain", np.nan), r"'final_norm.gain' holds nan at \[1\], and it must be finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, np.ndarray]], Any], message: str, copy: Path
) -> None:
    change_weights(copy, change)
    line = refusal(copy)
    assert re.search(message, line), line
    assert str(copy) in line


def test_weights_that_are_no_safetensors_are_refused(copy: Path) -> None:
    (copy / WEIGHTS).write_bytes(b"\xff" * 100)
    relist(copy, WEIGHTS)
    assert "weights.safetensors is not a safetensors file" in refusal(copy)


def test_record_of_another_format_is_refused(copy: Path) -> None:
    edit(copy / "manifest.json", lambda content: content["weights"]["embed"].update(format="int5"))
    assert "'embed' has the unknown format 'int5'; known: dense, int8" in refusal(copy)
    edit(copy / "manifest.json", lambda content: content["weights"].pop("embed"))
    assert "'embed' is missing" in refusal(copy)


def test_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    edit(copy / "manifest.json", lambda content: content["tokenizer"].update(end_of_text="</s>"))
    assert "has no token '</s>'" in refusal(copy)
