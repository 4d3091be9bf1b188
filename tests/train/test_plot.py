"""The picture has the stated size, holds what the file holds, and says so where there is nothing to draw."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hsai.errors import InputError
from hsai.train import plot
from hsai.train.plot import HEIGHT, WIDTH, plot_loss

LOSS = tuple(bytes.fromhex(plot.LOSS_COLOR[1:]))
HELDOUT = tuple(bytes.fromhex(plot.HELDOUT_COLOR[1:]))


def draw(folder: Path, rows: list[dict]) -> np.ndarray:
    """Writes the rows, plots them, and returns the pixels (HEIGHT, WIDTH, 3)."""
    source, png = folder / "metrics.jsonl", folder / "loss.png"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_loss(source, png, "a run")
    assert png.stat().st_size < 60_000
    pixels = np.asarray(Image.open(png).convert("RGB"))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    return pixels


def count(pixels: np.ndarray, color: tuple[int, ...]) -> int:
    return int((pixels == np.array(color)).all(-1).sum())


def curve(steps: int) -> list[dict]:
    noise = np.random.default_rng(0).normal(0, 0.1, steps)
    return [{"step": s, "loss": 3 + 5 * math.exp(-5 * s / steps) + noise[s]} for s in range(steps)]


def test_a_loss_curve_alone(tmp_path: Path) -> None:
    pixels = draw(tmp_path, curve(40))
    assert count(pixels, LOSS) > 500 and count(pixels, HELDOUT) == 0


def test_held_out_points_have_their_own_panel(tmp_path: Path) -> None:
    rows = curve(40)
    for row in rows[9::10]:
        row["heldout_bits_per_byte"] = row["loss"] / 2
    pixels = draw(tmp_path, rows)
    loss_rows = np.flatnonzero((pixels == np.array(LOSS)).all(-1).any(1))
    heldout_rows = np.flatnonzero((pixels == np.array(HELDOUT)).all(-1).any(1))
    assert len(heldout_rows) and loss_rows.max() < heldout_rows.min()


def test_a_long_noisy_run_stays_small(tmp_path: Path) -> None:
    assert count(draw(tmp_path, curve(20_000)), LOSS) > 500


def test_one_step_and_steps_without_a_number_are_drawn(tmp_path: Path) -> None:
    assert count(draw(tmp_path, [{"step": 1, "loss": 2.0}]), LOSS) > 10
    assert count(draw(tmp_path, [{"step": 1, "loss": None}, *curve(40)[2:], {"step": 50, "loss": None}]), LOSS) > 500


def test_smoothing_does_not_lag_and_keeps_gaps() -> None:
    line = np.linspace(8.0, 2.0, 500)
    smooth = plot._smooth(line)
    np.testing.assert_allclose(smooth[:-5], line[:-5], rtol=1e-12)
    assert abs(smooth[-1] - line[-6:].mean()) < 1e-9
    line[100:120] = np.nan
    assert np.flatnonzero(np.isnan(plot._smooth(line))).tolist() == list(range(100, 120))


@pytest.mark.parametrize("text", ["", '{"step": 1}\n', '{"step": 1, "loss": null}\n'])
def test_nothing_to_draw_is_an_error_and_no_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"metrics\.jsonl has no row with a finite 'loss'"):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a run")
    assert not (tmp_path / "loss.png").exists()
