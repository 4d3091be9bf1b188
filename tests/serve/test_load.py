"""Many clients at once, in short: scripts/load_server.py does it for minutes. And the load finds what it looks for."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hsai.data.assets import Assets
from hsai.infer import Engine
from hsai.infer.request import Event, TokenLogprob
from hsai.infer.service import Busy, Service, Ticket
from hsai.serve.errors import ApiError
from tests.export.tiny_models import CHATTY_ASSETS, make_chatty_tokenizer, make_model
from tests.serve.scripted import MODEL, RunningServer, Script, ScriptedService, speak, wait_for_cancel

Load = Callable[[float], Any]

ROOT = Path(__file__).resolve().parents[2]
OBJECT = '{"good": true, "name": "set"}'


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield


@pytest.fixture(scope="module")
def load_prompts() -> Any:
    from bench import load_prompts

    return load_prompts


@pytest.fixture(scope="module")
def server_load() -> Any:
    from bench import server_load

    return server_load


@pytest.fixture(scope="module")
def server_metrics() -> Any:
    from bench import server_metrics

    return server_metrics


def test_nothing_is_confused_lost_or_left(load_prompts: Any, server_load: Any, server_metrics: Any) -> None:
    """With packed weights, as others promise less, fewer rows than clients, few pages, and a queue that overflows."""
    engine = Engine.trace(make_model("int4_offset"), make_chatty_tokenizer(), Assets.parse(CHATTY_ASSETS))
    service = Service(engine, rows=4, tokens=96, queue=4)
    with RunningServer(engine, service) as server:
        prompts = load_prompts.ask_alone(server.client, MODEL, longest_prompt=6, longest_answer=12)
        assert {prompt.kind for prompt in prompts} == load_prompts.KINDS.keys()
        assert len({prompt.answer.text for prompt in prompts}) > len(prompts) // 2
        assert all(bool(prompt.answer.logprobs) == ("logprobs" in prompt.kind) for prompt in prompts)
        before = server_metrics.wait_for_rest(server.client)
        findings = server_load.run_load(server.url, {}, prompts, clients=16, seconds=3)
        after = server_metrics.wait_for_rest(server.client)
    assert findings.faults == []
    assert list(server_metrics.find_remains(before, after, findings.counts)) == []
    summary = findings.summary()
    assert summary["answered"] > 10 and summary["left"] > 0 and summary["turned_away"] > 0
    assert summary["tokens_per_second"] > 0 and summary["first_token_seconds_p50"] > 0
    assert server_metrics.describe_memory(findings.memory)["memory_samples"] == 17


@pytest.fixture(scope="module")
def prompts(server: RunningServer, load_prompts: Any) -> list[Any]:
    """With what the scripted service answers alone."""
    server.service.script = answer("")
    return load_prompts.ask_alone(server.client, MODEL, longest_prompt=6, longest_answer=3)


@pytest.fixture
def load(prompts: list[Any], server: RunningServer, service: ScriptedService, server_load: Any) -> Load:
    """Asks for so many seconds; the service answers as it did alone, unless a test gives it another script.

    By as many clients as ask for every kind in their first requests, however slow the machine is.
    """
    service.script = answer("")
    return lambda seconds: server_load.run_load(server.url, {}, prompts, clients=48, seconds=seconds)


def answer(more: str) -> Script:
    """A text of the prompt's own, or the object that is wanted, with something behind it."""

    def script(ticket: Ticket) -> Iterator[Event]:
        own = OBJECT if ticket.request.constraint else f"{hash(ticket.request.tokens)}"
        return speak(own + more)(ticket)

    return script


def change(script: Script, **changes: Any) -> Script:
    """The same, but with other logprobs in what has some, or another usage in what has one."""

    def changed(ticket: Ticket) -> Iterator[Event]:
        for event in script(ticket):
            fields = {name: value for name, value in changes.items() if getattr(event, name)}
            yield dataclasses.replace(event, **fields)

    return changed


def test_the_load_finds_nothing_where_nothing_is_wrong(load: Load) -> None:
    findings = load(0.3)
    assert findings.faults == [] and findings.counts["answered"] > 0 and findings.counts["turned_away"] == 0


def test_the_load_finds_a_wrong_text_of_each_kind(load: Load, service: ScriptedService, load_prompts: Any) -> None:
    service.script = answer("!")
    faults = [fault for fault in load(0.3).faults if "!' instead of" in fault]
    assert {fault.split(": text ")[0].removesuffix(", left") for fault in faults} == load_prompts.KINDS.keys()


def test_the_load_finds_confusion(load: Load, service: ScriptedService) -> None:
    """A service that gives every other answer to the wrong request."""
    tickets: list[Ticket] = []

    def script(ticket: Ticket) -> Iterator[Event]:
        tickets.append(ticket)
        own = tickets[-1] if len(tickets) % 2 else tickets[-2]
        return (dataclasses.replace(event, text=event.text) for event in answer("")(own))

    service.script = script
    assert any("instead of" in fault for fault in load(0.3).faults)


def test_the_load_finds_other_logprobs(load: Load, service: ScriptedService) -> None:
    service.script = change(answer(""), logprobs=(TokenLogprob(10, -0.3, ((10, -0.5), (11, -1.5))),))
    faults = [fault.split(": logprobs ")[0].removesuffix(", left") for fault in load(0.3).faults]
    assert {*faults} == {"logprobs", "chat logprobs"}
    service.script = change(answer(""), logprobs=(TokenLogprob(10, -0.25, ((10, -0.5), (11, -1.6))),))
    assert any("chat logprobs: logprobs [-0.25, -0.5, -1.6" in fault for fault in load(0.3).faults)


def test_the_load_finds_another_end(load: Load, service: ScriptedService) -> None:
    service.script = change(answer(""), finish_reason="max_tokens")
    assert any("reason 'length' instead of 'stop'" in fault for fault in load(0.3).faults)


@pytest.mark.parametrize(("text", "wrong"), [("once upon", False), ("on", True), ("twice", True)])
def test_the_load_reads_what_leavers_had(
    text: str,
    wrong: bool,
    prompts: list[Any],
    server: RunningServer,
    service: ScriptedService,
    load_prompts: Any,
    server_load: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_load, "LEAVING", 1.0)
    service.script = wait_for_cancel
    prompts = [dataclasses.replace(prompt, answer=load_prompts.Answer(text=text)) for prompt in prompts]
    findings = server_load.run_load(server.url, {}, prompts, clients=8, seconds=0.5)
    assert findings.counts["left_with_text"] > 0 and findings.counts["answered"] == 0
    assert len(findings.faults) == (findings.counts["left_with_text"] if wrong else 0)
    assert all(fault.endswith(f", left: text 'once' instead of {text[:4]!r}") for fault in findings.faults)


def test_the_load_finds_failures(load: Load, service: ScriptedService) -> None:
    service.script = speak("a", reason="failed")
    faults = load(0.3).faults
    assert any("status 500" in fault for fault in faults) and any("a stream failed" in fault for fault in faults)


@pytest.mark.parametrize("retry_after", ["3", None, "", "0", "-1", "1.5", "soon"])
def test_who_is_turned_away_is_told_when_to_come_again(
    retry_after: str | None, load: Load, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_busy(fault: str, seconds: float) -> ApiError:
        return ApiError(429, fault, headers={} if retry_after is None else {"retry-after": retry_after})

    monkeypatch.setattr("hsai.serve.generate.refuse_busy", refuse_busy)
    service.refusal = Busy(1, 1.0)
    findings = load(0.3)
    assert findings.counts["turned_away"] > 0 and findings.counts["answered"] == 0
    assert (findings.faults == []) == (retry_after == "3")
    assert all(fault.endswith(f"Retry-After: {retry_after}") for fault in findings.faults)


def test_who_is_turned_away_comes_again(load: Load, service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, turns = service.submit, iter(range(10**6))

    def submit_at_the_second_time(*args: Any, **kwargs: Any) -> Ticket:
        if next(turns) % 2 == 0:
            raise Busy(1, 0.1)
        return submit(*args, **kwargs)

    monkeypatch.setattr(service, "submit", submit_at_the_second_time)
    findings = load(2)
    assert findings.faults == [] and findings.counts["turned_away"] > 0
    assert 0 < findings.counts["came_again"] <= findings.counts["answered"]


def test_the_load_finds_what_stays_behind(server: RunningServer, server_metrics: Any) -> None:
    after = server.metrics()
    counts = {"answered": 1, "left": 0, "turned_away": 1}
    remains = list(server_metrics.find_remains(after | {'hsai_cache_pages{state="used"}': 0}, after, counts))
    assert [words in " ".join(remains) for words in ("3 pages", "1 answered", "turned away")] == [True] * 3


@pytest.mark.parametrize(
    ("minutes", "leak", "found"), [(10, 0, False), (10, 2_000, False), (10, 20_000, True), (1, 20_000, False)]
)
def test_a_plateau_is_told_from_a_leak(minutes: int, leak: int, found: bool, server_metrics: Any) -> None:
    """Bytes a request, after a first half in which memory grows as it should; five requests a second, and noise."""
    samples = []
    for index in range(4 * minutes + 1):
        seconds = 15.0 * index
        grown = min(seconds / (30 * minutes), 1.0) * 50e6 + leak * 5 * seconds
        resident = 300e6 + grown + (1e6 if index % 3 else -1e6)
        samples.append(server_metrics.Sample(seconds=seconds, requests=5 * seconds, resident=resident))
    described = server_metrics.describe_memory(samples)
    assert described["memory_bytes_a_request"] == pytest.approx(leak, abs=4e3)
    assert described["memory_mb_an_hour"] == pytest.approx(18e3 * described["memory_bytes_a_request"] / 1e6)
    assert bool(list(server_metrics.find_growth(samples))) == found


def test_options_of_the_server_stand_last(server_load: Any) -> None:
    assert server_load.split_words(["m", "--quick", "--", "--rows", "16"]) == (["m", "--quick"], ["--rows", "16"])
    assert server_load.split_words(["m"]) == (["m"], [])
