"""The plots of `hsai eval --html`, each as an <svg> element."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from hsai.train.plot import GRID, INK, MUTED

COLORS = ("#2563eb", "#d9480f", "#0f766e", "#9333ea", "#b45309", "#be123c", "#4d7c0f", "#0369a1", "#6b7280", "#1f2933")


def draw_frontier(points: Sequence[tuple[str, float, float]], quality: str) -> str:
    """(name, bytes in MB, quality) of each model."""
    figure, axes = _start_figure(4.2)
    for index, (name, size, value) in enumerate(points):
        axes.plot([size], [value], "o", color=COLORS[index % len(COLORS)], markersize=7)
        axes.annotate(name, (size, value), xytext=(7, 5), textcoords="offset points", color=INK, fontsize=9)
    axes.set_xscale("log")
    axes.set_xlabel("weights, MB", color=MUTED)
    axes.set_ylabel(quality, color=MUTED)
    axes.margins(0.15)
    return _finish(figure)


def draw_layers(layers: Sequence[dict[str, Any]]) -> str:
    """A line a weight over the layers, and one across for the head; what could not be solved is marked, at the bottom
    where its error is no number."""
    figure, axes = _start_figure(4.2)
    last = max((row["layer"] for row in layers if row["layer"] is not None), default=0)
    for index, name in enumerate(dict.fromkeys(row["weight"] for row in layers)):
        rows = [row for row in layers if row["weight"] == name]
        if rows[0]["layer"] is None:
            rows = [{**rows[0], "layer": layer} for layer in range(last + 1)]
        steps, values = np.array([[row["layer"], row["output_error"]] for row in rows], float).T
        color = COLORS[index % len(COLORS)]
        axes.plot(steps, 100 * values, color=color, linewidth=1.5, label=name.removeprefix("layers."))
        # What was to be left dense takes no damping either, nor does Wanda, which may have notes of experts.
        failed = [
            place for place, row in enumerate(rows) if row["damping"] is None and "rounded plainly" in row["note"]
        ]
        axes.plot(steps[failed], 100 * np.nan_to_num(values[failed]), "x", color=color, markersize=9)
    axes.set_xlabel("layer", color=MUTED)
    axes.set_ylabel("error of the output over calibration, %", color=MUTED)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _finish(figure)


def draw_blocks(blocks: Sequence[dict[str, Any]]) -> str:
    """The distance of each layer's output from the dense model's, as the solver left it and after tuning; what was not
    better stayed, and is marked, at the bottom where it is no number."""
    figure, axes = _start_figure(4.2)
    steps = np.array([row["layer"] for row in blocks])
    solved, tuned = (100 * np.array([row[key] for row in blocks], float) for key in ("error_solved", "error_tuned"))
    axes.plot(steps, solved, color=COLORS[1], linewidth=1.5, label="solved")
    axes.plot(steps, tuned, color=COLORS[0], linewidth=1.5, label="tuned")
    left = [place for place, row in enumerate(blocks) if not row["tuned"]]
    axes.plot(steps[left], np.nan_to_num(tuned[left]), "x", color=COLORS[0])
    axes.set_xlabel("layer", color=MUTED)
    axes.set_ylabel("distance from the dense output, %", color=MUTED)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    return _finish(figure)


def draw_sensitivities(choices: Sequence[dict[str, Any]]) -> str:
    """A line a weight over the layers: the forecast loss of its smallest candidate, and as points that of the choice.

    Zeros, of candidates that hold a weight exactly, are left out: the axis is logarithmic. A choice whose loss is no
    number is marked at the bottom.
    """
    figure, axes = _start_figure(4.2)
    names = list(dict.fromkeys(row["weight"] for row in choices if row["layer"] is not None))
    for name, color in zip(names, COLORS * len(names), strict=False):
        rows = [row for row in choices if row["weight"] == name]
        steps = [row["layer"] for row in rows]
        smallest = [min(row["candidates"], key=lambda option: option["bytes"])["loss"] for row in rows]
        axes.plot(steps, _hide_zeros(smallest), color=color, linewidth=1.5, label=name.removeprefix("layers."))
        axes.plot(steps, _hide_zeros([row["loss"] for row in rows]), "o", color=color, markersize=4)
        unknown = [row["layer"] for row in rows if row["loss"] is None]
        # Clipped, half of each mark would be outside.
        bottom = axes.get_xaxis_transform()
        axes.plot(unknown, [0.0] * len(unknown), "x", color=color, markersize=9, transform=bottom, clip_on=False)
    axes.set_yscale("log")
    axes.set_xlabel("layer", color=MUTED)
    axes.set_ylabel("nats a token: smallest candidate, and choice (points)", color=MUTED)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _finish(figure)


def _hide_zeros(values: Sequence[float | None]) -> np.ndarray:
    """NaN for them, and for what is no number."""
    numbers = np.asarray(values, float)
    return np.where(numbers > 0, numbers, np.nan)


def _start_figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.5, height), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
    return figure, axes


def _finish(figure: Figure) -> str:
    """The figure as an <svg> element, the same bytes for the same figure."""
    stream = io.StringIO()
    with rc_context({"svg.hashsalt": "hsai", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
