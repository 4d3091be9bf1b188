"""A real headless Chromium, driven by its DevTools protocol over two pipes."""

import base64
import json
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium-headless-shell") or shutil.which("chromium")

FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # which root may not have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)

SECONDS = 60.0
"""For anything; a busy machine is slow."""


class Browser:
    """A browser with one page; as a context manager."""

    def __init__(self, directory: Path) -> None:
        """Starts it with a profile in `directory`."""
        assert PROGRAM is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Chromium reads from 3 and writes to 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", script, "bash", PROGRAM, *FLAGS, f"--user-data-dir={directory}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for descriptor in (theirs_in, theirs_out):
            os.close(descriptor)
        self._rest = b""
        self._count = 0
        self.complaints: list[str] = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = None
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def command(self, method: str, **parameters: Any) -> Any:
        """The result of a command of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if session := getattr(self, "_session", None):
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self._listen(answer)

    def open(self, url: str) -> None:
        """Goes to a page, and waits until it is there; by way of none, or the one before might be taken for it."""
        self.command("Page.navigate", url="about:blank")
        self.until("location.href === 'about:blank'")
        self.command("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript in the page."""
        result = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str) -> None:
        """Waits until JavaScript is true."""
        eventually = time.monotonic() + SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < eventually, expression
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Types into whatever has the focus."""
        self.until("['INPUT', 'TEXTAREA'].includes(document.activeElement?.tagName)")
        self.command("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Presses Enter, Tab or Space."""
        code, text = {"Enter": (13, "\r"), "Tab": (9, ""), "Space": (32, " ")}[key]
        common = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        common["modifiers"] = 8 if shift else 0
        self.command("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.command("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """Clicks with the mouse on the middle of an element."""
        x, y = self.evaluate(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        """Writes a PNG of the page."""
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot")["data"]))

    def _listen(self, event: dict[str, Any]) -> None:
        """Keeps what the page complains of: errors, and what its policy forbade."""
        said: dict[str, Callable[[dict[str, Any]], str]] = {
            "Runtime.exceptionThrown": lambda found: json.dumps(found["exceptionDetails"]),
            "Log.entryAdded": lambda found: found["entry"]["text"],
        }
        if (describe := said.get(event.get("method", ""))) is not None:
            self.complaints.append(describe(event["params"]))

    def _read(self, deadline: float) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._in, selectors.EVENT_READ)
            while b"\0" not in self._rest:
                assert selector.select(max(0.0, deadline - time.monotonic())), "the browser says nothing"
                block = os.read(self._in, 1 << 20)
                assert block, f"the browser ended with status {self._process.wait()}"
                self._rest += block
        message, self._rest = self._rest.split(b"\0", 1)
        content: dict[str, Any] = json.loads(message)
        return content
