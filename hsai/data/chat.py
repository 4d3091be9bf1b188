"""Chat templates: messages in, the text of a prompt out, as the model's makers wrote it.

A template is Jinja, with the conventions of Hugging Face (the result is that of transformers' apply_chat_template), and
code of strangers: it runs in Jinja's sandbox, in a process of its own (`chat_worker.py`) that is bounded in memory, in
time and in what it may write. One such process serves all templates of this one; after a deadline it is replaced.

The text spells special tokens, so it is cut with `Tokenizer.encode(text, special=True)`. A message that spells one too
could end its own turn and begin another's (huggingface/transformers#29279): `check_messages` refuses it, as tiktoken
does unless it is told otherwise. Reading it as plain text would need to know whence each character of the result came.
"""

import atexit
import contextlib
import json
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
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


def check_messages(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> None:
    """Refuses messages that spell a special token: those only the template may write.

    Args:
      messages: as of `ChatTemplate.render`.
      tokenizer: of the model.
    Raises:
      InputError: a text in them spells one, or parts of a content do where a template puts them side by side.
    """
    joined = "".join(text.strip() for message in messages for text in _list_contents(message.get("content")))
    for text in (*_list_texts(list(messages)), joined):
        if (token := tokenizer.find_special(text)) is not None:
            raise InputError(
                f"a message spells the special token {token!r}, which only the chat template may write; "
                "spell it in another way"
            )


def _list_texts(value: Any) -> Iterator[str]:
    """Every text in JSON, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _list_texts([*value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _list_texts(item)


def _list_contents(content: Any) -> Iterator[str]:
    """What a message says: its content, or the text of each of the content's parts."""
    if isinstance(content, list | tuple):
        yield from _list_texts([part.get("text") for part in content if isinstance(part, Mapping)])
    else:
        yield from _list_texts(content)


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
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
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
