"""What the compilers of accelerators say of each kernel: PLATFORM.json, one row a kernel, case, dtype and chip.

The files are written by scripts/write_capabilities.py, from programs compiled for chips that are not there (aot_tpu.py
and its like), and docs/kernels.md from them. A test compiles a part again and fails where a file says something else.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
KEY = ("kernel", "case", "dtype", "chip")
"""What tells a row from all others of its platform."""
STORED = (*KEY, "tile", "outcome", "reason")
"""What of a row does not depend on the machine that compiled it."""
Row = dict[str, Any]


def list_platforms() -> list[str]:
    """Platforms that have a file."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_capabilities(platform: str) -> list[Row]:
    """The rows of a platform, each with the fields of STORED. Raises FileNotFoundError if it has no file."""
    document: dict[str, Any] = json.loads((FOLDER / f"{platform}.json").read_text())
    rows: list[Row] = document["rows"]
    return rows


def read_compiler(platform: str) -> str:
    """Name and version of what compiled the rows of a platform."""
    document: dict[str, Any] = json.loads((FOLDER / f"{platform}.json").read_text())
    return str(document["compiler"])


def write_capabilities(platform: str, compiler: str, rows: Iterable[Row]) -> Path:
    """Stores rows, and the name and version of what compiled them; returns the file. One row a line: diffs are read."""
    lines = [json.dumps({field: row[field] for field in STORED}) for row in rows]
    path = FOLDER / f"{platform}.json"
    content = ",\n".join(f"  {line}" for line in lines)
    path.write_text(f'{{"compiler": {json.dumps(compiler)}, "rows": [\n{content}\n]}}\n')
    return path


def find_differences(found: Iterable[Row], stored: Iterable[Row]) -> list[str]:
    """What rows just compiled say otherwise than stored ones, in words; those that were not compiled are left alone."""
    known = {tuple(row[field] for field in KEY): row for row in stored}
    differences = []
    for row in found:
        before = known.get(tuple(row[field] for field in KEY))
        name = ", ".join(row[field] for field in KEY)
        if before is None:
            differences.append(f"{name}: not stored")
            continue
        for field in ("tile", "outcome"):
            if row[field] != before[field]:
                differences.append(f"{name}: {field} is {row[field]!r} ({row['reason']}), stored {before[field]!r}")
    return differences


def render_markdown(platform: str) -> str:
    """A table: one row a kernel, case, dtype and tile; one column a chip; the reasons of refusals under it."""
    rows = read_capabilities(platform)
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    by_case: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        case = tuple(row[field] for field in ("kernel", "case", "dtype", "tile"))
        by_case.setdefault(case, {})[row["chip"]] = row
    lines = [
        f"| kernel | case | dtype | tile | {' | '.join(chips)} |",
        f"|---|---|---|---|{':-:|' * len(chips)}",
    ]
    for case, found in by_case.items():
        outcomes = [found[chip]["outcome"] if chip in found else "" for chip in chips]
        lines.append(f"| {' | '.join((*case, *outcomes))} |")
    reasons = [
        f"- {row['kernel']}, {row['case']}, {row['dtype']}, {row['chip']}: {row['reason']}"
        for row in rows
        if row["reason"] is not None
    ]
    return "\n".join([*lines, *([""] if reasons else []), *reasons]) + "\n"
