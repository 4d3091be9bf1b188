"""Who is let in: keys, hosts, and what every response says."""

from collections.abc import Iterator

import pytest

from hsai.infer import Engine
from tests.serve.scripted import RunningServer, ScriptedService, refusal

KEY = "correct horse battery"
GUARDED = ("/metrics", "/v1/models", "/v1/models/tiny", "/v1/nope", "/nope")


@pytest.fixture(scope="module")
def guarded(engine: Engine) -> Iterator[RunningServer]:
    with RunningServer(engine, ScriptedService(), api_key=KEY) as server:
        yield server


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, b"Bearer \xff\xfe"],
)
def test_without_the_key(header: str | bytes | None, guarded: RunningServer) -> None:
    headers = {} if header is None else {"authorization": header}
    body = {"model": "tiny", "prompt": "x"}
    for response in (
        *(guarded.client.get(path, headers=headers) for path in GUARDED),
        guarded.client.post("/v1/completions", json=body, headers=headers),
        guarded.client.post("/v1/completions", content=b"x" * 3_000_000, headers=headers),
    ):
        found = refusal(response)
        assert (found["status"], found["type"], found["code"]) == (401, "authentication_error", "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer" and KEY not in response.text
    assert guarded.service.tickets == []


def test_what_needs_no_key(guarded: RunningServer) -> None:
    assert guarded.client.get("/").is_success and guarded.client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_key(scheme: str, guarded: RunningServer) -> None:
    headers = {"authorization": f"{scheme} {KEY}", "host": "models.example"}
    assert guarded.client.get("/v1/models", headers=headers).json()["data"][0]["id"] == "tiny"
    assert guarded.client.get("/metrics", headers=headers).is_success


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:80", "localhost:8000", "LOCALHOST"])
def test_hosts_of_this_machine(host: str, server: RunningServer) -> None:
    assert server.client.get("/v1/models", headers={"host": host}).is_success


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost:80:80"])
def test_other_hosts(host: str, server: RunningServer) -> None:
    """A name that someone else lets point here: his page would be of the same origin."""
    for path in ("/", "/v1/models", "/health"):
        response = server.client.get(path, headers={"host": host})
        assert refusal(response)["status"] == 403 and refusal(response)["code"] == "unknown_host"


def test_what_every_response_says(server: RunningServer) -> None:
    responses = [server.client.get(path) for path in ("/", "/health", "/nope")] + [server.complete()]
    assert len({response.headers["x-request-id"] for response in responses}) == 4
    assert {response.headers["x-content-type-options"] for response in responses} == {"nosniff"}
    assert all("server" not in response.headers for response in responses)


def test_health(server: RunningServer, service: ScriptedService) -> None:
    service.healthy = False
    response = server.client.get("/health")
    assert (response.status_code, response.json()) == (503, {"status": "failed"})
