"""`hsai eval`: rows that can be compared, and what it refuses before anything is measured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsai.cli import main
from hsai.cli.eval import describe_size, make_tables
from hsai.cli.speed import measure_speed
from hsai.export.source import open_model
from tests.cli.conftest import SHORT, TINY, Workshop

Refuse = Callable[..., str]


def test_rows(workshop: Workshop, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(workshop.run), *(str(workshop.bundles / name) for name in ("bf16", "int4"))]
    assert main(["eval", *models, "--tokens", "1000", "--speed", "--json", "rows.json"]) == 0
    table = capsys.readouterr().out
    written = json.loads((place / "rows.json").read_text())
    dense, bf16, int4 = written["rows"]
    assert [row["model"] for row in written["rows"]] == ["run", "bf16", "int4"]
    assert all(name in table for name in ("run", "bf16", "int4", "decode tokens/s", "1.000x"))
    trained = json.loads((workshop.run / "result.json").read_text())
    assert dense["heldout_tokens"] == trained["heldout_tokens"] == 1000
    assert dense["heldout_bits_per_byte"] == pytest.approx(trained["heldout_bits_per_byte"], rel=1e-5)
    assert bf16["heldout_bits_per_byte"] == pytest.approx(dense["heldout_bits_per_byte"], rel=1e-2)
    assert (
        dense["bits_per_weight"] == 32 and 16 < bf16["bits_per_weight"] < 16.1 and 4.2 < int4["bits_per_weight"] < 4.4
    )
    for row in written["rows"]:
        for kind in ("decode", "prefill"):
            slowest, fastest = row[f"{kind}_spread"]
            assert 0 < slowest <= row[f"{kind}_tokens_per_second"] <= fastest
        assert 50_000 < row["peak_memory"] < 2**35
    # Of a run nothing on disk is its weights alone.
    assert "bytes" not in dense and int4["bytes"] < bf16["bytes"] < bf16["peak_memory"]
    assert int4["bytes"] == (workshop.bundles / "int4" / "weights.safetensors").stat().st_size
    ledgers = [origin.get("ledger", {}).get("bytes", 0) for origin in written["origins"]]
    assert ledgers[0] == 0 and ledgers[1] > ledgers[2] > 0 and written["origins"][2]["recipe_name"] == "int4"
    assert written["machine"]["cores"] >= 1 and written["machine"]["jax"]


def test_bytes_on_disk_are_those_of_the_files(workshop: Workshop, place: Path) -> None:
    """In memory a GGUF file's blocks of 4 bits may be float32."""
    for kind, name, more in (("gguf", "model.gguf", ("--gguf-type", "q8_0")), ("huggingface", "checkpoint", ())):
        assert main(["export", str(workshop.run), "--to", kind, "--out", name, *more]) == 0
    run, file, checkpoint = (describe_size(open_model(path)) for path in (workshop.run, "model.gguf", "checkpoint"))
    whole = 4 * run["parameters"]
    assert "bytes" not in run and run["bits_per_weight"] == 32
    assert 0.26 * whole < file["bytes"] < 0.3 * whole and file["bytes"] < (place / "model.gguf").stat().st_size
    stored = (path.stat().st_size for path in (place / "checkpoint").glob("*.safetensors"))
    assert checkpoint["bytes"] == sum(stored) and whole <= checkpoint["bytes"] < 1.05 * whole
    rows = [each | {"model": name} for each, name in ((run, "run"), (file, "file"))]
    cells = {str(column.header): list(column.cells) for column in next(make_tables(rows)).columns}
    assert cells["weights on disk"] == ["-", f"{file['bytes'] / 1e6:.2f} MB"] and cells["size"] == ["-", "-"]


def test_peak_memory_is_the_models_and_not_the_evaluators(workshop: Workshop) -> None:
    held = np.ones(1 << 30, np.int8)
    row = measure_speed(workshop.bundles / "int4", "activations", "float")
    assert row["peak_memory"] < held.nbytes and "peak_device_memory" not in row


def test_memory_of_devices_has_a_column_where_there_is_any() -> None:
    row: dict[str, Any] = {"model": "a", "bytes": 1, "bits_per_weight": 8.0, "decode_tokens_per_second": 9.0}
    row |= {"prefill_tokens_per_second": 90.0, "peak_memory": 7_000_000}
    for found, memory in ((row, {"peak memory": "7 MB"}), (row | {"peak_device_memory": 5_000_000}, None)):
        _, speeds = make_tables([found])
        cells = {str(column.header): next(iter(column.cells)) for column in speeds.columns}
        memory = memory or {"peak memory": "7 MB", "peak device memory": "5 MB"}
        assert {name: cell for name, cell in cells.items() if "memory" in name} == memory


def test_where_it_may_not_write(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    (place / "here").mkdir()
    words = ("eval", workshop.bundles / "int4", "--tokens", "1000", "--json")
    refuse(*words, "nowhere/rows.json", names=("--json nowhere/rows.json", "does not exist"))
    refuse(*words, "here", names=("--json here", "is a directory"))


def test_models_are_looked_at_before_the_first_is_measured(workshop: Workshop, refuse: Refuse) -> None:
    refuse("eval", workshop.bundles / "int4", "nowhere", names=("nowhere", "does not exist"))


def test_corpora_that_do_not_fit(
    workshop: Workshop, place: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    model = workshop.bundles / "int4"
    refuse("eval", model, "--corpus", "nowhere", names=("nowhere", "no corpus"))
    damaged = Path(shutil.copytree(workshop.corpus, place / "damaged"))
    content = bytearray((damaged / "heldout.tokens").read_bytes())
    content[-10] ^= 1
    (damaged / "heldout.tokens").write_bytes(content)
    refuse("eval", model, "--corpus", "damaged", names=("damaged/heldout.tokens", "altered"))
    other = ("--data.split-seed", "1", "--train.steps", "3")
    assert main(["train", TINY, *SHORT, *other, "--directory", "run", "--data-directory", "other"]) == 0
    refuse("eval", model, "--corpus", "other", names=("other", "another tokenizer", str(model)))
