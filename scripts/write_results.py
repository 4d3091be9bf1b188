"""Writes docs/results.md and the table in README.md from docs/results/*.json, so that no number is typed by hand.

python scripts/write_results.py [FILE ...]

Each FILE becomes part of docs/results first: runs/quickstart/results.json as quickstart.json, bench_perplexity.py's as
perplexity.json. What bench_kernels.py wrote goes into kernels.json in place of the same cases, bench_frontier.py's into
frontier.json (of which a picture is made) in place of the same models, bench_decode.py's into decoding.json and
bench_serve.py's into serving.json case by case, and that of `hsai eval --tasks
--json` into evaluation.json, task by task.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsai.files import read_json, write_json_atomic

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART, KERNELS, DECODING, SERVING, EVALUATION, PERPLEXITY, FRONTIER = (
    ROOT / "docs" / "results" / f"{name}.json"
    for name in ("quickstart", "kernels", "decoding", "serving", "evaluation", "perplexity", "frontier")
)
PICTURE = ROOT / "docs" / "results" / "frontier.png"
JOINED = (
    "Commits that are named here and not in the history (those of 2026-11-25 and 26 before 45a063f) were joined\n"
    "into that one.\n"
)
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
        "bf16 is slower than its bytes: XLA's products with bfloat16 weights reach a few percent of what a CPU's\n"
        "memory gives (docs/results.md, dense), so ratios to it are not those of memory alone.\n"
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"CPU kernels {machine['cpu_kernels']}, Python {machine['python']}, jax {machine['jax']}, {machine['date']}.\n"
        "Command: `bash scripts/quickstart.sh`.\n"
    )


def write_speed(row: dict[str, Any]) -> str:
    """Decoded tokens a second: the median, and the slowest and the fastest repeat."""
    slowest, fastest = row["decode_spread"]
    return f"{row['decode_tokens_per_second']:.0f} ({slowest:.0f} to {fastest:.0f})"


def replace_rows(
    kept: list[dict[str, Any]], results: dict[str, Any], rows: str, names: Sequence[str]
) -> list[dict[str, Any]]:
    """`kept`, runs of a bench, with the newest behind them, and its rows in place of theirs with the same `names`,
    of which a row has some, and its run's machine the others."""

    def name(run: dict[str, Any], row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] if key in row else run["machine"][key] for key in names)

    newer = {name(results, row) for row in results[rows]}
    rests = [run | {rows: [row for row in run[rows] if name(run, row) not in newer]} for run in kept]
    return [*(run for run in rests if run[rows]), results]


def write_kernels(runs: list[dict[str, Any]]) -> str:
    """The kernels' times, rates and ratios in Markdown: a line a case."""
    return "\n".join(map(_write_run, runs)) + (
        "\nMedians of runs by turns. Ceilings, by the same turns: reading memory for GB/s; for GFLOP/s, which\n"
        "count the dense product, XLA's product of activations or, where ours multiplies integers, ONNX Runtime's of\n"
        "int8 (– where that was not measured). Activations are float32 where a case names no others. Where a backend\n"
        "of this platform does not serve a case, ours is the reference itself.\n"
    )


def _write_run(run: dict[str, Any]) -> str:
    lines = [
        "| case | time, us (fastest to slowest) | rate | of the ceiling | times as fast as |",
        "|---|--:|--:|--:|---|",
    ]
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in run["rows"]:
        cases.setdefault(row["case"], []).append(row)
    for case, (time, *peers) in cases.items():
        slowest, fastest = time["spread"]
        ratios = ", ".join(f"{row['peer_name']} {row['ratio']:.2f}" for row in peers)
        percent = time["percent_of_ceiling"]
        share = "–" if percent is None else f"{percent:.0f}%"
        rate = f"{peers[0]['ours']:.1f} {peers[0]['metric']}" if peers else ""
        lines.append(f"| {case} | {time['ours']:.0f} ({fastest:.0f} to {slowest:.0f}) | {rate} | {share} | {ratios} |")
    machine = ", ".join(f"{key} {value}" for key, value in run["machine"].items() if key != "command")
    cut_off = (
        "" if run.get("complete") else "This record was cut off: the command did not end, and cases are missing.\n"
    )
    return "\n".join(lines) + f"\n\n{cut_off}Machine: {machine}.\nCommand: `{run['machine']['command']}`.\n"


def write_decoding(runs: list[dict[str, Any]]) -> str:
    """Whole models beside other engines in Markdown: a line a case."""
    text = ""
    for run in runs:
        lines = [
            f"### {run['decoding']}, {run['machine']['cpu_kernels']}",
            "",
            "| weights, work | tokens/s (slowest to fastest) | of the ceiling | not in kernels | times as fast as |",
            "|---|--:|--:|--:|---|",
        ]
        for row in run["rows"]:
            if row["peer"] is not None:
                continue
            speed, slowest, fastest = (1e6 * row["tokens"] / time for time in (row["ours"], *row["spread"]))
            peers = [peer for peer in run["rows"] if peer["case"] == row["case"] and peer["peer"] is not None]
            share = f"{100 * row['outside_of_kernels']:.1f}%" if "outside_of_kernels" in row else ""
            percent = peers[0]["percent_of_ceiling"] if peers else None
            ceiling = "–" if percent is None else f"{percent:.0f}% of {peers[0]['metric']}"
            ratios = ", ".join(f"{peer['peer_name']} {peer['ratio']:.2f}" for peer in peers)
            case = row["case"].removeprefix(f"{run['decoding']} ")
            lines.append(f"| {case} | {speed:.0f} ({slowest:.0f} to {fastest:.0f}) | {ceiling} | {share} | {ratios} |")
        machine = run["machine"]
        text += "\n".join(lines) + (
            f"\n\nMachine: {', '.join(f'{key} {value}' for key, value in machine.items() if key != 'command')}.\n"
            f"Command: `{machine['command']}`.\n\n"
        )
    return (
        text + "One stream where no number of streams is given; of a prompt, tokens read a second. Peers run by turns "
        "with ours,\nin processes of their own (scripts/bench/decoding.py, scripts/bench/other_engines.py).\n"
    )


def write_serving(runs: list[dict[str, Any]]) -> str:
    """Servers beside llama.cpp's in Markdown: a line a case."""
    lines = [
        "| bundle, clients | tokens/s (slowest to fastest) | beside | its tokens/s (slowest to fastest) | ratio |",
        "|---|--:|---|--:|--:|",
    ]
    made = ""
    for run in runs:
        for row in run["rows"]:
            own, other = (
                f"{row[a]:.0f} ({row[b][0]:.0f} to {row[b][1]:.0f})"
                for a, b in (("ours", "spread"), ("peer", "peer_spread"))
            )
            lines.append(f"| {row['case']} | {own} | {row['peer_name']} | {other} | {row['ratio']:.2f} |")
        machine = run["machine"]
        made += (
            f"\nMachine: {', '.join(f'{key} {value}' for key, value in machine.items() if key != 'command')}.\n"
            f"Command: `{machine['command']}`.\n"
        )
    return "\n".join(lines) + f"\n\nMedians of rounds by turns; what a round is, scripts/bench_serve.py says.\n{made}"


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


def write_frontier(runs: list[dict[str, Any]]) -> str:
    """Compressed models beside llama.cpp's, in Markdown."""
    from bench.frontier import write_tables  # a neighbour of this file, where scripts/ is on the path

    return f"![perplexity against bytes](results/{PICTURE.name})\n\n{write_tables(runs)}"


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
        if results.get("rows") == []:
            print(f"{name} has no rows: --tune found nothing faster")
        elif "evaluations" in results:
            kept = read_json(EVALUATION) if EVALUATION.exists() else []
            write_json_atomic(EVALUATION, merge_tasks(kept, results))
        elif "decoding" in results:
            kept = read_json(DECODING) if DECODING.exists() else []
            write_json_atomic(DECODING, replace_rows(kept, results, "rows", ("cpu_kernels", "case")))
        elif "serving" in results:
            kept = read_json(SERVING) if SERVING.exists() else []
            write_json_atomic(SERVING, replace_rows(kept, results, "rows", ("cpu_kernels", "case", "peer_name")))
        elif "frontier" in results:
            kept = read_json(FRONTIER) if FRONTIER.exists() else []
            write_json_atomic(FRONTIER, replace_rows(kept, results, "frontier", ("dense", "model", "side")))
        elif "case" not in results["rows"][0]:
            write_json_atomic(QUICKSTART, results)
        elif results["rows"][0]["metric"] == "perplexity":
            write_json_atomic(PERPLEXITY, results)
        else:
            kept = read_json(KERNELS) if KERNELS.exists() else []
            write_json_atomic(KERNELS, replace_rows(kept, results, "rows", ("cpu_kernels", "case")))
    table = write_table(read_json(QUICKSTART))
    text = f"# Results\n\n{JOINED}\n## Quickstart\n\n{table}"
    if KERNELS.exists():
        text += f"\n## Kernels\n\n{write_kernels(read_json(KERNELS))}"
    if DECODING.exists():
        text += f"\n## Whole models\n\n{write_decoding(read_json(DECODING))}"
    if SERVING.exists():
        text += f"\n## Servers\n\n{write_serving(read_json(SERVING))}"
    if EVALUATION.exists():
        text += f"\n## Benchmarks\n\n{write_evaluation(read_json(EVALUATION))}"
    if PERPLEXITY.exists():
        text += f"\n## Perplexity beside llama.cpp\n\n{write_perplexity(read_json(PERPLEXITY))}"
    if FRONTIER.exists():
        from bench.frontier import plot_frontier

        plot_frontier(read_json(FRONTIER), PICTURE)
        text += f"\n## Size and quality\n\n{write_frontier(read_json(FRONTIER))}"
    (ROOT / "docs" / "results.md").write_text(text)
    readme = ROOT / "README.md"
    readme.write_text(replace_between(readme.read_text(), table))


if __name__ == "__main__":
    main()
