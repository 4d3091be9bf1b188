"""Repositories of the hub, as a client that stands in for huggingface_hub lays them down."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hsai.errors import InputError
from hsai.fetch import fetch
from tests.needs import bring

SMALL, LARGE = b'{"model_type": "llama"}', b"weights" * 1000


class Client:
    """snapshot_download in the layout of the hub's cache: names are links to blobs, which their content names."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.large = LARGE

    def __call__(self, repository: str, **settings: Any) -> str:
        self.calls.append((repository, settings))
        base = settings["cache_dir"] / f"models--{repository.replace('/', '--')}"
        snapshot, blobs = base / "snapshots" / "abc", base / "blobs"
        snapshot.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        small = hashlib.sha1(b"blob %d\0" % len(SMALL) + SMALL).hexdigest()
        names = {"config.json": (small, SMALL), "model.safetensors": (hashlib.sha256(LARGE).hexdigest(), self.large)}
        for name, (blob, content) in names.items():
            if not (blobs / blob).exists():
                (blobs / blob).write_bytes(content)
            if not (snapshot / name).exists():
                (snapshot / name).symlink_to(blobs / blob)
        return str(snapshot)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    hub = bring("huggingface_hub")
    client = Client()
    monkeypatch.setattr(hub, "snapshot_download", client)
    return client


def test_a_snapshot_is_verified_by_content(client: Client, tmp_path: Path) -> None:
    snapshot = fetch("hf:org/name@v1.0", cache=tmp_path)
    assert (snapshot / "model.safetensors").read_bytes() == LARGE and len(client.calls) == 1
    repository, settings = client.calls[0]
    assert (repository, settings["revision"], settings["cache_dir"]) == ("org/name", "v1.0", tmp_path / "huggingface")
    assert "*.safetensors" in settings["allow_patterns"] and "*.bin" not in settings["allow_patterns"]
    for name, content in (("config.json", SMALL), ("model.safetensors", LARGE)):
        (snapshot / name).resolve().write_bytes(content[:-1] + b"!")
        client.calls.clear()
        assert (fetch("hf:org/name", cache=tmp_path) / name).read_bytes() == content
        assert len(client.calls) == 2


def test_what_is_altered_twice_is_not_used(client: Client, tmp_path: Path) -> None:
    client.large = LARGE + b"!"
    with pytest.raises(InputError, match="model.safetensors of hf:org/name is not what the hub says, twice"):
        fetch("hf:org/name", cache=tmp_path)


def test_what_the_client_says_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = bring("huggingface_hub")

    def fail(repository: str, **settings: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="hf:org/name cannot be fetched from the Hugging Face hub: no route to host$"):
        fetch("hf:org/name", cache=tmp_path)


def test_without_the_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"hf:org/name needs huggingface_hub: pip install 'hsai\[hub\]'"):
        fetch("hf:org/name", cache=tmp_path)


def test_offline_with_the_real_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [sys.executable, "-m", "hsai.cli", "fetch", "hf:org/name", "--cache", str(tmp_path / "cache")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: hf:org/name cannot be fetched") and done.stderr.count("\n") == 1
