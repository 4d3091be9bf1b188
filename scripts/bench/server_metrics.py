"""What a server under load tells of itself: whether something stays behind, and whether its memory grows."""

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import httpx

from hsai.serve.answers import FINISH_REASONS

IDLE_SECONDS = 60.0
"""In which a server that nobody asks must come to rest."""

SAMPLE_SECONDS = 15.0
"""Between two samples of memory; of a short load, a sixteenth of it."""

JUDGED_SECONDS = 120.0
"""The least that a second half must take for its growth to be judged: a server that has just begun still grows."""

GROWTH = 8 << 20
"""Bytes by which memory may grow in the second half of a load.

So many, as allocators keep what was freed: the arena of each thread, and Python's, become largest at some late moment.
So few, as in five minutes of five requests a second that is six kilobytes a request. A smaller leak the slope shows.
"""

RESIDENT = "process_resident_memory_bytes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Of a server's memory."""

    seconds: float
    """Since the load began."""

    requests: float
    """That had ended, whatever their end."""

    resident: float
    """Bytes."""


def read_metrics(client: httpx.Client) -> dict[str, float]:
    """Samples by their names and labels."""
    return parse_metrics(client.get("/metrics").raise_for_status().text)


def parse_metrics(text: str) -> dict[str, float]:
    """Samples by their names and labels."""
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


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


def find_remains(before: dict[str, float], after: dict[str, float], counts: Mapping[str, int]) -> Iterator[str]:
    """What a server at rest must not have, by its metrics before and after a load in which clients counted `counts`."""

    def grown(name: str) -> float:
        return after[name] - before[name]

    def ended(reason: str) -> float:
        return grown(f'hsai_requests_finished_total{{reason="{reason}"}}')

    if (used := after['hsai_cache_pages{state="used"}']) != 0:
        yield f"{used:g} pages are still in use"
    if ended("failed"):
        yield f"{ended('failed'):g} requests failed in the engine"
    whole = sum(map(ended, FINISH_REASONS))
    answered, left, turned_away = (counts[name] for name in ("answered", "left", "turned_away"))
    # Who leaves may do so when the answer has just ended, or before the request was taken or turned away.
    if not answered <= whole <= answered + left or whole + ended("cancelled") > answered + left:
        yield f"{answered} answered and {left} left, but {whole:g} ended and {ended('cancelled'):g} were cancelled"
    rejected = grown("hsai_requests_rejected_total")
    if not turned_away <= rejected <= turned_away + left:
        yield f"{turned_away} were turned away and {left} left, but {rejected:g} rejected"


async def watch_memory(client: httpx.AsyncClient, seconds: float) -> list[Sample]:
    """Samples of a server's memory for so long."""
    every = min(SAMPLE_SECONDS, seconds / 16)
    begun = time.monotonic()
    samples = []
    for index in range(int(seconds / every) + 1):
        await asyncio.sleep(begun + index * every - time.monotonic())
        response = await client.get("/metrics")
        found = parse_metrics(response.raise_for_status().text)
        requests = sum(value for name, value in found.items() if name.startswith("hsai_requests_finished_total"))
        samples.append(Sample(seconds=time.monotonic() - begun, requests=requests, resident=found[RESIDENT]))
    return samples


def describe_memory(samples: Sequence[Sample]) -> dict[str, float]:
    """Numbers by their names; the slopes, by least squares, are those of the second half."""
    residents, late = [sample.resident for sample in samples], _take_second_half(samples)
    found = {
        "memory_samples": float(len(samples)),
        "memory_first_mb": residents[0] / 1e6,
        "memory_middle_mb": late[0].resident / 1e6,
        "memory_last_mb": residents[-1] / 1e6,
        "memory_most_mb": max(residents) / 1e6,
        "memory_grown_in_second_half_mb": _measure_growth(late) / 1e6,
        "memory_mb_an_hour": _fit([sample.seconds for sample in late], late) * 3600 / 1e6,
    }
    if late[-1].requests > late[0].requests:
        found["memory_bytes_a_request"] = _fit([sample.requests for sample in late], late)
    return found


def find_growth(samples: Sequence[Sample]) -> Iterator[str]:
    """That memory grew in the second half of a load, where that took long enough to tell."""
    late = _take_second_half(samples)
    seconds = late[-1].seconds - late[0].seconds
    if seconds >= JUDGED_SECONDS and _measure_growth(late) > GROWTH:
        yield f"memory grew by {_measure_growth(late) / 1e6:.1f} MB in the last {seconds:.0f} seconds"


def _take_second_half(samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples[(len(samples) - 1) // 2 :]


def _measure_growth(samples: Sequence[Sample]) -> float:
    """By the line through all of them: the last one alone may have come at a moment of much work."""
    return _fit([sample.seconds for sample in samples], samples) * (samples[-1].seconds - samples[0].seconds)


def _fit(places: Sequence[float], samples: Sequence[Sample]) -> float:
    return statistics.linear_regression(places, [sample.resident for sample in samples]).slope
