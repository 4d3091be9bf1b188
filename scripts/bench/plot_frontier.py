"""The picture of docs/results/frontier.json: perplexity against bytes, ours and llama.cpp's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hsai.files import atomic_write
from hsai.train.plot import GRID, MUTED

COLORS = {"hsai": "#2563eb", "llama.cpp": "#d9480f"}


def plot_frontier(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws every row as a dot and, for each side, the steps of the best that it has for so many bytes."""
    dense = {row["side"]: row for row in reversed(rows) if row["model"] in ("dense", "F32")}
    packed = [row for row in rows if row["model"] not in ("dense", "F32")]
    figure = Figure(figsize=(9, 5.4), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for side, color in COLORS.items():
        mine = sorted((row for row in packed if row["side"] == side), key=lambda row: float(row["bytes"]))
        best = [
            row
            for index, row in enumerate(mine)
            if all(row["perplexity"] < other["perplexity"] for other in mine[:index])
        ]
        sizes, values = [row["bytes"] / 1e6 for row in best], [row["perplexity"] for row in best]
        axes.step(sizes, values, where="post", color=color, label=side)
        for row in mine:
            place = row["bytes"] / 1e6, row["perplexity"]
            axes.plot(*[[value] for value in place], "o", color=color, markersize=6)
            axes.annotate(row["model"], place, xytext=(6, 5), textcoords="offset points", fontsize=8, color=color)
    axes.axhline(dense["hsai"]["perplexity"], color=MUTED, linewidth=1, linestyle=":")
    axes.set_yscale("log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.08)
    axes.set_xlabel("all weights, MB", color=MUTED)
    axes.set_ylabel("perplexity (dotted: dense float32)", color=MUTED)
    axes.grid(color=GRID, linewidth=0.8, which="both")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
