"""What a load asks a server, in requests of every kind, and what is answered to each alone.

Under load an answer must be the one that was given alone: another one would be somebody else's, or a cache's that was
overwritten. For which models that is promised, docs/inference.md says: those of packed weights with activations of
floats (on x86 with VNNI; without it, up to eight rows), and of int4 with activations of 8 bits. Of others (dense
weights, int8 with activations of 8 bits) last bits depend on how many rows there are; of all, on the chunks that a
prompt is read in, which follow from how long chunks took. Where two tokens are that close, texts part, and nothing is
wrong: with activations of floats seldom enough to look at each by hand; 8 bits make much of a last bit.
"""

import dataclasses
import json
import math
import random
from typing import Any

import httpx

WORDS = (
    "def return class import for while if else try except with lambda yield from as in not and or is None True False "
    "print range list dict set tuple int float str bytes open read write close append extend sorted reversed zip map"
).split()

PROMPTS_A_KIND = 3

LOGPROB_ERROR = 1e-2
"""By which logprobs may be off: last bits are off by far less, and those of another text by far more."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

GREEDY = {"temperature": 0}

SCHEMA = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}, "name": {"enum": ["list", "dict", "set", "tuple"]}},
    "required": ["good", "name"],
    "additionalProperties": False,
}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (COMPLETIONS, GREEDY),
    "chat": (CHAT, GREEDY),
    "drawn completion": (COMPLETIONS, {"temperature": 0.8, "top_p": 0.95}),
    "drawn chat": (CHAT, {"temperature": 1.0, "top_k": 50}),
    "logprobs": (COMPLETIONS, GREEDY | {"logprobs": 2}),
    "chat logprobs": (CHAT, GREEDY | {"logprobs": True, "top_logprobs": 2}),
    "penalty": (COMPLETIONS, GREEDY | {"repetition_penalty": 1.3}),
    "schema": (
        CHAT,
        GREEDY | {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
    ),
}
"""Paths and settings, by the names of kinds; those that draw get a seed."""


@dataclasses.dataclass(kw_only=True)
class Answer:
    """A text as far as it came, and what came with it."""

    text: str = ""

    tokens: list[str] = dataclasses.field(default_factory=list)
    """As texts, where logprobs were asked for."""

    logprobs: list[float] = dataclasses.field(default_factory=list)
    """Of each of the tokens, followed by its alternatives'."""

    reason: str | None = None
    """Why it ended, once it has."""

    new_tokens: int = 0
    """How many were made, once it has ended."""

    def add(self, content: dict[str, Any]) -> None:
        """A whole answer, or a chunk of one."""
        for choice in content["choices"]:
            said = choice.get("message") or choice.get("delta") or choice
            self.text += said.get("content") or said.get("text") or ""
            self.reason = choice["finish_reason"]
            found = choice["logprobs"] or {}
            for entry in found.get("content", ()):
                self.tokens.append(entry["token"])
                self.logprobs += [entry["logprob"], *(top["logprob"] for top in entry["top_logprobs"])]
            for index, token in enumerate(found.get("tokens", ())):
                self.tokens.append(token)
                self.logprobs += [found["token_logprobs"][index], *found["top_logprobs"][index].values()]
        if content.get("usage"):
            self.new_tokens = content["usage"]["completion_tokens"]

    def find_difference(self, right: "Answer", *, whole: bool) -> str | None:
        """What is not as in the right one, or, of one that did not come whole, in the beginning of the right one."""
        if not whole:
            right = dataclasses.replace(
                right,
                text=right.text[: len(self.text)],
                tokens=right.tokens[: len(self.tokens)],
                logprobs=right.logprobs[: len(self.logprobs)],
                reason=self.reason,
                new_tokens=self.new_tokens,
            )
        for name in ("text", "tokens", "reason", "new_tokens"):
            if (found := getattr(self, name)) != (expected := getattr(right, name)):
                return f"{name} {found!r} instead of {expected!r}"
        if len(self.logprobs) != len(right.logprobs) or not all(map(_are_near, self.logprobs, right.logprobs)):
            return f"logprobs {self.logprobs} instead of {right.logprobs}"
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked, and what is answered to it alone."""

    kind: str
    """Of `KINDS`."""

    path: str
    """That answers it."""

    body: dict[str, Any]
    """Of the request."""

    answer: Answer
    """The right one."""


def ask_alone(client: httpx.Client, model: str, *, longest_prompt: int, longest_answer: int) -> list[Prompt]:
    """Prompts of 1 to `longest_prompt` words, half of which begin alike, with their answers, one after the other.

    Raises:
      ValueError: a JSON text that came to its end is none.
    """
    draw = random.Random(0)
    common = draw.choices(WORDS, k=longest_prompt // 2)
    prompts = []
    for index in range(PROMPTS_A_KIND * len(KINDS)):
        turn, place = divmod(index, len(KINDS))
        kind, (path, settings) = list(KINDS.items())[place]
        words = [f"#{index}", *draw.choices(WORDS, k=math.ceil(longest_prompt ** draw.random()))]
        text = " ".join([*common, *words] if (turn + place) % 2 else words)
        asked = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
        # An object needs room to come to its end.
        length = longest_answer if kind == "schema" else draw.randint(1, longest_answer)
        body = {"model": model, **asked, **settings, "max_tokens": length}
        if settings["temperature"] > 0:
            body["seed"] = index
        response = client.post(path, json=body)
        if response.status_code != 200:
            raise ValueError(f"{kind}: {response.status_code} {response.text[:200]}")
        answer = Answer()
        answer.add(response.json())
        if kind == "schema" and answer.reason == "stop":
            json.loads(answer.text)
        prompts.append(Prompt(kind=kind, path=path, body=body, answer=answer))
    return prompts


def _are_near(found: float, right: float) -> bool:
    return abs(found - right) <= LOGPROB_ERROR
