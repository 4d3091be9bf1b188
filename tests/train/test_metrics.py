"""Rows survive kills, resume drops what a killed run wrote too much, and the pace leaves compilation out."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.errors import InputError
from hsai.models import TransformerConfig
from hsai.train.flops import flops_per_token
from hsai.train.metrics import METRICS_FILE, TENSORBOARD_FOLDER, MetricsWriter, Throughput, read_metrics


def write_steps(directory: Path, steps: range, resume_step: int = -1) -> None:
    with MetricsWriter(directory, resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": 10.0 / (step + 1)})


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    write_steps(tmp_path / "run", range(0, 50, 10))
    rows = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [row["step"] for row in rows] == [0, 10, 20, 30, 40]
    assert rows[1] == {"step": 10, "loss": 10.0 / 11}


def test_a_row_is_on_its_way_before_the_next_one(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, -1) as writer:
        writer.write(1, {"loss": 3.5})
        assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 1, "loss": 3.5}]


def test_resume_drops_the_rows_after_the_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, range(0, 50, 10))
    write_steps(tmp_path, range(30, 60, 10), resume_step=20)
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [0, 10, 20, 30, 40, 50]


def test_a_run_that_starts_over_keeps_nothing(tmp_path: Path) -> None:
    write_steps(tmp_path, range(3))
    write_steps(tmp_path, range(1))
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [0]


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(0, 200), resume_step=st.integers(-1, 5))
def test_a_file_torn_at_any_byte_resumes(tmp_path_factory: pytest.TempPathFactory, cut: int, resume_step: int) -> None:
    directory = tmp_path_factory.mktemp("run")
    path = directory / METRICS_FILE
    lines = [json.dumps({"step": step, "loss": 1.5 * step}) + "\n" for step in range(6)]
    path.write_text("".join(lines)[:cut])
    whole = [line for line in "".join(lines)[:cut].splitlines() if line.endswith("}")]
    with MetricsWriter(directory, resume_step) as writer:
        writer.write(9, {"loss": 0.5})
    steps = [row["step"] for row in read_metrics(path)]
    assert steps == [step for step in range(len(whole)) if step <= resume_step] + [9]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_that_needs_no_cut_is_not_rewritten(tmp_path: Path) -> None:
    write_steps(tmp_path, range(3))
    before = (tmp_path / METRICS_FILE).stat().st_ino
    write_steps(tmp_path, range(3, 4), resume_step=2)
    assert (tmp_path / METRICS_FILE).stat().st_ino == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_what_json_cannot_hold_is_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, -1) as writer:
        writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    assert json.loads((tmp_path / METRICS_FILE).read_text()) == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}
    (row,) = read_metrics(tmp_path / METRICS_FILE)
    assert math.isnan(row["loss"]) and math.isnan(row["grad_norm"]) and row["lr"] == 0.1


def test_a_damaged_line_within_names_its_number_and_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\nnot a row\n{"step": 2}\n')
    for refuse in (lambda: read_metrics(path), lambda: MetricsWriter(tmp_path, 1)):
        with pytest.raises(InputError, match=r"metrics\.jsonl line 2 is not a row of metrics: 'not a row'$"):
            refuse()
    assert path.read_text() == '{"step": 1}\nnot a row\n{"step": 2}\n'


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent.jsonl: No such file"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_metric_called_step_is_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, -1) as writer, pytest.raises(ValueError, match="'step'"):
        writer.write(1, {"step": 2.0})


def test_arrays_are_accepted_as_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, -1) as writer:
        writer.write(1, {"loss": jax.numpy.float32(0.5)})
    assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 1, "loss": 0.5}]


def test_tensorboard_holds_the_same_scalars(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    (events,) = (tmp_path / TENSORBOARD_FOLDER).iterdir()
    assert events.name.startswith("events.out.tfevents")
    assert events.read_bytes().count(b"loss") == 3


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_steps(tmp_path / "run", range(3))
    assert not (tmp_path / "run").exists()


TINY = TransformerConfig(vocab=64, embed=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64, max_length=64)


def make_throughput(times: list[float], kind: str = "cpu", device_count: int = 1) -> Throughput:
    device = SimpleNamespace(device_kind=kind)
    return Throughput(TINY, 32, device, device_count, clock=iter(times).__next__)


def test_the_pace_is_the_median_and_leaves_out_what_came_before_the_first_tick() -> None:
    pace = make_throughput([100.0, 100.5, 101.0, 109.0, 111.0])
    for tokens in (9e9, 1000, 1000, 1000):
        pace.tick(tokens)
    assert pace.summary() == {"step_seconds": 0.5, "tokens_per_second": 2000.0}
    assert pace.summary() == {}
    pace.tick(500)
    assert pace.summary() == {"step_seconds": 2.0, "tokens_per_second": 250.0}


def test_steps_with_padding_count_their_own_tokens() -> None:
    pace = make_throughput([0.0, 1.0, 2.0])
    for tokens in (0, 100, 300):
        pace.tick(tokens)
    assert pace.summary()["tokens_per_second"] == 200.0


def test_pauses_are_no_part_of_a_step() -> None:
    pace = make_throughput([0.0, 0.0, 400.0, 400.25, 500.25, 501.0])
    pace.tick(1)
    with pace.paused():
        pass
    with pytest.raises(RuntimeError), pace.paused():
        raise RuntimeError
    pace.tick(1)
    assert pace.summary()["step_seconds"] == 1.0


def test_utilization_is_the_share_of_all_devices_peak() -> None:
    pace = make_throughput([0.0, 0.01], "TPU v5 lite", 4)
    pace.tick(1000)
    pace.tick(1000)
    assert pace.summary()["mfu"] == pytest.approx(1000 / 0.01 * flops_per_token(TINY, 32) / (4 * 197e12))


def test_an_unknown_chip_has_no_utilization() -> None:
    pace = make_throughput([0.0, 0.01], "a chip of tomorrow")
    pace.tick(1000)
    pace.tick(1000)
    assert set(pace.summary()) == {"step_seconds", "tokens_per_second"}


def test_nothing_is_said_before_a_step_was_timed() -> None:
    pace = make_throughput([0.0])
    assert pace.summary() == {}
    pace.tick(10)
    assert pace.summary() == {}
