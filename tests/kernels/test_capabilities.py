"""The tables of what compiles: stored and read back, compared with rows just compiled, and written for people.

Without a compiler: test_aot.py has one, and compares what it says; test_programs.py compares all tiles.
"""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import hsai_kernels.ops
from hsai_kernels import attention, capabilities, native
from hsai_kernels.aot import runner
from hsai_kernels.aot.case import Case, Target
from hsai_kernels.aot.pins import list_pins
from hsai_kernels.aot.runner import TARGETS
from hsai_kernels.capabilities import find_refusal, name_chip
from hsai_kernels.capabilities.served import explain_missing, list_calls
from hsai_kernels.dispatch import BackendMissing, compile_for
from hsai_kernels.ops.attention.tpu_blocks import choose_blocks
from scripts.write_capabilities import PAGE, explain_stale, render_page


def row(chip="v5e", outcome="compiles", reason=None, rows=8, dtype="float32"):
    return {
        "kernel": "attention forward",
        "case": "ragged",
        "dtype": dtype,
        "chip": chip,
        "shape": "head dim 64",
        "tile": {"rows": rows, "keys": 128},
        "outcome": outcome,
        "reason": reason,
        "seconds": 3.2,
    }


@pytest.fixture
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(capabilities, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("empty_folder")
def test_what_is_stored_is_read_back_without_what_depends_on_the_machine():
    rows = [row(), row(chip="v6e", outcome="refused", reason='no "room"')]
    path = capabilities.write_capabilities("tpu", "libtpu 1", rows)
    assert capabilities.list_platforms() == ["tpu"]
    assert capabilities.read_compiler("tpu") == "libtpu 1"
    expected = [{field: r[field] for field in capabilities.STORED} for r in rows]
    assert capabilities.read_capabilities("tpu") == expected
    assert "seconds" not in path.read_text()
    assert len(json.loads(path.read_text())["rows"]) == 2


@pytest.mark.parametrize(
    ("found", "differences"),
    [
        (row(), []),
        (row(rows=16), ["v5e: tile is {'rows': 16, 'keys': 128} (None), stored {'rows': 8, 'keys': 128}"]),
        (row(outcome="refused", reason="no room"), ["outcome is 'refused' (no room), stored 'compiles'"]),
        (row(chip="v7"), ["attention forward, ragged, float32, v7: not stored"]),
    ],
)
def test_differences_are_named(found, differences):
    named = capabilities.find_differences([found], [row(), row(chip="v6e")])
    assert len(named) == len(differences)
    for difference, expected in zip(named, differences, strict=True):
        assert difference.endswith(expected)


@pytest.mark.usefixtures("empty_folder")
def test_the_table_has_a_column_a_chip_and_the_reasons_under_it():
    rows = [row(), row(chip="v6e", outcome="refused", reason="no room"), row(dtype="bfloat16")]
    capabilities.write_capabilities("tpu", "libtpu 1", rows)
    lines = capabilities.render_markdown("tpu").splitlines()
    assert lines[0].endswith("| v5e | v6e |")
    assert lines[2] == "| attention forward | ragged | float32 | 8 rows, 128 keys | compiles | refused |"
    assert lines[3] == "| attention forward | ragged | bfloat16 | 8 rows, 128 keys | compiles |  |"
    assert lines[-1] == "- attention forward, ragged, float32, v6e: no room"


def test_the_page_is_that_of_the_stored_tables():
    assert PAGE.read_text() == render_page(), "run scripts/write_capabilities.py"


@pytest.mark.parametrize("platform", TARGETS)
def test_the_stored_tables_are_of_the_pinned_compilers(platform):
    """Those that scripts/install_aot.sh brings, and each of one version."""
    assert explain_stale(platform) is None
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) for pin in list_pins(platform))


@pytest.mark.usefixtures("empty_folder")
def test_a_table_of_another_compiler_says_what_to_run():
    capabilities.write_capabilities("tpu", "libtpu 1", [row()])
    assert re.search("the rows are of libtpu 1, .*: run scripts/write_capabilities.py tpu$", explain_stale("tpu"))


def test_a_jax_that_asks_for_another_compiler_has_it(monkeypatch):
    """And the tables are not of that one."""
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ["numpy>=2", 'libtpu==0.0.99.*; extra == "tpu"'])
    assert list_pins("tpu") == ["libtpu==0.0.99.*"]
    assert explain_stale("tpu") is not None


@pytest.mark.parametrize("platform", TARGETS)
def test_the_stored_tables_have_a_row_for_every_case_and_chip(platform):
    target = TARGETS[platform]
    cases = [(case.kernel, case.name, case.dtype) for case in target.list_cases(target.kernels, quick=False)]
    stored = [capabilities.identify(row) for row in capabilities.read_capabilities(platform)]
    assert sorted(stored) == sorted((*case, chip) for case in cases for chip in target.chips)


@pytest.mark.usefixtures("empty_folder")
def test_only_what_has_no_row_is_compiled_if_that_is_asked_for(monkeypatch):
    capabilities.write_capabilities("tpu", "libtpu 1", [row()])
    monkeypatch.setattr(runner, "compile_case", lambda target, case, chip, device: (case.dtype, chip))
    cases = [
        Case(kernel="attention forward", name="ragged", dtype=dtype, function=jnp.sin, operands=())
        for dtype in ("float32", "bfloat16")
    ]
    target = Target(
        platform="tpu", chips=("v5e", "v6e"), find_device=str, describe=str, lists={"attention": lambda: iter(cases)}
    )
    compile_cases = functools.partial(runner.compile_cases, target, target.chips, target.kernels, quick=False)
    absent = [("bfloat16", "v5e"), ("float32", "v6e"), ("bfloat16", "v6e")]
    assert list(compile_cases(missing=True)) == absent
    assert list(compile_cases(missing=False)) == [("float32", "v5e"), *absent]


CALLS = {call.name: call for call in list_calls()}


def test_every_api_is_among_the_calls_and_takes_them():
    folders = {path.parent.name for path in Path(hsai_kernels.ops.__file__).parent.glob("*/api.py")}
    assert {name.split(",")[0].split()[0] for name in CALLS} == folders | {"cross_entropy_sum"}
    for call in CALLS.values():
        function = functools.partial(call.function, implementation="reference")
        jax.eval_shape(lambda operands, function=function: function(**operands), dict(call.operands))


ROUNDED = "activations rounded to int8"


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("attention, int4 cache", {"cpu": None, "gpu": None, "tpu": None}),
        ("quantized_matmul int4 from a minimum", {"cpu": None, "gpu": None, "tpu": None}),
        ("quantized_matmul int2 (ternary)", {"cpu": None, "gpu": "codes of -8 to 7 only", "tpu": None}),
        (f"quantized_matmul int2 (ternary), {ROUNDED}", {"cpu": None, "gpu": None, "tpu": None}),
        (f"quantized_matmul int3, centered, {ROUNDED}", {"cpu": None, "gpu": None, "tpu": None}),
        (f"quantized_matmul int8, {ROUNDED}", {"cpu": None, "gpu": None, "tpu": None}),
        (f"quantized_matmul int4, {ROUNDED}", {"cpu": None, "gpu": None, "tpu": None}),
        ("quantized_matmul int8", {"cpu": None, "gpu": None, "tpu": None}),
        ("sparse_matmul 1:4 bfloat16", {"cpu": None, "gpu": None, "tpu": None}),
        ("sparse_matmul 3:4 int4", {"cpu": None, "gpu": None, "tpu": None}),
        (f"sparse_matmul 2:4 int4, {ROUNDED}", {"cpu": None, "gpu": "not rounded to 8", "tpu": "not rounded to 8"}),
        ("sparse_matmul V:2:8 int4", {"cpu": None, "gpu": None, "tpu": None}),
        ("sparse_matmul V:2:8 bfloat16", {"cpu": "of integers only", "gpu": None, "tpu": None}),
        ("sparse_matmul V:2:8 int8", {"cpu": None, "gpu": "not int8 values", "tpu": "not int8 values"}),
        ("cross_entropy", {"cpu": "there is none", "gpu": "there is none", "tpu": None}),
    ],
)
def test_what_has_no_kernel_says_why(monkeypatch, name, reasons):
    """Whether or not the native library was built here."""

    def refuse():
        raise BackendMissing("not built")

    monkeypatch.setattr(native, "load_library", refuse)
    for platform, reason in reasons.items():
        found = explain_missing(CALLS[name], platform)
        assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("device_kind", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A10", None),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("TPU v4", None),
        ("cpu", None),
    ],
)
def test_devices_have_the_tables_names(device_kind, chip):
    assert name_chip(device_kind) == chip


@pytest.mark.usefixtures("empty_folder")
def test_a_refusal_is_of_a_chip_a_dtype_a_shape_and_a_tile():
    rows = [row(), row(chip="v6e", outcome="refused", reason="no room"), row(chip="v6e", rows=16, outcome="spills")]
    capabilities.write_capabilities("tpu", "libtpu 1", rows)
    at = {"kernel": "attention forward", "dtype": "float32", "shape": "head dim 64", "tile": {"keys": 128, "rows": 8}}
    assert find_refusal("tpu", "TPU v6 lite", **at) == "v6e: refused (no room)"
    assert find_refusal("tpu", "TPU v6 lite", **(at | {"tile": {"rows": 16, "keys": 128}})) == "v6e: spills (None)"
    for platform, device_kind, other in (
        ("tpu", "TPU v5 lite", {}),
        ("tpu", "TPU v9", {}),
        ("tpu", None, {}),
        ("gpu", "NVIDIA H100 80GB HBM3", {}),
        ("tpu", "TPU v6 lite", {"dtype": "bfloat16"}),
        ("tpu", "TPU v6 lite", {"shape": "head dim 128"}),
        ("tpu", "TPU v6 lite", {"tile": {"rows": 8, "keys": 256}}),
    ):
        assert find_refusal(platform, device_kind, **(at | other)) is None


@pytest.mark.usefixtures("empty_folder")
def test_the_automatic_choice_falls_through_where_the_table_refuses():
    """For a v6e the next backend serves what its compiler refuses; other chips, and unknown ones, take the kernel."""
    blocks, _ = choose_blocks(600, 600, 64, "float32")
    refused = row(chip="v6e", outcome="refused", reason="no room in vmem")
    refused |= {"shape": "head dim 128", "tile": {"rows": blocks[0], "keys": blocks[1]}}
    capabilities.write_capabilities("tpu", "libtpu 1", [refused])
    q = jax.ShapeDtypeStruct((1, 600, 1, 64), jnp.float32)
    at = jax.ShapeDtypeStruct((1, 600), jnp.int32)

    def trace(implementation=None):
        return str(
            jax.make_jaxpr(
                lambda q, at: attention(q, q, q, q_positions=at, kv_positions=at, implementation=implementation)
            )(q, at)
        )

    for device_kind, taken in (("TPU v6 lite", False), ("TPU v5 lite", True), ("TPU v9", True), (None, True)):
        with compile_for("tpu", device_kind):
            assert ("pallas_call" in trace()) is taken
    with compile_for("tpu", "TPU v6 lite"), pytest.raises(NotImplementedError, match="v6e: refused .no room in vmem"):
        trace("tpu")
