"""Many clients at once, in short: scripts/load_server.py does it for minutes. And the load finds what it looks for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hsai.infer import Engine
from hsai.infer.request import Event
from hsai.infer.service import Service, Ticket
from tests.serve.scripted import MODEL, RunningServer, ScriptedService, speak

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server_load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench import server_load

    return server_load


def test_nothing_is_confused_lost_or_left(engine: Engine, server_load: Any) -> None:
    """With fewer rows than clients, few pages, and a queue that overflows."""
    service = Service(engine, rows=4, tokens=96, queue=4)
    with RunningServer(engine, service) as server:
        prompts = server_load.ask_alone(server.client, MODEL, longest_prompt=6, longest_answer=12)
        assert len({prompt.text for prompt in prompts}) > len(prompts) // 2
        before = server_load.wait_for_rest(server.client)
        findings = server_load.run_load(server.url, {}, prompts, clients=16, seconds=3)
        after = server_load.wait_for_rest(server.client)
    assert findings.faults == []
    assert list(server_load.find_remains(before, after, findings)) == []
    summary = findings.summary()
    assert summary["answered"] > 10 and summary["left"] > 0 and summary["turned_away"] > 0
    assert summary["tokens_per_second"] > 0 and summary["first_token_seconds_p50"] > 0


def test_the_load_finds_confusion(engine: Engine, server_load: Any) -> None:
    """A service that gives every other answer to the wrong request, and one that fails."""
    service = ScriptedService()
    texts: list[str] = []

    def script(ticket: Ticket) -> Iterator[Event]:
        texts.append(str(hash(ticket.request.tokens)))
        return speak(texts[-1] if len(texts) % 2 else texts[-2])(ticket)

    with RunningServer(engine, service) as server:
        service.script = lambda ticket: speak(str(hash(ticket.request.tokens)))(ticket)
        prompts = server_load.ask_alone(server.client, MODEL, longest_prompt=6, longest_answer=3)
        service.script = script
        findings = server_load.run_load(server.url, {}, prompts, clients=8, seconds=1)
        assert any("instead of" in fault for fault in findings.faults)
        service.script = lambda ticket: speak("a", reason="failed")(ticket)
        findings = server_load.run_load(server.url, {}, prompts, clients=8, seconds=0.2)
        assert any(fault.startswith("status 500") for fault in findings.faults)
        after = server.metrics()
    used = 'hsai_cache_pages{state="used"}'
    remains = list(
        server_load.find_remains(
            after | {used: 0}, after, server_load.Findings(counts={"answered": 1, "left": 0, "turned_away": 1})
        )
    )
    assert [words in " ".join(remains) for words in ("3 pages", "1 answered", "turned away")] == [True] * 3
