"""Size and quality as docs/results.md shows them: a table for each dense model, ours and llama.cpp's, a picture.

Records are what scripts/bench_frontier.py wrote, a list of its runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hsai.files import atomic_write
from hsai.train.plot import GRID, MUTED

COLORS = {"hsai": "#2563eb", "llama.cpp": "#d9480f"}
UNCOMPRESSED = ("dense", "F32")

Run = dict[str, Any]


def group_runs(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """The rows of all runs by their dense model. Raises ValueError where those of one were measured on other tokens."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        texts = {name: run[name] for name in ("calibration", "text", "tokens_sha256")}
        for row in run["frontier"]:
            found.setdefault(row["dense"], []).append(row | texts)
    for name, rows in found.items():
        texts = {(row["calibration"], row["text"], row["tokens_sha256"]) for row in rows}
        if len(texts) > 1:
            raise ValueError(f"models of {name} were measured on different texts: {sorted(texts)}")
    return found


def write_tables(runs: Sequence[Run]) -> str:
    """A table in Markdown for each dense model, and who measured it."""
    return "\n".join(_write_table(name, rows, runs) for name, rows in group_runs(runs).items())


def _write_table(name: str, rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> str:
    dense = {row["side"]: row["perplexity"] for row in rows if row["model"] in UNCOMPRESSED}
    lines = [
        f"### {name}\n",
        "| model | by | recipe | all weights | bits a weight | perplexity | to its dense | activations of 8 bits |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: -float(row["bytes"])):
        lines.append(
            f"| {row['model']} | {row['side']} | {row['recipe'] or ''} | {row['bytes'] / 1e6:.2f} MB "
            f"| {row['bits_per_weight']:.3f} | {row['perplexity']:.3f} ± {row['standard_error']:.3f} "
            f"| {_write_ratio(row, dense[row['side']])} "
            f"| {'' if row['rounded'] is None else format(row['rounded'], '.3f')} |"
        )
    lines.append(
        f"\nPerplexity of {rows[0]['text']}, {rows[0]['n']} tokens that calibration ({rows[0]['calibration']}) did not"
        f" see;\nllama.cpp quantizes with an importance matrix of the same text{_write_tokens(rows)},\n"
        "and measures its own files, with activations of 8 bits where weights are quantized. Ours are float32, in the\n"
        "last column of 8 bits too.\n"
    )
    if any(row.get("ratio_standard_error") for row in rows):
        lines.append("A ratio's standard error is of the differences to the dense model's losses, token by token.\n")
    for run in runs:
        if any(row["dense"] == name for row in run["frontier"]):
            machine = run["machine"]
            where = (
                f"commit {machine['commit']}, {machine['processor']}, {machine['cores']} cores, jax {machine['jax']}"
            )
            cut = "" if run.get("complete", True) else " It was cut off before its last line."
            lines.append(f"- `{machine['command']}`: {where}, {machine['date']}.{cut}")
    return "\n".join(lines) + "\n"


def _write_tokens(rows: Sequence[dict[str, Any]]) -> str:
    """How much of the text each side saw, as far as records say so."""
    seen = {side: {row.get("calibration_tokens") for row in rows if row["side"] == side} - {None} for side in COLORS}
    ours, theirs = (
        " to ".join(f"{tokens:,}" for tokens in sorted({min(counts), max(counts)})) if counts else ""
        for counts in seen.values()
    )
    return f" ({theirs} tokens of it, ours {ours})" if ours and theirs else ""


def _write_ratio(row: dict[str, Any], dense: float) -> str:
    error = row.get("ratio_standard_error")
    return f"{row['perplexity'] / dense:.3f}" + (f" ± {error:.3f}" if error else "")


def plot_frontier(runs: Sequence[Run], path: Path) -> None:
    """Draws a panel for each dense model, the one of most bytes first."""
    models = sorted(group_runs(runs).items(), key=lambda item: -max(row["bytes"] for row in item[1]))
    figure = Figure(figsize=(9, 5.2 * len(models)), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, (name, rows) in zip(figure.subplots(len(models), squeeze=False)[:, 0], models, strict=True):
        axes.set_title(name, color=MUTED, fontsize=10)
        _plot_model(axes, rows)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})


def _plot_model(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Every row as a dot and, for each side, the steps of the best that it has for so many bytes."""
    dense = {row["side"]: row for row in reversed(rows) if row["model"] in UNCOMPRESSED}
    packed = [row for row in rows if row["model"] not in UNCOMPRESSED]
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
