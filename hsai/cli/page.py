"""What `hsai eval --html` writes: one page without scripts that holds the numbers, the ledgers of bundles, and plots.

Everything on it was measured in this run or stands in a bundle's manifest; what was not measured is not there.
"""

import html
import json
from collections.abc import Iterator, Sequence
from typing import Any

from hsai.cli.figures import draw_blocks, draw_frontier, draw_layers, draw_sensitivities
from hsai.compress.names import write_error
from hsai.evaluate.report import write_change, write_value
from hsai.export.history import tell_history

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e7eb; text-align: right; white-space: nowrap; }
th { color: #616e7c; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
p.about, dl { color: #616e7c; font-size: .88rem; } dt { float: left; clear: left; width: 11rem; }
dd { margin-left: 11rem; overflow-wrap: anywhere; } svg { max-width: 100%; height: auto; }
summary { color: #616e7c; cursor: pointer; margin: .6rem 0; } pre { font-size: .8rem; overflow-x: auto; }
"""
TRACED = (
    "recipe_name",
    "calibration_sha256",
    "source_sha256",
    "checkpoint",
    "run",
    "command",
    "commit",
)
"""What a bundle says of how it was made, in the order of the page; recipe and seed stand in its recipe, and what was
before in `tell_history`."""


def make_page(results: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
      results: what `hsai eval --json` writes: machine, rows, evaluations where tasks were asked for, and for each row
        its origin, what the model's manifest or run says of where it comes from, "ledger" included where it has one.
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
    told: list[dict[str, Any]] = []  # a model has a row for each of its caches
    for row, origin in zip(rows, results["origins"], strict=True):
        if "ledger" in origin and origin not in told:
            parts += _write_ledger(row["model"], origin)
            told.append(origin)
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>hsai eval</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n{body}\n</html>\n'


def _tabulate(rows: Sequence[dict[str, Any]], reports: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line a model: what was measured of it, and beside its metrics the change to the first model."""
    names = ["model", "MB", "bits a weight"]
    lines = [
        [row["model"], f"{row['bytes'] / 1e6:.2f}" if "bytes" in row else "-", f"{row['bits_per_weight']:.3f}"]
        for row in rows
    ]
    if "heldout_bits_per_byte" in rows[0]:
        names.append("held-out bits a byte")
        for line, row in zip(lines, rows, strict=True):
            line.append(f"{row['heldout_bits_per_byte']:.4f}")
    for task, metric in _list_metrics(reports):
        names.append(f"{task} {metric}")
        for line, report in zip(lines, reports, strict=True):
            found = report["tasks"][_find(report, task)]["metrics"].get(metric)
            change = "" if found is None else write_change(found)
            line.append("-" if found is None else write_value(found) + (f" ({change})" if change else ""))
    if "decode_tokens_per_second" in rows[0]:
        names += ["decode tokens/s", "prefill tokens/s", "peak memory, MB"]
        for line, row in zip(lines, rows, strict=True):
            for kind in ("decode", "prefill"):
                slowest, fastest = row[f"{kind}_spread"]
                line.append(f"{row[f'{kind}_tokens_per_second']:.0f} ({slowest:.0f} to {fastest:.0f})")
            line.append(f"{row['peak_memory'] / 1e6:.0f}")
    if "peak_device_memory" in rows[0]:
        names.append("peak device memory, MB")
        for line, row in zip(lines, rows, strict=True):
            line.append(f"{row['peak_device_memory'] / 1e6:.0f}")
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


def _write_table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>\n" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _find_points(
    rows: Sequence[dict[str, Any]], reports: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, float, float]]:
    """(Model, megabytes on disk, quality) of each model that has them: the first perplexity, or else held-out bits a
    byte."""
    for index, row in enumerate(rows):
        found = [task["metrics"] for task in reports[index]["tasks"]] if reports else []
        values = [metrics["perplexity"]["value"] for metrics in found if "perplexity" in metrics]
        value = values[0] if values else row.get("heldout_bits_per_byte")
        if value is not None and "bytes" in row:
            yield row["model"], row["bytes"] / 1e6, value


def _name_quality(reports: Sequence[dict[str, Any]]) -> str:
    for task in reports[0]["tasks"] if reports else []:
        if "perplexity" in task["metrics"]:
            return f"perplexity of {task['task'].partition(':')[2] or task['task']}"
    return "held-out bits a byte"


def _write_ledger(name: str, origin: dict[str, Any]) -> list[str]:
    ledger = origin["ledger"]
    facts = {key.replace("_", " "): origin[key] for key in (*TRACED, "measured_sha256") if key in origin}
    facts |= tell_history(origin)
    match origin:
        case {"calibration_sha256": _, "recipe": {"calibration": {"tokens": tokens, "seed": seed}}}:
            facts |= {"calibration tokens": f"{tokens:,}", "calibration seed": seed}
    match origin:
        case {"cost": {"seconds": seconds, "machine": machine} as cost}:
            facts["made in"] = f"{seconds:,} s"
            if cost.get("resumed"):
                facts["made in"] += f", without {cost['resumed']} of an earlier run"
            if facts.keys() & {"began from", "made of"}:
                facts["made in"] += ", this step alone"
            for peak in ("peak_memory", "peak_device_memory"):
                if f"{peak}_mib" in cost:
                    facts[peak.replace("_", " ")] = f"{cost[f'{peak}_mib']:,} MiB"
            facts["made on"] = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items())
    traced = "".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items())
    lines = [
        [
            row["weight"],
            row["format"],
            " x ".join(map(str, row["shape"])),
            f"{row['bytes']:,}",
            f"{row['bits_per_weight']:.3f}",
            write_error(row["relative_error"]),
        ]
        for row in ledger["weights"]
    ]
    lines.append(
        ["all", "", f"{ledger['parameters']:,}", f"{ledger['bytes']:,}", f"{ledger['bits_per_weight']:.3f}", ""]
    )
    parts = [
        f"<h2>{html.escape(name)}</h2>",
        f"<dl>{traced}</dl>",
        *_write_recipe(origin),
        _write_table(("weight", "format", "shape", "bytes", "bits a weight", "relative error"), lines),
    ]
    if ledger.get("layers"):
        parts += [
            "<h2>Output error of each product</h2>",
            draw_layers(ledger["layers"]),
            *_write_notes(ledger["layers"]),
        ]
    if ledger.get("blocks"):
        parts += [
            "<h2>Reconstruction of each layer</h2>",
            draw_blocks(ledger["blocks"]),
            *_write_notes(ledger["blocks"]),
        ]
    if "allocation" in ledger:
        parts += ["<h2>Sensitivity of each layer</h2>", draw_sensitivities(ledger["allocation"]["choices"])]
    if ledger.get("scales"):
        parts.append(_fold("scales of channels", _write_table(*_tabulate_scales(ledger["scales"]))))
    if ledger.get("layers"):
        parts.append(_fold("damping of each product", _write_table(*_tabulate_damping(ledger["layers"]))))
    return parts


def _write_recipe(origin: dict[str, Any]) -> list[str]:
    if "recipe" not in origin:
        return []
    text = json.dumps(origin["recipe"], indent=2, ensure_ascii=False)
    return [_fold("recipe", f"<pre>{html.escape(text)}</pre>")]


def _tabulate_scales(scales: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line a source of channels and layer."""
    names = ["channels of", "layer", "exponent", "error without", "error with"]
    return names, [
        [
            row["source"],
            _write_number(row["layer"], "d"),
            f"{row['exponent']:.3g}",
            _write_number(row["error_before"], ".2%"),
            _write_number(row["error_after"], ".2%"),
        ]
        for row in scales
    ]


def _tabulate_damping(layers: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line a solved weight and layer."""
    return ["weight", "layer", "output error", "damping"], [
        [
            row["weight"],
            _write_number(row["layer"], "d"),
            _write_number(row["output_error"], ".2%"),
            _write_number(row["damping"], ".3g"),
        ]
        for row in layers
    ]


def _write_number(value: float | None, how: str) -> str:
    """A dash for what has none: the layer of a head, the damping of what was not solved, an error that ran away."""
    return "-" if value is None else format(value, how)


def _fold(title: str, content: str) -> str:
    """What opens when its title is clicked: long tables."""
    return f"<details><summary>{title}</summary>{content}</details>"


def _write_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What rows of single layers say besides their numbers, as a table; nothing where none says anything."""
    lines = [
        [row.get("weight", "block"), _write_number(row["layer"], "d"), row["note"]] for row in rows if row.get("note")
    ]
    return [_write_table(("weight", "layer", "note"), lines)] if lines else []
