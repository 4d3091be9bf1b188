"""Many clients of one server, some of whom leave, and what they find: are answers right, and does anything stay behind?

Every prompt was answered alone before, greedily, so that under load its text must be the same: another text would be
somebody else's, or a cache's that was overwritten.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

WORDS = (
    "def return class import for while if else try except with lambda yield from as in not and or is None True False "
    "print range list dict set tuple int float str bytes open read write close append extend sorted reversed zip map"
).split()

PROMPTS = 24
LEAVING = 0.25
"""Of all requests, the clients of which leave before the end."""

IDLE_SECONDS = 60.0
"""In which a server that nobody asks must come to rest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked, and what is answered to it alone."""

    body: dict[str, Any]
    """Of the request."""

    text: str
    """Of the answer."""


@dataclasses.dataclass(kw_only=True)
class Findings:
    """What clients found."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    """Requests: answered, left, turned_away (429)."""

    faults: list[str] = dataclasses.field(default_factory=list)
    """Answers that are wrong, and requests that got none."""

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
        found = {name: float(self.counts[name]) for name in ("answered", "left", "turned_away")}
        found["tokens_per_second"] = self.tokens / self.seconds
        for name, values in (("first_token_seconds", self.first), ("token_seconds", self.each)):
            for percent in (50, 95):
                if len(values) > 1:
                    found[f"{name}_p{percent}"] = statistics.quantiles(values, n=100)[percent - 1]
        return found


def ask_alone(
    client: httpx.Client, model: str, *, longest_prompt: int, longest_answer: int, seed: int = 0
) -> list[Prompt]:
    """Prompts of 1 to `longest_prompt` words, half of which begin alike, with their answers, one after the other."""
    draw = random.Random(seed)
    common = draw.choices(WORDS, k=longest_prompt // 2)
    prompts = []
    for index in range(PROMPTS):
        words = draw.choices(WORDS, k=round(longest_prompt ** draw.random()))
        words = [*common, *words][:longest_prompt] if index % 2 else words
        body = {
            "model": model,
            "prompt": f"# {index}\n" + " ".join(words),
            "max_tokens": draw.randint(1, longest_answer),
            "temperature": 0,
        }
        response = client.post("/v1/completions", json=body)
        response.raise_for_status()
        prompts.append(Prompt(body=body, text=response.json()["choices"][0]["text"]))
    return prompts


def run_load(
    url: str, headers: dict[str, str], prompts: Sequence[Prompt], *, clients: int, seconds: float, seed: int = 0
) -> Findings:
    """Asks for `seconds`, and waits for all answers."""
    findings = Findings()

    async def run() -> None:
        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits) as client:
            begun = time.monotonic()
            tasks = (
                _ask_on(client, prompts, random.Random(f"{seed} {index}"), begun + seconds, findings)
                for index in range(clients)
            )
            await asyncio.gather(*tasks)
            findings.seconds = time.monotonic() - begun

    asyncio.run(run())
    return findings


def wait_for_rest(client: httpx.Client) -> dict[str, float]:
    """The server's metrics, once it answers nobody.

    Raises:
      TimeoutError: it does not come to rest.
    """
    deadline = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < deadline:
        found = read_metrics(client)
        if found["hsai_requests_running"] == found["hsai_requests_queued"] == 0:
            return found
        time.sleep(0.1)
    raise TimeoutError(f"the server still answers {IDLE_SECONDS:g} seconds after the last request")


def read_metrics(client: httpx.Client) -> dict[str, float]:
    """Samples by their names and labels."""
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def find_remains(before: dict[str, float], after: dict[str, float], findings: Findings) -> Iterator[str]:
    """What a server at rest must not have, by its metrics before and after a load."""

    def grown(name: str) -> float:
        return after[name] - before[name]

    def ended(reason: str) -> float:
        return grown(f'hsai_requests_finished_total{{reason="{reason}"}}')

    if (used := after['hsai_cache_pages{state="used"}']) != 0:
        yield f"{used:g} pages are still in use"
    if ended("failed"):
        yield f"{ended('failed'):g} requests failed in the engine"
    whole = sum(ended(reason) for reason in ("end_of_text", "stop", "max_tokens", "context"))
    answered, left = findings.counts["answered"], findings.counts["left"]
    # Who leaves may do so when the answer has just ended, or before the request was taken.
    if not answered <= whole <= answered + left or whole + ended("cancelled") > answered + left:
        yield f"{answered} answered and {left} left, but {whole:g} ended and {ended('cancelled'):g} were cancelled"
    if grown("hsai_requests_rejected_total") < findings.counts["turned_away"]:
        yield f"{findings.counts['turned_away']} were turned away, and fewer counted"


async def _ask_on(
    client: httpx.AsyncClient, prompts: Sequence[Prompt], draw: random.Random, deadline: float, findings: Findings
) -> None:
    while time.monotonic() < deadline:
        prompt = draw.choice(prompts)
        patience = draw.expovariate(2.0) if draw.random() < LEAVING else None
        stream = draw.random() < 0.5
        try:
            async with asyncio.timeout(patience):
                status, text = await _ask(client, prompt.body | {"stream": stream}, findings)
        except TimeoutError:
            findings.counts["left"] += 1
            continue
        except (httpx.HTTPError, ValueError, KeyError) as error:
            findings.faults.append(f"no answer: {type(error).__name__} {error}")
            continue
        if status == 429:
            findings.counts["turned_away"] += 1
            await asyncio.sleep(draw.random())
        elif status != 200:
            findings.faults.append(f"status {status}: {text[:200]}")
        elif text != prompt.text:
            findings.faults.append(f"{prompt.body['prompt'][:30]!r}: {text!r} instead of {prompt.text!r}")
        else:
            findings.counts["answered"] += 1


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], findings: Findings) -> tuple[int, str]:
    """The status, and the text or what else was said."""
    begun = time.monotonic()
    if not body["stream"]:
        response = await client.post("/v1/completions", json=body)
        if response.status_code != 200:
            return response.status_code, response.text
        content = response.json()
        findings.tokens += content["usage"]["completion_tokens"]
        return 200, content["choices"][0]["text"]
    pieces: list[str] = []
    times: list[float] = []
    made = 0
    body = body | {"stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return response.status_code, (await response.aread()).decode()
        # A stream that is left must be closed before its connection serves again.
        async with contextlib.aclosing(response.aiter_lines()) as lines:
            async for line in lines:
                if line == "data: [DONE]":
                    break
                if not line.startswith("data: "):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return 500, chunk["error"]["message"]
                times.append(time.monotonic())
                pieces += [choice["text"] for choice in chunk["choices"]]
                made = chunk["usage"]["completion_tokens"] if chunk["usage"] else made
            else:
                raise ValueError("a stream ended without [DONE]")
    findings.tokens += made
    findings.first.append(times[0] - begun)
    if made > 1:
        findings.each.append((times[-1] - times[0]) / (made - 1))
    return 200, "".join(pieces)
