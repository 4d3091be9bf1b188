#!/usr/bin/env python
"""Loads a server with many clients, requests of every kind and disconnects, and looks for what must not be.

    python scripts/load_server.py MODEL [--clients 64] [--minutes 10] [--json FILE] [--quick]

Starts `hsai serve MODEL` on this machine, has each of 24 prompts answered alone, and then asked by all clients at once,
streamed or not: completions and chats, greedy and drawn by a seed, with logprobs, a penalty, a schema (MODEL must have
a chat template). A quarter of the clients leave early; who finds the queue full comes again. Exit status 1 if an answer
is not the one that was given alone (scripts/bench/load_prompts.py says for which models that is promised), what a
client had when it left is no beginning of it, a request got no answer, a 429 does not say when to come again, pages or
requests stay behind, memory grew by more than a tenth and 64 MiB since the warm-up, or by more than 8 MiB in the second
half (scripts/bench/server_metrics.py says why), or SIGTERM does not end the server well. --quick takes 20 seconds, too
few for the second half to be judged. The clients share the processor with the server.
Options of hsai serve stand last, behind two hyphens, in place of these: ... MODEL -- --queue 24
"""

import argparse
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
from bench.load_prompts import ask_alone
from bench.server_load import run_load, split_words
from bench.server_metrics import RESIDENT, describe_memory, find_growth, find_remains, wait_for_rest

from hsai.files import write_json_atomic
from hsai.machine import describe_machine
from hsai.progress import say

WARM_SECONDS = 10.0
MEMORY = 64 << 20

OPTIONS = ("--queue", "24")
"""Of the server, where none are given: of 64 clients eight are answered, 24 wait, and the others find no place."""


def main() -> int:
    """Runs the load; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--longest-prompt", type=int, default=200, help="in words")
    parser.add_argument("--longest-answer", type=int, default=64, help="in tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    words, given = split_words(sys.argv[1:])
    options = given or [*OPTIONS]
    arguments = parser.parse_args(words)
    seconds = 20.0 if arguments.quick else 60.0 * arguments.minutes
    key = secrets.token_hex(16)
    command = [sys.executable, "-m", "hsai.cli", "serve", str(arguments.model), "--port", "0", "--name", "loaded"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, env={**os.environ, "HSAI_API_KEY": key}
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            return 1
        url, headers = found[0], {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=url, headers=headers, timeout=600) as client:
            lengths = {"longest_prompt": arguments.longest_prompt, "longest_answer": arguments.longest_answer}
            prompts = ask_alone(client, "loaded", **lengths)
            say(f"{len(prompts)} prompts were answered alone; loading {url} for {seconds:g} seconds")
            warm = run_load(url, headers, prompts, clients=arguments.clients, seconds=WARM_SECONDS, seed=1)
            before = wait_for_rest(client)
            findings = run_load(url, headers, prompts, clients=arguments.clients, seconds=seconds)
            after = wait_for_rest(client)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=120)
    faults = [*warm.faults, *findings.faults, *find_remains(before, after, findings.counts)]
    faults += find_growth(findings.memory)
    if after[RESIDENT] > 1.1 * before[RESIDENT] + MEMORY:
        faults.append(f"memory grew from {before[RESIDENT] / 1e6:.0f} to {after[RESIDENT] / 1e6:.0f} MB")
    if status != 0:
        faults.append(f"the server ended with status {status}")
    summary = findings.summary() | describe_memory(findings.memory)
    summary["memory_grown_at_rest_mb"] = (after[RESIDENT] - before[RESIDENT]) / 1e6
    for name, value in summary.items():
        say(f"{name}: {value:.4g}")
    for fault in faults[:20]:
        say(f"fault: {fault}")
    say(f"{len(faults)} faults")
    if arguments.json is not None:
        case = f"{arguments.model.name}, {arguments.clients} clients, {seconds:g} seconds, {shlex.join(options)}"
        empty = dict.fromkeys(("peer", "peer_name", "ratio", "ceiling", "percent_of_ceiling", "spread"))
        rows = [{"case": case, "metric": name, "ours": value, **empty, "n": 1} for name, value in summary.items()]
        machine = describe_machine() | {"command": shlex.join(["python", *sys.argv])}
        write_json_atomic(arguments.json, {"machine": machine, "rows": rows, "faults": faults})
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
