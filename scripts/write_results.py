"""Writes docs/results.md and the table in README.md from docs/results/*.json, so that no number is typed by hand.

python scripts/write_results.py [runs/quickstart/results.json]       becomes docs/results/quickstart.json first
python scripts/write_results.py [what bench_kernels.py --json wrote]  becomes docs/results/kernels.json first
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from hsai.files import read_json

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART, KERNELS = (ROOT / "docs" / "results" / f"{name}.json" for name in ("quickstart", "kernels"))
BEGIN, END = "<!-- results:quickstart -->", "<!-- end -->"


def write_table(results: dict[str, Any]) -> str:
    """The quickstart's comparison in Markdown, with the machine and the command under it."""
    rows, machine = results["rows"], results["machine"]
    lines = [
        "| format | weights on disk | bits a weight | held-out bits a byte | ratio | size | decode tokens/s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['bytes'] / 1e6:.2f} MB | {row['bits_per_weight']:.2f} "
            f"| {row['heldout_bits_per_byte']:.4f} "
            f"| {row['heldout_bits_per_byte'] / rows[0]['heldout_bits_per_byte']:.3f} "
            f"| {row['bytes'] / rows[0]['bytes']:.3f} | {write_speed(row)} |"
        )
    return "\n".join(lines) + (
        f"\n\n{rows[0]['parameters'] / 1e6:.2f}M parameters, {rows[0]['heldout_tokens']} held-out tokens; ratio and "
        f"size are to {rows[0]['model']}.\nSpeed is the median (slowest to fastest) of nine runs of 64 tokens.\n"
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"CPU kernels {machine['cpu_kernels']}, Python {machine['python']}, jax {machine['jax']}, {machine['date']}.\n"
        "Command: `bash scripts/quickstart.sh`.\n"
    )


def write_speed(row: dict[str, Any]) -> str:
    """Decoded tokens a second: the median, and the slowest and the fastest repeat."""
    slowest, fastest = row["decode_spread"]
    return f"{row['decode_tokens_per_second']:.0f} ({slowest:.0f} to {fastest:.0f})"


def write_kernels(results: dict[str, Any]) -> str:
    """The kernels' times, rates and ratios in Markdown: a line a case."""
    machine = results["machine"]
    lines = [
        "| case | time, us (fastest to slowest) | rate | of the ceiling | times as fast as |",
        "|---|--:|--:|--:|---|",
    ]
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        cases.setdefault(row["case"], []).append(row)
    for case, (time, *peers) in cases.items():
        slowest, fastest = time["spread"]
        ratios = ", ".join(f"{row['peer_name']} {row['ratio']:.2f}" for row in peers)
        rate = (
            f"{peers[0]['ours']:.1f} {peers[0]['metric']} | {peers[0]['percent_of_ceiling']:.0f}%" if peers else " | "
        )
        lines.append(f"| {case} | {time['ours']:.0f} ({fastest:.0f} to {slowest:.0f}) | {rate} | {ratios} |")
    return "\n".join(lines) + (
        "\n\nMedians of runs by turns. Ceilings, of the same process: reading memory for GB/s, XLA's float32\n"
        "product for GFLOP/s. Where a backend of this platform does not serve a case, ours is the reference itself.\n"
        f"Machine: {', '.join(f'{key} {value}' for key, value in machine.items() if key != 'command')}.\n"
        f"Command: `{machine['command']}`.\n"
    )


def replace_between(text: str, content: str) -> str:
    """`text` with what stands between the markers replaced."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{content}{END}{tail}"


def main() -> None:
    """Renews both files."""
    if len(sys.argv) > 1:
        kernels = "case" in read_json(Path(sys.argv[1]))["rows"][0]
        QUICKSTART.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sys.argv[1], KERNELS if kernels else QUICKSTART)
    table = write_table(read_json(QUICKSTART))
    text = f"# Results\n\n## Quickstart\n\n{table}"
    if KERNELS.exists():
        text += f"\n## Kernels\n\n{write_kernels(read_json(KERNELS))}"
    (ROOT / "docs" / "results.md").write_text(text)
    readme = ROOT / "README.md"
    readme.write_text(replace_between(readme.read_text(), table))


if __name__ == "__main__":
    main()
