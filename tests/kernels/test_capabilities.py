"""The tables of what compiles: stored and read back, compared with rows just compiled, and written for people."""

import json

import pytest

from hsai_kernels import capabilities


def row(chip="v5e", outcome="compiles", reason=None, tile="8x128", dtype="float32"):
    return {
        "kernel": "attention forward",
        "case": "ragged",
        "dtype": dtype,
        "chip": chip,
        "tile": tile,
        "outcome": outcome,
        "reason": reason,
        "seconds": 3.2,
    }


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(capabilities, "FOLDER", tmp_path)
    return tmp_path


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
        (row(tile="16x128"), ["attention forward, ragged, float32, v5e: tile is '16x128' (None), stored '8x128'"]),
        (row(outcome="refused", reason="no room"), ["outcome is 'refused' (no room), stored 'compiles'"]),
        (row(chip="v7"), ["attention forward, ragged, float32, v7: not stored"]),
    ],
)
def test_differences_are_named(found, differences):
    named = capabilities.find_differences([found], [row(), row(chip="v6e")])
    assert len(named) == len(differences)
    for difference, expected in zip(named, differences, strict=True):
        assert difference.endswith(expected)


def test_the_table_has_a_column_a_chip_and_the_reasons_under_it():
    rows = [row(), row(chip="v6e", outcome="refused", reason="no room"), row(dtype="bfloat16")]
    capabilities.write_capabilities("tpu", "libtpu 1", rows)
    lines = capabilities.render_markdown("tpu").splitlines()
    assert lines[0].endswith("| v5e | v6e |")
    assert lines[2] == "| attention forward | ragged | float32 | 8x128 | compiles | refused |"
    assert lines[3] == "| attention forward | ragged | bfloat16 | 8x128 | compiles |  |"
    assert lines[-1] == "- attention forward, ragged, float32, v6e: no room"
