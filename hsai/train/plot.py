"""The loss curve of a run as a PNG, drawn from its metrics.jsonl alone."""

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from hsai.errors import InputError
from hsai.files import atomic_write
from hsai.train.metrics import read_metrics

WIDTH, HEIGHT, DPI = 900, 540, 100
INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
LOSS_COLOR, HELDOUT_COLOR = "#2563eb", "#d9480f"


def plot_loss(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str], title: str) -> None:
    """Draws the training loss over steps, and below it the held-out bits a byte where a run measured them.

    The two have different units (nats a token of the tokenizer, bits a byte of text) and so a panel each. Steps whose
    loss is not a number leave a gap. Raises `InputError` if the file is missing or has no row with a loss.
    """
    rows = read_metrics(metrics_path)
    steps, losses = _column(rows, "loss")
    if not np.isfinite(losses).any():
        raise InputError(f"{metrics_path} has no row with a finite 'loss' to plot ({len(rows)} rows)")
    heldout_steps, heldout = _column(rows, "heldout_bits_per_byte")
    # Not pyplot: it would hold figures and a backend for the whole process.
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, hspace=0.06)
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    if len(heldout):
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))
        _draw_heldout(lower, heldout_steps, heldout)
        panels = [upper, lower]
    else:
        upper = figure.subplots()
        panels = [upper]
    _draw_loss(upper, steps, losses)
    for axes in panels:
        _dress(axes)
    panels[-1].set_xlabel("optimizer step", color=MUTED)
    panels[-1].set_xlim(min(0, steps.min()), steps.max() * 1.1 or 1)
    upper.set_title(title, loc="left", color=INK, fontsize=14, fontweight="bold", pad=12)
    with atomic_write(png_path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})


def _column(rows: Sequence[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have the metric, float64; NaN where its value was none."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a fiftieth of the run around each value; NaN stays NaN and counts for nothing.

    The window is centred, and narrows towards the first value, so that the curve does not lag behind a falling loss.
    """
    at = np.arange(len(values))
    reach = np.minimum(at, len(values) // 100)
    first, behind = at - reach, np.minimum(at + reach + 1, len(values))
    finite = np.isfinite(values)
    totals = np.cumsum(np.r_[0.0, np.where(finite, values, 0.0)])
    counts = np.cumsum(np.r_[0, finite])
    mean = (totals[behind] - totals[first]) / np.maximum(counts[behind] - counts[first], 1)
    return np.where(finite, mean, np.nan)


def _draw_loss(axes: Axes, steps: np.ndarray, losses: np.ndarray) -> None:
    smooth = _smooth(losses)
    axes.plot(steps, losses, color=LOSS_COLOR, alpha=0.25, linewidth=1)
    axes.plot(steps, smooth, color=LOSS_COLOR, linewidth=2, solid_capstyle="round")
    last = np.flatnonzero(np.isfinite(smooth))[-1]
    _mark(axes, steps[last], smooth[last], LOSS_COLOR)
    # The first steps fall from ln(vocabulary) and are a matter of course: the curve after them gets the room.
    finite = losses[np.isfinite(losses)]
    low, high = finite.min(), finite[len(finite) // 50 :].max()
    margin = 0.06 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("training loss\n(nats / token)", color=MUTED)


def _draw_heldout(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    axes.plot(steps, values, color=HELDOUT_COLOR, linewidth=1.5, marker="o", markersize=5, markeredgecolor="white")
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite):
        _mark(axes, steps[finite[-1]], values[finite[-1]], HELDOUT_COLOR)
    axes.margins(y=0.18)
    axes.set_ylabel("held-out text\n(bits / byte)", color=MUTED)


def _mark(axes: Axes, step: float, value: float, color: str) -> None:
    """A dot on the last value, and the value in words beside it."""
    axes.plot([step], [value], marker="o", markersize=6, color=color, markeredgecolor="white", clip_on=False, zorder=5)
    axes.annotate(
        f"{value:.3f}",
        (step, value),
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        color=color,
        fontsize=11,
        fontweight="bold",
        annotation_clip=False,
    )


def _dress(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=10, length=0, pad=6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 2.5, 5, 10], integer=True))
