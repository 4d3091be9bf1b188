"""`hsai serve`: what it refuses, and a process that is asked, stopped, and lets its answers end."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from hsai.export import write_bundle
from tests.environments import as_a_user
from tests.export.tiny_models import CHATTY_ASSETS, make_chatty_tokenizer, make_model

Refuse = Callable[..., str]
HSAI = (sys.executable, "-m", "hsai.cli")
KEY = "correct-horse"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "tiny"
    write_bundle(directory, make_model("int8"), make_chatty_tokenizer(), assets=CHATTY_ASSETS)
    return directory


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--host", "0.0.0.0"], ("--host 0.0.0.0", "--api-key", "HSAI_API_KEY", "127.0.0.1")),
        (["--host", "localhost"], ("--host localhost", "127.0.0.1")),
        (["--host", "nowhere.invalid", "--api-key", KEY], ("nowhere.invalid",)),
        (["--host", "198.51.100.7", "--api-key", KEY, "--port", "0"], ("198.51.100.7",)),
        (["--api-key", "short"], ("8 or more",)),
        (["--api-key", "correct horse"], ("without blanks",)),
        (["--api-key", "pässword"], ("ASCII",)),
        (["--port", "65536"], ("--port 65536", "65535")),
        (["--port", "http"], ("--port", "'http'")),
        (["--drain-seconds", "-1"], ("--drain-seconds -1",)),
        (["--drain-seconds", "inf"], ("--drain-seconds inf",)),
        (["--request-seconds", "0"], ("--request-seconds 0",)),
        (["--max-body-bytes", "0"], ("--max-body-bytes 0",)),
        (["--queue", "0", "--port", "0"], ("queue=0", "at least 1")),
        (["--context", "49", "--port", "0"], ("49", "48")),
        (["--cache", "8"], ("--cache", "'8'")),
        (["--draft-tokens", "3"], ("--draft-tokens 3 needs --speculate",)),
        (["--speculate", "nowhere", "--port", "0"], ("nowhere does not exist",)),
        (["--quue", "3"], ("did you mean --queue?",)),
    ],
)
def test_words_that_cannot_be(words: list[str], names: tuple[str, ...], bundle: Path, refuse: Refuse) -> None:
    error = refuse("serve", bundle, *words, names=names, beside=(bundle,))
    assert KEY not in error


def test_a_model_that_is_none(place: Path, refuse: Refuse) -> None:
    refuse("serve", "nowhere", "--port", "0", names=("nowhere",))


def test_a_port_that_is_taken(bundle: Path, refuse: Refuse) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refuse("serve", bundle, "--port", port, names=(f"--port {port}", "in use"))


def test_packages_that_are_absent(bundle: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "uvicorn" or name == "hsai.serve.server"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    refuse("serve", bundle, "--port", "0", names=("uvicorn", "pip install 'hsai[serve]'"))


class Absent:
    """Finds that there is no uvicorn."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "uvicorn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@contextmanager
def serving(bundle: Path, *words: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its URL."""
    command = [*HSAI, "serve", str(bundle), "--port", "0", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=as_a_user(**variables)
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"serving (\S+) at (http://127.0.0.1:\d+)\n", line)
            assert found is not None, line + process.stderr.read()
            yield process, found[2]
        finally:
            process.kill()


def test_it_answers_and_drains(bundle: Path) -> None:
    """What runs when SIGTERM comes is answered in full; nothing new is taken; the end is a good one."""
    body = {"model": "served", "prompt": "def", "max_tokens": 20, "temperature": 0, "stream": True}
    words = ("--name", "served", "--drain-seconds", "600", "--speculate", "lookup")
    with serving(bundle, *words, HSAI_API_KEY=KEY) as (process, url):
        with httpx.Client(base_url=url, timeout=120, headers={"authorization": f"Bearer {KEY}"}) as client:
            assert httpx.get(f"{url}/v1/models").status_code == 401
            assert client.get("/v1/models").json()["data"][0]["id"] == "served"
            with client.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200  # and it still compiles
                process.send_signal(signal.SIGTERM)
                events = response.read().decode().removesuffix("\n\n").split("\n\n")
            assert events[-1] == "data: [DONE]"
            assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{url}/health")
        output, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert output == "stopping: running requests get their answers first\n"


def test_without_time_to_drain_what_runs_ends_with_an_error(bundle: Path) -> None:
    """A request that still waits for its programs; the end is a good one all the same."""
    body = {"model": "served", "prompt": "def", "max_tokens": 40, "temperature": 0, "stream": True}
    with serving(bundle, "--name", "served", "--drain-seconds", "0") as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
            assert response.status_code == 200
            process.send_signal(signal.SIGTERM)
            events = response.read().decode().removesuffix("\n\n").split("\n\n")
        assert json.loads(events[-1][6:])["error"]["code"] == "shutting_down"
        output, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
