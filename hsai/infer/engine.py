"""The engine: a prompt in, text out, one prompt at a time on one device.

What a request costs is measured apart: reading the prompt (bound by compute) and writing tokens (bound by the bytes of
weights a token). Compilation is no part of either; it happens once, before the clock starts.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hsai.data.assets import Assets
from hsai.data.chat import ChatTemplate, encode_chat
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export.bundle import read_bundle
from hsai.export.stablehlo import GraphConfig
from hsai.infer.request import FinishReason
from hsai.infer.runtime import Runtime, load_runtime, trace_runtime
from hsai.infer.sampling import Sampler, SamplingConfig
from hsai.infer.streaming import TextStream
from hsai.models import CacheFormat, Transformer


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
    """The model ended the text, `max_tokens` were made, or the context is full."""

    seconds_prefill: float
    """From the prompt to the first token."""

    seconds_decode: float
    """From the first token to the last."""

    decode_steps: int
    """Tokens that were made in `seconds_decode`."""

    @property
    def tokens_per_second(self) -> float:
        """Of decoding; 0 if the first token was the last, so that there was none."""
        return self.decode_steps / self.seconds_decode if self.decode_steps else 0.0


class Engine:
    """Generates with a runtime and a tokenizer: `Engine.load` takes a bundle, `Engine.trace` a model in memory."""

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, assets: Assets | None = None) -> None:
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.assets = assets or Assets()

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        graphs: bool = False,
        context: int | None = None,
        cache: CacheFormat | None = None,
        verify: bool = True,
    ) -> "Engine":
        """Reads a bundle.

        Args:
          directory: of the bundle.
          graphs: runs the StableHLO that it ships; otherwise the model is traced here, with this machine's kernels.
          context: tokens that the cache holds, by default the model's max_length; shipped graphs have theirs.
          cache: what its numbers are stored as, by default the activations' dtype; shipped graphs have theirs.
          verify: checks the SHA-256 of every file.
        Raises:
          InputError: what `read_bundle` and `load_runtime` refuse; a context beyond the model's; an unknown cache;
            either of them given with graphs.
        """
        if graphs and context is not None:
            raise InputError(f"context={context} cannot be chosen with graphs: theirs is fixed")
        if graphs and cache is not None:
            raise InputError(f"cache={cache} cannot be chosen with graphs: theirs is fixed")
        config = GraphConfig(context=context, cache=cache or "activations")
        bundle = read_bundle(directory, verify=verify)
        runtime = load_runtime(bundle) if graphs else trace_runtime(bundle.model, config)
        return cls(runtime, bundle.tokenizer, Assets.parse(bundle.assets))

    @classmethod
    def trace(
        cls,
        model: Transformer,
        tokenizer: Tokenizer,
        assets: Assets | None = None,
        *,
        context: int | None = None,
        cache: CacheFormat = "activations",
    ) -> "Engine":
        """An engine for a model on this device, with weights of any formats.

        Raises:
          InputError: a context beyond the model's, or an unknown cache.
        """
        return cls(trace_runtime(model, GraphConfig(context=context, cache=cache)), tokenizer, assets)

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 128,
        sampling: SamplingConfig | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continues `prompt`: the tokenizer's prefix stands before it, and its end of text before an empty one.

        Args:
          prompt: the text.
          max_tokens: how many tokens are made at most.
          sampling: greedy by default.
          on_text: called with each piece of text as soon as it is certain; pieces end between characters.
        Raises:
          InputError: as `generate_tokens`.
        """
        ids = self.encode_prompt(prompt)
        return self.generate_tokens(ids, max_tokens=max_tokens, sampling=sampling, on_text=on_text)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        prefill: str = "",
        max_tokens: int = 128,
        sampling: SamplingConfig | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Answers a conversation through the model's chat template; other arguments as for `generate`.

        Args:
          messages: each with a role (system, user, assistant) and a content.
          prefill: how the answer begins; the model goes on from there, and what it returns is the rest.
        Raises:
          InputError: the model has no chat template; what `encode_chat` and `generate_tokens` refuse.
        """
        ids = self.encode_chat(messages, prefill=prefill)
        return self.generate_tokens(ids, max_tokens=max_tokens, sampling=sampling, on_text=on_text)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The tokens that `generate` continues."""
        return [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)] or [self.tokenizer.eot]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, prefill: str = "") -> list[int]:
        """The tokens that `chat` continues; arguments and what is raised as there."""
        template = ChatTemplate.of_model(self.assets, self.tokenizer)
        return encode_chat(template, self.tokenizer, messages, prefill=prefill)

    def generate_tokens(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int = 128,
        sampling: SamplingConfig | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continues the tokens `ids` as they are, with no token before them; arguments as for `generate`.

        Raises:
          InputError: no tokens, more than the context holds, one out of range, or max_tokens below 1.
        """
        prompt = self.check_prompt(ids)
        if max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens} must be at least 1")
        sampler = Sampler(sampling or SamplingConfig(), self.tokenizer.vocab_size)
        self._prepare(len(prompt), sampler)
        stream = TextStream(self.tokenizer)
        pieces: list[str] = []
        tokens: list[int] = []
        reason: FinishReason = "context"
        times = [time.perf_counter()]
        for token in self._continue(prompt, sampler):
            times.append(time.perf_counter())
            if token in self.tokenizer.stops:
                reason = "end_of_text"
                break
            tokens.append(token)
            _give(stream.push(token), pieces, on_text)
            if len(tokens) == max_tokens:
                reason = "max_tokens"
                break
        _give(stream.finish(), pieces, on_text)
        return Generation(
            text="".join(pieces),
            tokens=tuple(tokens),
            prompt_tokens=len(prompt),
            finish_reason=reason,
            seconds_prefill=times[1] - times[0],
            seconds_decode=times[-1] - times[1],
            decode_steps=len(times) - 2,
        )

    def decode_speeds(self, tokens: int = 64, repeats: int = 9) -> list[float]:
        """Tokens a second of greedy decoding from an empty prompt, `repeats` times after a warm-up, slowest first.

        Every repeat makes `tokens` tokens beyond the first, whatever they are, and waits for each of them.

        Raises:
          InputError: tokens or repeats below 1, or more tokens than the context holds.
        """
        if tokens < 1 or repeats < 1:
            raise InputError(f"tokens={tokens} and repeats={repeats} must be at least 1")
        if tokens > self.runtime.slots - 1:
            raise InputError(f"tokens={tokens} do not fit the context of {self.runtime.slots}")
        sampler = Sampler(SamplingConfig(), self.tokenizer.vocab_size)
        prompt = np.array([self.tokenizer.eot], np.int32)
        self._prepare(1, sampler)
        speeds = []
        for repeat in range(repeats + 1):
            made = self._continue(prompt, sampler)
            next(made)
            start = time.perf_counter()
            for _ in range(tokens):
                next(made)
            if repeat > 0:  # the first one warms caches and threads
                speeds.append(tokens / (time.perf_counter() - start))
        return sorted(speeds)

    def prefill_speeds(self, tokens: int, repeats: int = 5) -> list[float]:
        """Tokens a second of reading a prompt of `tokens`, up to the next token, `repeats` times after a warm-up,
        slowest first.

        Raises:
          InputError: tokens or repeats below 1, or more tokens than the context holds.
        """
        if tokens < 1 or repeats < 1:
            raise InputError(f"tokens={tokens} and repeats={repeats} must be at least 1")
        sampler = Sampler(SamplingConfig(), self.tokenizer.vocab_size)
        prompt = self.check_prompt([index % self.tokenizer.vocab_size for index in range(tokens)])
        self._prepare(tokens, sampler)
        speeds = []
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            next(self._continue(prompt, sampler))
            if repeat > 0:
                speeds.append(tokens / (time.perf_counter() - start))
        return sorted(speeds)

    def _continue(self, prompt: np.ndarray, sampler: Sampler) -> Iterator[int]:
        """New tokens until the cache is full; the last one is made from a full cache and never read."""
        logits, cache = self.runtime.prefill(prompt, self.runtime.make_cache())
        token = sampler(logits, 0)
        yield int(token[0])
        for step in range(1, self.runtime.slots - len(prompt) + 1):
            logits, cache = self.runtime.decode(token, cache)
            token = sampler(logits, step)
            yield int(token[0])

    def _prepare(self, tokens: int, sampler: Sampler) -> None:
        """Compiles everything that a prompt of `tokens` and its continuation need."""
        self.runtime.prepare(tokens)
        jax.block_until_ready(sampler(jnp.zeros((1, self.runtime.vocab), jnp.float32), 0))

    def check_prompt(self, ids: Sequence[int]) -> np.ndarray:
        """The prompt as int32 (T,).

        Raises:
          InputError: it has no tokens, more than the context holds, or one that the tokenizer does not have.
        """
        if len(ids) == 0:
            raise InputError(f"the prompt has no tokens; an empty text begins with token {self.tokenizer.eot}")
        if len(ids) > self.runtime.slots:
            raise InputError(f"the prompt has {len(ids)} tokens, and the context holds {self.runtime.slots}")
        for token in ids:
            if not 0 <= token < self.tokenizer.vocab_size:
                raise InputError(f"token id {token} is out of range; valid are 0 to {self.tokenizer.vocab_size - 1}")
        return np.asarray(ids, np.int32)


def _give(piece: str, pieces: list[str], on_text: Callable[[str], None] | None) -> None:
    if piece:
        pieces.append(piece)
        if on_text is not None:
            on_text(piece)
