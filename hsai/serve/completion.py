"""What a request to /v1/completions wants: a text, or tokens, to continue."""

import dataclasses
from typing import Any

from hsai.infer import Engine
from hsai.infer.defaults import GenerationDefaults
from hsai.infer.request import MOST_LOGPROBS
from hsai.serve.answers import CompletionAnswer
from hsai.serve.errors import refuse
from hsai.serve.fields import Fields, check_text, show
from hsai.serve.options import Wanted, read_length, read_options

MAX_TOKENS = 16
"""New tokens where nothing is said, as of OpenAI."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest(Wanted):
    """The body of a request."""

    form = CompletionAnswer
    prompt_field = "prompt"

    prompt: str | tuple[int, ...]
    """A text, or tokens as they are."""

    def encode(self, engine: Engine) -> list[int]:
        """A text as `hsai generate` takes it."""
        return engine.encode_prompt(self.prompt) if isinstance(self.prompt, str) else [*self.prompt]


def read_completion_request(content: dict[str, Any], defaults: GenerationDefaults) -> CompletionRequest:
    """Reads it; where it says nothing of how tokens are chosen, `defaults` of the model hold.

    Raises:
      ApiError: a field is missing, unknown, of another type, out of range, or not supported.
    """
    fields = Fields(content)
    request = CompletionRequest(
        model=fields.demand(fields.text("model"), "model"),
        prompt=_read_prompt(fields.demand(fields.take("prompt"), "prompt")),
        max_tokens=read_length(fields, "max_tokens") or MAX_TOKENS,
        logprobs=fields.integer("logprobs", 0, MOST_LOGPROBS),
        options=read_options(fields, defaults),
    )
    fields.only("best_of", (1,), "one answer a request is made")
    fields.only("echo", (False,), "the prompt is not sent back")
    fields.only("suffix", ("",), "a text is continued at its end only")
    fields.finish()
    return request


def _read_prompt(value: Any) -> str | tuple[int, ...]:
    """A text or tokens; a list that holds one of them is the same."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            message = f"prompt has {len(value)} prompts; valid is one a request: send several at the same time"
            raise refuse("prompt", message, code="unsupported_value")
        (value,) = value
    if not isinstance(value, list):
        return check_text(value, "prompt")
    if not value or not all(isinstance(token, int) and not isinstance(token, bool) for token in value):
        raise refuse("prompt", f"prompt must be a string or a list of token ids, and is {show(value)}")
    return tuple(value)
