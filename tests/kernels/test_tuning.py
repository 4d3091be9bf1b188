"""tuning.py: whose tile a kernel is traced with, the file that tuned ones are stored in, and what cannot be used."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from hsai_kernels import attention, tuning
from hsai_kernels.aot.runner import TARGETS
from hsai_kernels.dispatch import compile_for
from hsai_kernels.tuning import choose_tile, name_device, read_tuned, record_tiles, use_tiles, write_tuned

H100, V5E = "NVIDIA H100 80GB HBM3", "TPU v5 lite"
KEY = ("attention forward", "float32", "head dim 64")
GPU_TILE = {"rows": 64, "keys": 16, "warps": 4, "stages": 1}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    return tmp_path / "tuned"


def trace(implementation, length=1024):
    """The program of an attention's forward pass."""
    q = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
    at = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def run(q, at):
        return attention(q, q, q, q_positions=at, kv_positions=at, implementation=implementation)

    return str(jax.make_jaxpr(run)(q, at))


def list_grids(program):
    return [tuple(map(int, re.findall(r"\d+", grid))) for grid in re.findall(r"grid=\(([^)]*)\)", program)]


def test_a_tuned_tile_is_the_one_that_is_compiled_for_its_device(folder):
    with compile_for("gpu", H100):
        (own,) = list_grids(trace("gpu"))
        path = write_tuned(name_device(), "a test", {KEY: GPU_TILE | {"rows": 16}})
        (tuned,) = list_grids(trace("gpu"))
    assert path == folder / "nvidia_h100_80gb_hbm3.json"
    assert own[0] == 1024 // 64 and tuned[0] == 1024 // 16
    for other in ("NVIDIA A100-SXM4-80GB", None):
        with compile_for("gpu", other):
            assert list_grids(trace("gpu")) == [own]


def test_a_tuned_tile_changes_a_tpu_kernel_too():
    with compile_for("tpu", V5E):
        before = list_grids(trace("tpu"))[0]
        write_tuned(
            name_device(), "a test", {("attention forward", "float32", "head dim 128"): {"rows": 128, "keys": 128}}
        )
        after = list_grids(trace("tpu"))[0]
    assert after[2:] == (8, 8) and before[2:] != after[2:]


def test_a_tuned_tile_changes_plain_jax_here():
    own = trace("chunked")
    write_tuned(
        name_device(), "a test", {("attention chunked", "float32", "head dim 64"): {"queries": 128, "keys": 256}}
    )
    assert "128,256]" not in own and "128,256]" in trace("chunked")


@pytest.mark.parametrize("platform", list(TARGETS))
def test_every_accelerated_kernel_reads_its_tile_from_here(platform):
    """Each case of the capability tables says by which tile it was compiled, in the words that a tuned one has."""
    jax.clear_caches()  # what another test traced would not be traced again
    target = TARGETS[platform]
    first = {case.kernel: case for case in target.list_cases(target.kernels, quick=False)}
    for kernel, case in first.items():
        with compile_for(platform), use_tiles(case.tiles), record_tiles() as used:
            jax.eval_shape(case.function, *case.operands)
        assert used, kernel
        assert kernel == "attention gradient" or kernel in {use.kernel for use in used}


def test_tiles_of_a_context_come_first_and_are_traced_anew():
    program = jax.jit(lambda: choose_tile("k", dtype="float32", shape="s", own={"rows": 8})["rows"] * jnp.ones(()))
    write_tuned(name_device(), "a test", {("k", "float32", "s"): {"rows": 16}})
    assert program() == 16
    with use_tiles({("k", "float32", "s"): {"rows": 32}}), record_tiles() as used:
        assert program() == 32
        with use_tiles({("other", "float32", "s"): {"rows": 64}}):  # adds to those around
            assert choose_tile("k", dtype="float32", shape="s", own={"rows": 8}) == {"rows": 32}
    assert program() == 16
    assert [(use.key, use.asked) for use in used] == [(("k", "float32", "s"), {"rows": 32})] * 2


def test_a_record_around_another_goes_on():
    with record_tiles() as around:
        for rows in (8, 16):
            with record_tiles() as inside:
                choose_tile("k", dtype="float32", shape="s", own={"rows": rows})
    assert [use.asked for use in around] == [{"rows": 8}, {"rows": 16}]
    assert [use.asked for use in inside] == [{"rows": 16}]


def test_what_is_stored_joins_what_was_there(folder):
    write_tuned("chip", "first", {("k", "float32", "s"): {"rows": 8}, ("k", "bfloat16", "s"): {"rows": 8}})
    path = write_tuned("chip", "second", {("k", "float32", "s"): {"rows": 16}})
    assert read_tuned("chip") == {("k", "float32", "s"): {"rows": 16}, ("k", "bfloat16", "s"): {"rows": 8}}
    assert json.loads(path.read_text())["command"] == "second"
    assert read_tuned("another") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no file of tuned tiles .JSONDecodeError"),
        ("[]", "no file of tuned tiles .TypeError"),
        ('{"tiles": [{"kernel": "k"}]}', "no file of tuned tiles .KeyError: 'dtype'"),
        ('{"tiles": [{"kernel": "k", "dtype": "d", "shape": "s", "tile": {"rows": 0}}]}', "rows of k, d, s is 0, must"),
        ('{"tiles": [{"kernel": "k", "dtype": "d", "shape": "s", "tile": {"rows": "8"}}]}', "rows of k, d, s is '8'"),
    ],
)
def test_a_malformed_file_is_named(folder, content, message):
    folder.mkdir()
    (folder / "chip.json").write_text(content)
    with pytest.raises(ValueError, match=f"chip.json.*{message}"):
        read_tuned("chip")


def test_a_tile_of_other_sides_is_refused():
    with compile_for("tpu", V5E):
        write_tuned(name_device(), "a test", {("attention forward", "float32", "head dim 128"): {"rows": 128}})
        with pytest.raises(ValueError, match=r"tpu_v5_lite.json: the tile of attention forward, .*\['rows'\], needs"):
            trace("tpu")


def test_the_device_here_has_a_name_with_its_cores():
    assert re.fullmatch(r"[a-z0-9_]+_\d+_cores", name_device())
    with compile_for("gpu"):
        assert name_device() is None


def test_the_stored_table_bars_what_the_compiler_refused():
    """Of the tiles that tuning would try on an A100, the kernel's own with twice the rows spills; an H100 has room."""
    q = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    at = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    tile = {"rows": 256, "keys": 64, "warps": 8, "stages": 3}

    def trace():
        return jax.make_jaxpr(lambda q, at: attention(q, q, q, q_positions=at, kv_positions=at))(q, at)

    with use_tiles({("attention forward", "bfloat16", "head dim 64"): tile}):
        with compile_for("gpu", H100):
            assert "pallas_call" in str(trace())
        with compile_for("gpu", "NVIDIA A100-SXM4-80GB"), pytest.raises(ValueError, match="a100: spills .*register"):
            trace()
    with compile_for("gpu", "NVIDIA A100-SXM4-80GB"):
        assert "pallas_call" in str(trace())
