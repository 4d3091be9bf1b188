#!/usr/bin/env python
"""Our server beside llama.cpp's: tokens a second that 1, 4, 16 and 64 clients are given together, over HTTP.

    python scripts/bench_serve.py BUNDLE FILE --llama-server PROGRAM [--streams 1 4 16 64] [--json FILE] [--quick]
        [-- OPTIONS OF hsai serve]

BUNDLE is what `hsai serve` takes, FILE a GGUF file of the same model, PROGRAM what scripts/install_llama_server.sh
built. In each round each client asks for the greedy continuation of a prompt of its own, of 64 words that no earlier
round had, and waits for all of it: at most 64 tokens, of which those are counted that came. Both servers run throughout
with as many rows as there are clients and as many threads as cores; who is not asked is stopped. The clients share the
processor with the servers. It needs httpx (the `dev` extra).
"""

import argparse
import asyncio
import os
import random
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from bench.load_prompts import WORDS
from bench.server_load import split_words

from hsai.files import write_json_atomic
from hsai.machine import describe_machine

PROMPT_WORDS = 64
ANSWER_TOKENS = 64
CONTEXT = 512
"""Tokens of a client's prompt and answer, at most."""

START_SECONDS = 120.0


class Server:
    """A server of OpenAI's completions in a process of its own, which runs only while it is asked."""

    def __init__(self, command: Sequence[str], url: str, model: str) -> None:
        """Starts it and waits until it answers.

        Raises:
          TimeoutError: it does not.
        """
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._url, self._model = url, model
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.close()
                raise TimeoutError(f"{command[0]} does not answer at {url}: {shlex.join(command)}")
            time.sleep(0.2)
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, prompts: Sequence[str]) -> float:
        """Tokens a second that all clients got, each with one of the prompts."""
        self._process.send_signal(signal.SIGCONT)
        begun = time.monotonic()
        tokens = asyncio.run(self._ask_all(prompts))
        seconds = time.monotonic() - begun
        self._process.send_signal(signal.SIGSTOP)
        return tokens / seconds

    async def _ask_all(self, prompts: Sequence[str]) -> int:
        limits = httpx.Limits(max_connections=len(prompts))
        async with httpx.AsyncClient(base_url=self._url, timeout=600, limits=limits) as client:
            return sum(await asyncio.gather(*(self._ask(client, prompt) for prompt in prompts)))

    async def _ask(self, client: httpx.AsyncClient, prompt: str) -> int:
        body = {"model": self._model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        response = await client.post("/v1/completions", json=body)
        response.raise_for_status()
        return int(response.json()["usage"]["completion_tokens"])

    def close(self) -> None:
        """Ends it. A stopped process hears no other signal."""
        self._process.kill()
        self._process.wait()


def start_ours(bundle: Path, streams: int, options: Sequence[str]) -> Server:
    """`hsai serve` with a row for each client."""
    port = find_port()
    command = [sys.executable, "-m", "hsai.cli", "serve", str(bundle), "--port", str(port), "--name", "model"]
    return Server([*command, "--rows", str(streams), *options], f"http://127.0.0.1:{port}", "model")


def start_llama(program: Path, file: Path, streams: int) -> Server:
    """llama-server with a slot for each client, and a cache that holds them all."""
    port = find_port()
    command = [str(program), "-m", str(file), "--port", str(port), "-np", str(streams), "-c", str(streams * CONTEXT)]
    threads = ["-t", str(os.cpu_count()), "--threads-http", str(streams + 2)]
    return Server([*command, *threads], f"http://127.0.0.1:{port}", "model")


def find_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def draw_prompts(streams: int, seed: int) -> list[str]:
    """Words without sense, others for each client and seed: no server has read them before."""
    draw = random.Random(seed)
    return [f"# {seed} {client}\n" + " ".join(draw.choices(WORDS, k=PROMPT_WORDS)) for client in range(streams)]


def measure(ours: Server, theirs: Server, streams: int, rounds: int) -> tuple[list[float], list[float]]:
    """Tokens a second by round, the order turned with each; one round before that does not count (it compiles)."""
    rates: tuple[list[float], list[float]] = ([], [])
    servers: list[Callable[[Sequence[str]], float]] = [ours.ask, theirs.ask]
    for turn in range(rounds + 1):
        prompts = draw_prompts(streams, 1000 * streams + turn)
        for index in (0, 1) if turn % 2 else (1, 0):
            rate = servers[index](prompts)
            if turn:
                rates[index].append(rate)
    return rates


def main() -> None:
    """Parses the command line, measures, prints, and writes the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--llama-server", type=Path, required=True)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--json", type=Path, help="writes machine and rows to this file")
    parser.add_argument("--quick", action="store_true", help="one and four clients, two rounds")
    words, options = split_words(sys.argv[1:])
    arguments = parser.parse_args(words)
    found = subprocess.run([str(arguments.llama_server), "--version"], capture_output=True, text=True)
    version = re.search(r"version: (.*)", found.stdout + found.stderr)
    peer = f"llama-server {arguments.file.stem}"
    machine = describe_machine() | {
        "command": shlex.join(["python", *sys.argv]),
        "llama_server": version[1] if version else "",
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    rows: list[dict[str, Any]] = []
    for streams in (1, 4) if arguments.quick else arguments.streams:
        ours = start_ours(arguments.bundle, streams, options)
        try:
            theirs = start_llama(arguments.llama_server, arguments.file, streams)
            try:
                own, others = measure(ours, theirs, streams, rounds=2 if arguments.quick else 7)
            finally:
                theirs.close()
        finally:
            ours.close()
        ratios = [mine / other for mine, other in zip(own, others, strict=True)]
        row = {
            "case": f"{arguments.bundle.name} served to {streams}",
            "metric": "tokens/s",
            "ours": statistics.median(own),
            "peer": statistics.median(others),
            "peer_name": peer,
            "ratio": statistics.median(ratios),
            "ceiling": None,
            "percent_of_ceiling": None,
            "spread": [min(own), max(own)],
            "peer_spread": [min(others), max(others)],
            "n": len(own),
        }
        print(
            f"{row['case']:<40} {row['ours']:7.1f} tokens/s ({min(own):.1f} to {max(own):.1f})  {peer} "
            f"{row['peer']:.1f} ({min(others):.1f} to {max(others):.1f}): {row['ratio']:.2f}x",
            flush=True,
        )
        rows.append(row)
        if arguments.json is not None:  # after each, for whoever does not wait for the last
            write_json_atomic(arguments.json, {"machine": machine, "serving": arguments.bundle.name, "rows": rows})


if __name__ == "__main__":
    main()
