"""Chat templates: messages in, the text of a prompt out, as the model's makers wrote it.

A template is Jinja, with the conventions of Hugging Face (the result is that of transformers' apply_chat_template), and
code of strangers: it runs in Jinja's sandbox, in a process of its own (`chat_worker.py`) that is bounded in memory, in
time and in what it may write. One such process serves all templates of this one; after a deadline it is replaced.

The text spells special tokens. A message that spells one too could end its own turn and begin one in another's name
(huggingface/transformers#29279, where that is open): `encode_chat` reads it as text.
"""

import atexit
import contextlib
import json
import secrets
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hsai.data.assets import CHAT_TEMPLATE, Assets
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError

SECONDS = 5.0
"""A template that takes longer is refused; real ones take a thousandth."""

CHARACTERS = 1 << 24
"""A text that is longer is refused; the longest contexts hold less."""

START_SECONDS = 60.0
"""For the process to start on a busy machine, on top of `SECONDS`, once."""


class ChatTemplate:
    """A chat template and the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Keeps both; faults of the template show when it is rendered.

        Args:
          source: Jinja.
          special_tokens: by their roles, such as bos_token.
        """
        self.source = source
        self.special_tokens = dict(special_tokens or {})

    @classmethod
    def of_model(cls, assets: Assets, tokenizer: Tokenizer) -> "ChatTemplate":
        """That of a model; tokens that its tokenizer config does not name are those that its tokenizer uses.

        Raises:
          InputError: the model has no chat template.
        """
        if assets.chat_template is None:
            raise InputError(f"the model has no chat template ({CHAT_TEMPLATE}): it can only continue a text")
        known = {"eos_token": tokenizer.name(tokenizer.eot)}
        if tokenizer.prefix:
            known["bos_token"] = tokenizer.name(tokenizer.prefix[0])
        return cls(assets.chat_template, {**known, **assets.special_tokens})

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation.

        Args:
          messages: each with a role (system, user, assistant) and a content; JSON. Entries that are None are left out.
          add_generation_prompt: whether the text ends where the assistant's answer begins.
          variables: others that the template knows, such as enable_thinking; JSON.
        Raises:
          InputError: the template is no Jinja, refuses the messages, fails, touches what it may not, or needs more
            than `SECONDS`, `CHARACTERS` or its memory.
          TypeError: messages or variables are not JSON.
        """
        given = {
            "messages": [{key: value for key, value in message.items() if value is not None} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        request = {
            "template": self.source,
            "variables": self.special_tokens | given | variables,
            "seconds": SECONDS,
            "characters": CHARACTERS,
        }
        answer = _WORKER.ask(json.dumps(request).encode() + b"\n")
        if "error" in answer:
            raise InputError(f"the chat template {' '.join(answer['error'].split())[:300]}")
        return str(answer["text"])


def encode_chat(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, prefill: str = ""
) -> list[int]:
    """The tokens of a conversation, in which special tokens are only those that the template writes.

    What spells one in a message goes through the template as a mark that nobody can guess, and is cut as text.

    Args:
      template: of the model.
      tokenizer: of the model.
      messages: as of `ChatTemplate.render`.
      prefill: how the answer begins.
    Raises:
      InputError: what `ChatTemplate.render` refuses; parts of messages spell a special token where they are joined.
    """
    marks: dict[str, str] = {}

    def hide(value: Any) -> Any:
        if isinstance(value, str):
            while (token := tokenizer.find_special(value)) is not None:
                if token not in value:
                    raise InputError(f"a message spells the special token {token!r} in another way; leave that out")
                mark = marks.setdefault(token, f"\ue000{secrets.randbelow(10**15):015}\ue001")
                value = value.replace(token, mark)
            return value
        if isinstance(value, Mapping):
            return {key: hide(item) for key, item in value.items()}
        return [hide(item) for item in value] if isinstance(value, list | tuple) else value

    hidden, begun = [hide(message) for message in messages], hide(prefill)
    texts = [text for message in hidden for text in _list_contents(message.get("content"))]
    if (token := tokenizer.find_special("".join(map(str.strip, [*texts, begun])))) is not None:
        raise InputError(f"parts of the messages spell the special token {token!r} when they are joined")
    text = template.render(hidden) + begun
    return tokenizer.encode_marked(text, {mark: token for token, mark in marks.items()})


def _list_contents(content: Any) -> list[str]:
    """What a message says: its content, or the text of each of the content's parts."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


class _Worker:
    """The process, started when it is first asked, and again after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: bytes) -> dict[str, str]:
        """The answer to a line of JSON."""
        with self._lock:
            deadline = time.monotonic() + SECONDS
            process = self._process
            if process is None or process.poll() is not None:
                path = Path(__file__).with_name("chat_worker.py")
                # -P: the modules beside it are no standard ones, whatever their names.
                command = [sys.executable, "-P", str(path)]
                # In a session of its own: Ctrl-C in a terminal is meant for who asks.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                self._process = process
                deadline += START_SECONDS
            try:
                return self._exchange(process, request, deadline)
            except BaseException:
                self.end()
                raise

    def _exchange(self, process: subprocess.Popen[bytes], request: bytes, deadline: float) -> dict[str, str]:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except BrokenPipeError:
            return {"error": f"could not be rendered: its process ended with status {process.wait()}"}
        blocks: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not blocks or not blocks[-1].endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.end()
                    return {"error": f"takes more than {SECONDS:g} seconds"}
                block = process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
                if not block:
                    self.end()
                    return {"error": f"ended its process, with status {process.returncode}"}
                blocks.append(block)
        answer: dict[str, str] = json.loads(b"".join(blocks))
        return answer

    def end(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # what it had not read yet
                        stream.close()
            self._process.wait()
            self._process = None


_WORKER = _Worker()
atexit.register(_WORKER.end)
