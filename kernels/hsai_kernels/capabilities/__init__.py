"""What the compilers of accelerators say of each kernel: PLATFORM.json, one row a kernel, case, dtype and chip.

The files are written by scripts/write_capabilities.py, from programs compiled for chips that are not there (aot/), and
docs/kernels.md from them. A test compiles a part again and fails where a file says something else. Kernels ask here,
by way of tuning.py, before they are traced with a tile: what does not compile for the chip is not tried.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
KEY = ("kernel", "case", "dtype", "chip")
STORED = (*KEY, "shape", "tile", "outcome", "reason")
"""What of a row does not depend on the machine that compiled it."""
CHIPS: Mapping[str, str] = {
    # An H200 is an H100 with other memory.
    "a100": r"\bA100\b",
    "h100": r"\bH[12]00\b",
    "v5e": r"TPU v5( lite|e)\b",
    "v5p": r"TPU v5p?$",
    "v6e": r"TPU v6( lite|e)\b",
    "tpu7x": r"TPU ?v?7x",
}
"""The tables' name of a chip -> a pattern that is found in jax's `device_kind` of it."""
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


def identify(row: Row) -> tuple[str, ...]:
    """What tells a row from all others of its platform."""
    return tuple(row[field] for field in KEY)


def name_chip(device_kind: str) -> str | None:
    """The tables' name of a device, or None for one that no table is about."""
    return next((chip for chip, pattern in CHIPS.items() if re.search(pattern, device_kind)), None)


def find_refusal(
    platform: str, device_kind: str | None, kernel: str, dtype: str, shape: str, tile: Mapping[str, int]
) -> str | None:
    """Why the chip's compiler does not take a kernel with a tile, or spills its registers; None if it is not known to.

    Unknown devices, and whatever the tables do not hold, are not refused. Of the cases of one class of shapes, each
    that does not compile counts.
    """
    chip = None if device_kind is None else name_chip(device_kind)
    if chip is None:
        return None
    return _index_refusals(FOLDER, platform).get((chip, kernel, dtype, shape, _sort_tile(tile)))


@functools.cache
def _index_refusals(folder: Path, platform: str) -> dict[tuple[Any, ...], str]:
    path = folder / f"{platform}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {
        (row["chip"], row["kernel"], row["dtype"], row["shape"], _sort_tile(row["tile"])): (
            f"{row['chip']}: {row['outcome']} ({row['reason']})"
        )
        for row in rows
        if row["outcome"] != "compiles" and row["tile"] is not None
    }


def _sort_tile(tile: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(tile.items()))


def describe_tile(tile: Mapping[str, int] | None) -> str:
    """For people: "128 rows, 64 keys"; "several" for None, a program of several kernels."""
    return "several" if tile is None else ", ".join(f"{size} {side}" for side, size in tile.items())


def find_differences(found: Iterable[Row], stored: Iterable[Row]) -> list[str]:
    """What rows just compiled say otherwise than stored ones, in words; those that were not compiled are left alone."""
    known = {identify(row): row for row in stored}
    differences = []
    for row in found:
        before = known.get(identify(row))
        name = ", ".join(identify(row))
        if before is None:
            differences.append(f"{name}: not stored")
            continue
        for field in ("shape", "tile", "outcome"):
            if row[field] != before[field]:
                differences.append(f"{name}: {field} is {row[field]!r} ({row['reason']}), stored {before[field]!r}")
    return differences


def render_markdown(platform: str) -> str:
    """A table: one row a kernel, case, dtype and tile; one column a chip; the reasons of refusals under it."""
    rows = read_capabilities(platform)
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    by_case: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["kernel"], row["case"], row["dtype"], describe_tile(row["tile"]))
        by_case.setdefault(key, {})[row["chip"]] = row
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
