"""Writes docs/results.md and the table in README.md from docs/results/*.json, so that no number is typed by hand.

python scripts/write_results.py [FILE ...]

Each FILE becomes part of docs/results first: runs/quickstart/results.json as quickstart.json, what bench_kernels.py
wrote as kernels.json, bench_perplexity.py's as perplexity.json, bench_frontier.py's as frontier.json (and a picture of
it); and what `hsai eval --tasks --json` wrote goes into evaluation.json, task by task, in place of what the same model
scored there before.
"""

import sys
from pathlib import Path
from typing import Any

from hsai.files import read_json, write_json_atomic

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART, KERNELS, EVALUATION, PERPLEXITY, FRONTIER = (
    ROOT / "docs" / "results" / f"{name}.json"
    for name in ("quickstart", "kernels", "evaluation", "perplexity", "frontier")
)
PICTURE = ROOT / "docs" / "results" / "frontier.png"
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
        rate = " | "
        if peers:
            percent = peers[0]["percent_of_ceiling"]
            rate = f"{peers[0]['ours']:.1f} {peers[0]['metric']} | {'–' if percent is None else f'{percent:.0f}%'}"
        lines.append(f"| {case} | {time['ours']:.0f} ({fastest:.0f} to {slowest:.0f}) | {rate} | {ratios} |")
    return "\n".join(lines) + (
        "\n\nMedians of runs by turns. Ceilings, of the same process: reading memory for GB/s; for GFLOP/s, which\n"
        "count the dense product, XLA's float32 product or, where ours multiplies integers, ONNX Runtime's of int8.\n"
        "Where a backend of this platform does not serve a case, ours is the reference itself.\n"
        f"Machine: {', '.join(f'{key} {value}' for key, value in machine.items() if key != 'command')}.\n"
        f"Command: `{machine['command']}`.\n"
    )


def merge_tasks(kept: list[dict[str, Any]], results: dict[str, Any]) -> list[dict[str, Any]]:
    """`kept`, a row a task, with those that `hsai eval --tasks --json` wrote in their place, or behind."""
    rows = {(row["model"], row["task"]["task"], row["task"]["few_shot"]): row for row in kept}
    for report in results["evaluations"]:
        about = {name: value for name, value in report.items() if name != "tasks"}
        for task in report["tasks"]:
            rows[report["model"], task["task"], task["few_shot"]] = {
                **about,
                "machine": results["machine"],
                "task": task,
            }
    return list(rows.values())


def write_evaluation(rows: list[dict[str, Any]]) -> str:
    """The tasks' scores in Markdown, a line a metric; MMLU's subjects stay in the JSON."""
    lines = [
        "| model | task | few-shot | metric | value | standard error | n | seconds |",
        "|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        task = row["task"]
        if task["part_of"]:
            continue
        name = task["task"] if task["limit"] is None else f"{task['task']}, the first {task['limit']}"
        for metric, found in task["metrics"].items():
            error = "" if found["standard_error"] is None else f"{found['standard_error']:.4f}"
            lines.append(
                f"| {row['model']} | {name} | {task['few_shot']} | {metric} | {found['value']:.4f} | {error} "
                f"| {found['n']} | {task['seconds']:.0f} |"
            )
    made = {}
    for row in rows:
        machine = row["machine"]
        where = f"{machine['processor']}, {machine['cores']} cores, jax {machine['jax']}, {machine['date']}"
        about = f"{row['dtype']}, commit {row['commit']}, {row['batch_tokens']} tokens a batch, {where}"
        made.setdefault((machine["command"], about), None)
    return "\n".join(lines) + (
        "\n\nBy the definitions of EleutherAI's harness (docs/evaluation.md). Seconds are those of the clock.\n\n"
        + "".join(f"- `{command}`: {about}.\n" for command, about in made)
    )


def write_perplexity(results: dict[str, Any]) -> str:
    """The comparison with llama.cpp in Markdown."""
    lines = ["| case | text | hsai | llama.cpp | difference |", "|---|---|--:|--:|--:|"]
    for row in results["rows"]:
        lines.append(
            f"| {row['case']} | {row['text']} | {row['ours']:.4f} ± {row['standard_error']:.4f} | {row['peer']:.4f} "
            f"| {100 * (row['ratio'] - 1):+.2f}% |"
        )
    machine, first = results["machine"], results["rows"][0]
    return "\n".join(lines) + (
        f"\n\nThe second half of each chunk, {first['n']} tokens. The peer is {first['peer_name']}, which rounds\n"
        "activations to 8 bits; hsai computes in float32 from the same weights.\n"
        f"Machine: {machine['processor']}, {machine['cores']} cores, jax {machine['jax']}, {machine['date']}.\n"
        f"Command: `{machine['command']}`.\n"
    )


def write_frontier(results: dict[str, Any]) -> str:
    """Compressed models beside llama.cpp's, in Markdown."""
    rows = results["frontier"]
    dense = {row["side"]: row["perplexity"] for row in rows if row["model"] in ("dense", "F32")}
    lines = [
        "| model | by | all weights | bits a weight | perplexity | ratio to its dense |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: -float(row["bytes"])):
        lines.append(
            f"| {row['model']} | {row['side']} | {row['bytes'] / 1e6:.2f} MB | {row['bits_per_weight']:.3f} "
            f"| {row['perplexity']:.3f} ± {row['standard_error']:.3f} | {row['perplexity'] / dense[row['side']]:.3f} |"
        )
    machine = results["machine"]
    return (
        f"![perplexity against bytes](results/{PICTURE.name})\n\n"
        + "\n".join(lines)
        + (
            f"\n\nPerplexity of {results['text']}, {rows[0]['n']} tokens that calibration "
            f"({results['calibration']}) did not see;\n"
            "llama.cpp quantizes with an importance matrix of the same calibration, and measures its own files.\n"
            f"Machine: {machine['processor']}, {machine['cores']} cores, jax {machine['jax']}, {machine['date']}.\n"
            f"Command: `{machine['command']}`.\n"
        )
    )


def replace_between(text: str, content: str) -> str:
    """`text` with what stands between the markers replaced."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{content}{END}{tail}"


def main() -> None:
    """Takes in what was measured, and renews both files."""
    QUICKSTART.parent.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:]:
        results = read_json(Path(name))
        if "evaluations" in results:
            kept = read_json(EVALUATION) if EVALUATION.exists() else []
            write_json_atomic(EVALUATION, merge_tasks(kept, results))
        elif "frontier" in results:
            write_json_atomic(FRONTIER, results)
        elif "case" not in results["rows"][0]:
            write_json_atomic(QUICKSTART, results)
        else:
            write_json_atomic(PERPLEXITY if results["rows"][0]["metric"] == "perplexity" else KERNELS, results)
    table = write_table(read_json(QUICKSTART))
    text = f"# Results\n\n## Quickstart\n\n{table}"
    if KERNELS.exists():
        text += f"\n## Kernels\n\n{write_kernels(read_json(KERNELS))}"
    if EVALUATION.exists():
        text += f"\n## Benchmarks\n\n{write_evaluation(read_json(EVALUATION))}"
    if PERPLEXITY.exists():
        text += f"\n## Perplexity beside llama.cpp\n\n{write_perplexity(read_json(PERPLEXITY))}"
    if FRONTIER.exists():
        from bench.plot_frontier import (
            plot_frontier,
        )  # a neighbour when this file is a program, not when it is imported

        plot_frontier(read_json(FRONTIER)["frontier"], PICTURE)
        text += f"\n## Size and quality\n\n{write_frontier(read_json(FRONTIER))}"
    (ROOT / "docs" / "results.md").write_text(text)
    readme = ROOT / "README.md"
    readme.write_text(replace_between(readme.read_text(), table))


if __name__ == "__main__":
    main()
