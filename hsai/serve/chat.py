"""What a request to /v1/chat/completions wants: a conversation to answer."""

import dataclasses
from typing import Any

from hsai.infer import Engine
from hsai.infer.defaults import GenerationDefaults
from hsai.infer.request import MOST_LOGPROBS
from hsai.serve.answers import ChatAnswer
from hsai.serve.errors import refuse
from hsai.serve.fields import Fields, check_text, show
from hsai.serve.options import Wanted, read_length, read_options

ROLES = ("system", "developer", "user", "assistant")

TOOLS = "tools are not supported: the answer is text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest(Wanted):
    """The body of a request."""

    form = ChatAnswer
    prompt_field = "messages"

    messages: tuple[dict[str, str], ...]
    """Each with a role (system, user, assistant), a content, and perhaps a name."""

    def encode(self, engine: Engine) -> list[int]:
        """Through the model's chat template."""
        return engine.encode_chat(self.messages)


def read_chat_request(content: dict[str, Any], defaults: GenerationDefaults) -> ChatRequest:
    """Reads it; where it says nothing, `defaults` of the model hold.

    Raises:
      ApiError: a field is missing, unknown, of another type, out of range, or not supported.
    """
    fields = Fields(content)
    model = fields.demand(fields.text("model"), "model")
    messages = fields.demand(fields.take("messages"), "messages")
    for name in ("tools", "functions"):
        fields.only(name, ([],), TOOLS)
    for name in ("tool_choice", "function_call"):
        fields.only(name, ("none", "auto"), TOOLS)  # without tools, both are none
    fields.flag("parallel_tool_calls")
    if (prediction := fields.take("prediction")) is not None:
        Fields(prediction, "prediction")  # what text is expected could not change the answer
    fields.only("modalities", (["text"],), "the answer is text")
    fields.only("audio", (), "the answer is text")
    fields.only("store", (False,), "nothing is stored")
    for name in ("reasoning_effort", "verbosity", "web_search_options"):
        fields.only(name, (), "it is not supported")
    logprobs = fields.flag("logprobs")
    top_logprobs = fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    if top_logprobs is not None and not logprobs:
        raise refuse("top_logprobs", f"top_logprobs={top_logprobs} needs logprobs=true")
    request = ChatRequest(
        model=model,
        messages=_read_messages(messages),
        max_tokens=read_length(fields, "max_completion_tokens", "max_tokens") or defaults.max_tokens,
        logprobs=(top_logprobs or 0) if logprobs else None,
        options=read_options(fields, defaults),
    )
    fields.finish()
    return request


def _read_messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise refuse("messages", f"messages must be a list of at least one message, and is {show(value)}")
    return tuple(_read_message(Fields(item, f"messages[{index}]")) for index, item in enumerate(value))


def _read_message(fields: Fields) -> dict[str, str]:
    role = fields.choice("role", ROLES)
    content = fields.demand(fields.take("content"), "content")
    author = fields.text("name")
    # What OpenAI's client has in an answer, which may come back as it was.
    for field in ("tool_calls", "function_call"):
        fields.only(field, ([],), TOOLS)
    for field in ("audio", "refusal", "annotations"):
        fields.only(field, ([],), "a message is text")
    fields.finish()
    message = {"role": "system" if role == "developer" else role, "content": _read_content(content, fields)}
    return message if author is None else message | {"name": author}


def _read_content(value: Any, fields: Fields) -> str:
    """A text, or the texts of parts, on lines of their own."""
    path = fields.path("content")
    if not isinstance(value, list):
        return check_text(value, path)
    texts = []
    for index, item in enumerate(value):
        part = Fields(item, f"{path}[{index}]")
        part.choice("type", ("text",))
        texts.append(part.demand(part.text("text"), "text"))
        part.finish()
    if not texts:
        raise refuse(path, f"{path} has no parts; valid is a string, or a list of text parts")
    return "\n".join(texts)
