"""The engine for one text at a time: a prompt in, text out, in the thread of the caller.

It is a client of its own service with one row, so that there is one way to write a token; `hsai.infer.service` is for
many texts at a time. What a text costs is measured apart: reading the prompt (bound by compute) and writing tokens
(bound by the bytes of weights a token). Compilation is no part of either; it happens once, before the clock starts.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np

from hsai.data.assets import Assets
from hsai.data.chat import ChatTemplate, encode_chat
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export.bundle import read_bundle
from hsai.export.stablehlo import GraphConfig
from hsai.infer.bench import Bench
from hsai.infer.graphs import load_graphs
from hsai.infer.request import Constraint, FinishReason, Request, TokenLogprob, check_prompt
from hsai.infer.runtime import Runtime, TracedRuntime
from hsai.infer.sampling import SamplingConfig
from hsai.infer.service import Service
from hsai.infer.speculator import DRAFTS, Drafting, Speculator, TracedSpeculator, open_drafting
from hsai.models import CacheFormat, Transformer
from hsai.signals import held


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What was generated, and what it took."""

    text: str
    """The new text."""

    tokens: tuple[int, ...]
    """The new tokens, without the one that ended the text."""

    prompt_tokens: int
    """Tokens of the prompt, those that the tokenizer puts before it included."""

    finish_reason: FinishReason
    """Why the text ended."""

    cached_tokens: int
    """Those of the prompt that were still in the cache, so that they were not read again."""

    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `tokens`, if they were asked for."""

    seconds_prefill: float
    """From the prompt to the first token."""

    seconds_decode: float
    """From the first token to the last."""

    decode_steps: int
    """Tokens that were made in `seconds_decode`."""

    drafted_tokens: int = 0
    """Tokens that speculation drafted."""

    accepted_tokens: int = 0
    """Those of them that the model made too."""

    @property
    def tokens_per_second(self) -> float:
        """Of decoding; 0 if the first token was the last, so that there was none."""
        return self.decode_steps / self.seconds_decode if self.decode_steps else 0.0


class Options(TypedDict, total=False):
    """What a text may be asked for with; what is left out is as in `hsai.infer.request.Request`."""

    max_tokens: int
    """How many tokens are made at most."""

    sampling: SamplingConfig
    """How they are chosen; greedy by default."""

    stop: Sequence[str]
    """The text ends before the first of these that it would hold."""

    logprobs: int
    """Gives the logarithm of each token's probability, and of this many likeliest ones' in its place."""

    constraint: Constraint
    """What the text must be."""

    on_text: Callable[[str], None]
    """Called with each piece of text as soon as it is certain; pieces end between characters."""


class Engine:
    """Generates with a runtime and a tokenizer: `Engine.load` takes a bundle, `Engine.trace` a model in memory."""

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        assets: Assets | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.assets = assets or Assets()
        self.speculator = speculator

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        graphs: bool = False,
        context: int | None = None,
        cache: CacheFormat | None = None,
        verify: bool = True,
        speculate: str | os.PathLike[str] | None = None,
        draft_tokens: int = DRAFTS,
    ) -> "Engine":
        """Reads a bundle.

        Args:
          directory: of the bundle.
          graphs: runs the StableHLO that it ships; otherwise the model is traced here, with this machine's kernels.
          context: tokens that the cache holds, by default the model's max_length; shipped graphs have theirs.
          cache: what its numbers are stored as, by default the activations' dtype; shipped graphs have theirs.
          verify: checks the SHA-256 of every file.
          speculate: "lookup", or the path of a draft model, makes texts sooner and changes none (speculation.py).
          draft_tokens: with speculate: drafted at a time at most.
        Raises:
          InputError: what `read_bundle`, `load_graphs` and `open_drafting` refuse; a context beyond the model's, or the
            draft model's; an unknown cache; any of these given with graphs.
        """
        if graphs and context is not None:
            raise InputError(f"context={context} cannot be chosen with graphs: theirs is fixed")
        if graphs and cache is not None:
            raise InputError(f"cache={cache} cannot be chosen with graphs: theirs is fixed")
        if graphs and speculate is not None:
            raise InputError(f"speculate={speculate} cannot be chosen with graphs: they write a token at a time")
        bundle = read_bundle(directory, verify=verify)
        assets = Assets.parse(bundle.assets)
        if graphs:
            return cls(load_graphs(bundle), bundle.tokenizer, assets)
        drafting = None
        if speculate is not None:
            drafting = open_drafting(speculate, draft_tokens, target=directory, tokenizer=bundle.tokenizer)
        return cls.trace(
            bundle.model, bundle.tokenizer, assets, context=context, cache=cache or "activations", drafting=drafting
        )

    @classmethod
    def trace(
        cls,
        model: Transformer,
        tokenizer: Tokenizer,
        assets: Assets | None = None,
        *,
        context: int | None = None,
        cache: CacheFormat = "activations",
        drafting: Drafting | None = None,
    ) -> "Engine":
        """An engine for a model on this device, with weights of any formats.

        Raises:
          InputError: a context beyond the model's, or that of the model that drafts; an unknown cache.
        """
        runtime = TracedRuntime(model, GraphConfig(context=context, cache=cache))
        return cls(runtime, tokenizer, assets, None if drafting is None else TracedSpeculator(runtime, drafting))

    def generate(self, prompt: str, **options: Unpack[Options]) -> Generation:
        """Continues `prompt`: the tokenizer's prefix stands before it, and its end of text before an empty one.

        Args:
          prompt: the text.
          options: see `Options`.
        Raises:
          InputError: as `generate_tokens`.
        """
        return self.generate_tokens(self.encode_prompt(prompt), **options)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, prefill: str = "", **options: Unpack[Options]
    ) -> Generation:
        """Answers a conversation through the model's chat template.

        Args:
          messages: each with a role (system, user, assistant) and a content.
          prefill: how the answer begins; the model goes on from there, and what it returns is the rest.
          options: see `Options`.
        Raises:
          InputError: the model has no chat template; what `encode_chat` and `generate_tokens` refuse.
        """
        return self.generate_tokens(self.encode_chat(messages, prefill=prefill), **options)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The tokens that `generate` continues."""
        return [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)] or [self.tokenizer.eot]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, prefill: str = "") -> list[int]:
        """The tokens that `chat` continues; arguments and what is raised as there."""
        template = ChatTemplate.of_model(self.assets, self.tokenizer)
        return encode_chat(template, self.tokenizer, messages, prefill=prefill)

    def generate_tokens(self, ids: Sequence[int], **options: Unpack[Options]) -> Generation:
        """Continues the tokens `ids` as they are, with no token before them.

        Whatever is raised meanwhile, in `on_text` or by Ctrl-C, ends the work as well.

        Raises:
          InputError: no tokens, more than the context holds, one out of range; an option that cannot be.
          RuntimeError: the engine failed, which is a defect and stands in the log.
          Closed: after a defect the engine could not start again, or its service was drained.
        """
        self.check_prompt(ids)
        on_text = options.pop("on_text", None)
        request = Request(tokens=tuple(map(int, ids)), **options)  # type: ignore[misc]
        ticket, events = None, []
        try:
            with held():  # of our commands' interrupts none comes between the request and its ticket
                ticket = self.service.submit(request)
            for event in ticket:
                events.append(event)
                if event.text and on_text is not None:
                    on_text(event.text)
        finally:
            if ticket is not None:
                ticket.cancel()
        usage, reason = events[-1].usage, events[-1].finish_reason
        assert usage is not None and reason is not None, "the last event has both"
        if reason == "failed":
            raise RuntimeError("the engine failed; the log says how")
        return Generation(
            text="".join(event.text for event in events),
            tokens=tuple(token for event in events for token in event.tokens),
            logprobs=tuple(logprob for event in events for logprob in event.logprobs),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            finish_reason=reason,
            seconds_prefill=usage.seconds_prefill,
            seconds_decode=usage.seconds_decode,
            decode_steps=usage.steps,
            drafted_tokens=usage.drafted_tokens,
            accepted_tokens=usage.accepted_tokens,
        )

    @functools.cached_property
    def service(self) -> Service:
        """What answers this engine's own calls, one after the other; it keeps the beginnings of earlier prompts."""
        return Service(self, rows=1, queue=2**16)

    def decode_speeds(self, tokens: int = 64, repeats: int = 9) -> list[float]:
        """Tokens a second of greedy decoding from an empty prompt, `repeats` times after a warm-up, slowest first.

        Every repeat makes `tokens` tokens, whatever they are.

        Raises:
          InputError: tokens or repeats below 1, or more tokens than the context holds.
        """
        if tokens < 1 or repeats < 1:
            raise InputError(f"tokens={tokens} and repeats={repeats} must be at least 1")
        if tokens > self.runtime.slots:
            raise InputError(f"tokens={tokens} do not fit the context of {self.runtime.slots}")
        bench = Bench(self.runtime, self.tokenizer)
        return bench.repeat(lambda: bench.write(0, tokens), tokens, repeats)

    def prefill_speeds(self, tokens: int, repeats: int = 5) -> list[float]:
        """Tokens a second of reading a prompt of `tokens`, up to the next token, `repeats` times after a warm-up,
        slowest first.

        Raises:
          InputError: tokens or repeats below 1, or more tokens than the context holds.
        """
        if tokens < 1 or repeats < 1:
            raise InputError(f"tokens={tokens} and repeats={repeats} must be at least 1")
        prompt = self.check_prompt([index % self.tokenizer.vocab_size for index in range(tokens)])
        bench = Bench(self.runtime, self.tokenizer)

        def read() -> None:
            bench.read(prompt[:-1])
            bench.write(tokens - 1, 1)

        return bench.repeat(read, tokens, repeats)

    def check_prompt(self, ids: Sequence[int]) -> np.ndarray:
        """The prompt as int32 (T,); raises as `hsai.infer.request.check_prompt`."""
        check_prompt(ids, self.tokenizer, self.runtime.slots)
        return np.asarray(ids, np.int32)
