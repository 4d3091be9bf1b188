"""What `hsai eval --html` writes: one page without scripts that holds the numbers, the ledgers of bundles, and plots.

Everything on it was measured in this run or stands in a bundle's manifest; what was not measured is not there.
"""

import html
from collections.abc import Iterator, Sequence
from typing import Any

from hsai.cli.figures import draw_blocks, draw_frontier, draw_layers, draw_sensitivities

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e7eb; text-align: right; white-space: nowrap; }
th { color: #616e7c; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
p.about, dl { color: #616e7c; font-size: .88rem; } dt { float: left; clear: left; width: 11rem; }
dd { margin-left: 11rem; overflow-wrap: anywhere; } svg { max-width: 100%; height: auto; }
"""
TRACED = ("recipe_name", "calibration_sha256", "calibration", "source_sha256", "run", "step", "command", "commit")
"""What a bundle says of how it was made, in the order of the page."""


def make_page(results: dict[str, Any], origins: Sequence[dict[str, Any]]) -> str:
    """The page as HTML.

    Args:
      results: what `hsai eval --json` writes: machine, rows, and evaluations where tasks were asked for.
      origins: of each model, what its manifest or run says of where it comes from, "ledger" included where it has one.
    """
    machine, rows, reports = results["machine"], results["rows"], results.get("evaluations", [])
    about = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "command")
    commits = sorted({str(report["commit"]) for report in reports})
    parts = [
        f"<h1>{len(rows)} model{'s' * (len(rows) > 1)} side by side</h1>",
        f'<p class="about"><code>{html.escape(machine["command"])}</code><br>{html.escape(about)}'
        + (f"<br>commit {html.escape(', '.join(commits))}" if commits else "")
        + "</p>",
        _write_table(*_tabulate(rows, reports)),
    ]
    points = list(_find_points(rows, reports))
    if len(points) > 1:
        parts += ["<h2>Size and quality</h2>", draw_frontier(points, _name_quality(reports))]
    for row, origin in zip(rows, origins, strict=True):
        if "ledger" in origin:
            parts += _write_ledger(row["model"], origin)
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>hsai eval</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n{body}\n</html>\n'


def _tabulate(rows: Sequence[dict[str, Any]], reports: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line a model: what was measured of it, and the difference to the first where it has a standard error."""
    names = ["model", "MB", "bits a weight"]
    lines = [[row["model"], f"{row['bytes'] / 1e6:.2f}", f"{row['bits_per_weight']:.3f}"] for row in rows]
    if "heldout_bits_per_byte" in rows[0]:
        names.append("held-out bits a byte")
        for line, row in zip(lines, rows, strict=True):
            line.append(f"{row['heldout_bits_per_byte']:.4f}")
    for task, metric in _list_metrics(reports):
        names.append(f"{task} {metric}")
        first = reports[0]["tasks"][_find(reports[0], task)]["metrics"].get(metric)
        for line, report in zip(lines, reports, strict=True):
            found = report["tasks"][_find(report, task)]["metrics"].get(metric)
            line.append("-" if found is None else _write_metric(metric, found, first))
    if "decode_tokens_per_second" in rows[0]:
        names += ["decode tokens/s", "prefill tokens/s", "peak memory, MB"]
        for line, row in zip(lines, rows, strict=True):
            for kind in ("decode", "prefill"):
                slowest, fastest = row[f"{kind}_spread"]
                line.append(f"{row[f'{kind}_tokens_per_second']:.0f} ({slowest:.0f} to {fastest:.0f})")
            line.append(f"{row['peak_memory'] / 1e6:.0f}")
    return names, lines


def _list_metrics(reports: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(Task, metric) of all that any model was measured by, parts of tasks left out."""
    pairs: dict[tuple[str, str], None] = {}
    for report in reports:
        for task in report["tasks"]:
            if not task["part_of"]:
                pairs |= {(task["task"], metric): None for metric in task["metrics"]}
    return list(pairs)


def _find(report: dict[str, Any], task: str) -> int:
    return next(index for index, found in enumerate(report["tasks"]) if found["task"] == task)


def _write_metric(name: str, found: dict[str, Any], first: dict[str, Any] | None) -> str:
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.4f}"
    text = f"{found['value']:.4f}{error}"
    if first is None or first is found:
        return text
    if name == "perplexity":
        return f"{text} ({found['value'] / first['value']:.3f}x)"
    return f"{text} ({found['value'] - first['value']:+.4f})"


def _write_table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>\n" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _find_points(
    rows: Sequence[dict[str, Any]], reports: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, float, float]]:
    """(Model, megabytes, quality) of each model: the first perplexity, or else held-out bits a byte."""
    for index, row in enumerate(rows):
        found = [task["metrics"] for task in reports[index]["tasks"]] if reports else []
        values = [metrics["perplexity"]["value"] for metrics in found if "perplexity" in metrics]
        value = values[0] if values else row.get("heldout_bits_per_byte")
        if value is not None:
            yield row["model"], row["bytes"] / 1e6, value


def _name_quality(reports: Sequence[dict[str, Any]]) -> str:
    for task in reports[0]["tasks"] if reports else []:
        if "perplexity" in task["metrics"]:
            return f"perplexity of {task['task'].partition(':')[2] or task['task']}"
    return "held-out bits a byte"


def _write_ledger(name: str, origin: dict[str, Any]) -> list[str]:
    ledger = origin["ledger"]
    traced = "".join(
        f"<dt>{key.replace('_', ' ')}</dt><dd>{html.escape(str(origin[key]))}</dd>" for key in TRACED if key in origin
    )
    lines = [
        [
            row["weight"],
            row["format"],
            " x ".join(map(str, row["shape"])),
            f"{row['bytes']:,}",
            f"{row['bits_per_weight']:.3f}",
            f"{row['relative_error']:.2%}" if row["relative_error"] else "-",
        ]
        for row in ledger["weights"]
    ]
    lines.append(
        ["all", "", f"{ledger['parameters']:,}", f"{ledger['bytes']:,}", f"{ledger['bits_per_weight']:.3f}", ""]
    )
    parts = [
        f"<h2>{html.escape(name)}</h2>",
        f"<dl>{traced}</dl>",
        _write_table(("weight", "format", "shape", "bytes", "bits a weight", "relative error"), lines),
    ]
    if ledger.get("layers"):
        parts += ["<h2>Output error of each product</h2>", draw_layers(ledger["layers"])]
    if ledger.get("blocks"):
        parts += ["<h2>Reconstruction of each layer</h2>", draw_blocks(ledger["blocks"])]
    if "allocation" in ledger:
        parts += ["<h2>Sensitivity of each layer</h2>", draw_sensitivities(ledger["allocation"]["choices"])]
    return parts
