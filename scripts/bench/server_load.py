"""Many clients of one server, some of whom leave, and what they find: are answers right, and is everybody answered?"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from bench.load_prompts import Answer, Prompt
from bench.server_metrics import Sample, watch_memory

LEAVING = 0.25
"""Of all requests, the clients of which leave before the end."""


class Refused(Exception):
    """Another status than 200, or an error in the middle of a stream, which is none of HTTP's."""

    def __init__(self, status: int | None, message: str, retry_after: str | None = None) -> None:
        super().__init__(f"status {status}: {message[:200]}" if status else f"a stream failed: {message}")
        self.status = status
        self.retry_after = retry_after


@dataclasses.dataclass(kw_only=True)
class Findings:
    """What clients found."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    """Requests: answered, and came_again of them (turned away before); left, and left_with_text; turned_away (429)."""

    faults: list[str] = dataclasses.field(default_factory=list)
    """Answers that are wrong, and requests that got none."""

    memory: list[Sample] = dataclasses.field(default_factory=list)
    """Of the server."""

    tokens: int = 0
    """Made in answers that came whole."""

    first: list[float] = dataclasses.field(default_factory=list)
    """Seconds to the first piece of each streamed text."""

    each: list[float] = dataclasses.field(default_factory=list)
    """Seconds a token after that, of each streamed text."""

    seconds: float = 0.0
    """All of it."""

    def summary(self) -> dict[str, float]:
        """Numbers by their names."""
        names = ("answered", "came_again", "left", "left_with_text", "turned_away")
        found = {name: float(self.counts[name]) for name in names}
        found["tokens_per_second"] = self.tokens / self.seconds
        for name, values in (("first_token_seconds", self.first), ("token_seconds", self.each)):
            for percent in (50, 95):
                if len(values) > 1:
                    found[f"{name}_p{percent}"] = statistics.quantiles(values, n=100)[percent - 1]
        return found

    def judge(self, prompt: Prompt, answer: Answer, *, whole: bool) -> bool:
        """Whether an answer is right, or the beginning of the right one where its client left."""
        difference = answer.find_difference(prompt.answer, whole=whole)
        if difference is not None:
            self.faults.append(f"{prompt.kind}{'' if whole else ', left'}: {difference}")
        return difference is None


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A script's own words, and those of `hsai serve` behind two hyphens, which argparse would take for its own."""
    end = words.index("--") if "--" in words else len(words)
    return list(words[:end]), list(words[end + 1 :])


def run_load(
    url: str, headers: dict[str, str], prompts: Sequence[Prompt], *, clients: int, seconds: float, seed: int = 0
) -> Findings:
    """Asks for `seconds`, and waits for all answers."""
    findings = Findings()

    async def run() -> None:
        # One more is who watches.
        limits = httpx.Limits(max_connections=clients + 1)
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits) as client:
            begun = time.monotonic()
            tasks = (
                _ask_on(client, prompts, random.Random(f"{seed} {index}"), begun + seconds, findings)
                for index in range(clients)
            )
            watch = asyncio.create_task(watch_memory(client, seconds))
            await asyncio.gather(watch, *tasks)
            findings.memory = watch.result()
            findings.seconds = time.monotonic() - begun

    asyncio.run(run())
    return findings


async def _ask_on(
    client: httpx.AsyncClient, prompts: Sequence[Prompt], draw: random.Random, deadline: float, findings: Findings
) -> None:
    """One client after the other, each of which leaves, or comes again until it is answered."""
    counts = findings.counts
    turned_away = False
    prompt = draw.choice(prompts)
    while time.monotonic() < deadline:
        if not turned_away:
            prompt = draw.choice(prompts)
        patience = draw.expovariate(2.0) if draw.random() < LEAVING else None
        stream = draw.random() < 0.5
        # In a long queue nobody who leaves early would have any text: some wait for it, and leave in its middle.
        waits = stream and draw.random() < 0.5
        came_again, turned_away = turned_away, False
        answer = Answer()
        try:
            async with asyncio.timeout(None if waits else patience) as leaving:
                on_first = functools.partial(_leave_in, leaving, patience)
                await _ask(client, prompt.path, prompt.body | {"stream": stream}, answer, findings, on_first)
        except TimeoutError:
            counts["left"] += 1
            counts["left_with_text"] += bool(answer.text)
            findings.judge(prompt, answer, whole=False)
        except Refused as refusal:
            turned_away = refusal.status == 429
            counts["turned_away"] += turned_away
            told = re.fullmatch("[1-9][0-9]*", refusal.retry_after or "")
            if not turned_away or not told:
                findings.faults.append(f"{prompt.kind}: {refusal}, Retry-After: {refusal.retry_after}")
            # Less patiently than they are told to: the queue is to overflow.
            seconds = draw.uniform(0, int(told[0]) if told else 1)
            await asyncio.sleep(max(0.0, min(seconds, deadline - time.monotonic())))
        except (httpx.HTTPError, ValueError, KeyError) as error:
            findings.faults.append(f"{prompt.kind}: no answer: {type(error).__name__} {error}")
        else:
            if findings.judge(prompt, answer, whole=True):
                counts["answered"] += 1
                counts["came_again"] += came_again


def _leave_in(leaving: asyncio.Timeout, patience: float | None) -> None:
    """From now on, if at all."""
    if patience is not None:
        leaving.reschedule(asyncio.get_running_loop().time() + patience)


async def _ask(
    client: httpx.AsyncClient,
    path: str,
    body: dict[str, Any],
    answer: Answer,
    findings: Findings,
    on_first: Callable[[], None],
) -> None:
    """Fills an answer as it comes; `on_first` is called at the first piece of a streamed text.

    Raises:
      Refused: there is none, or not all of it.
    """
    begun = time.monotonic()
    times: list[float] = []
    if body["stream"]:
        body = body | {"stream_options": {"include_usage": True}}
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            message = (await response.aread()).decode()
            raise Refused(response.status_code, message, response.headers.get("retry-after"))
        if not body["stream"]:
            answer.add(json.loads(await response.aread()))
            findings.tokens += answer.new_tokens
            return
        # A stream that is left must be closed before its connection serves again.
        async with contextlib.aclosing(response.aiter_lines()) as lines:
            async for line in lines:
                if line == "data: [DONE]":
                    break
                if not line.startswith("data: "):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise Refused(None, chunk["error"]["message"])
                before = answer.text
                answer.add(chunk)
                if answer.text != before:
                    times.append(time.monotonic())
                    if not before:
                        on_first()
            else:
                raise ValueError("a stream ended without [DONE]")
    findings.tokens += answer.new_tokens
    if times:
        findings.first.append(times[0] - begun)
        if answer.new_tokens > 1:
            findings.each.append((times[-1] - times[0]) / (answer.new_tokens - 1))
