"""Answers a request to generate: at once, or as server-sent events while the text comes."""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from hsai.errors import InputError
from hsai.infer.defaults import GenerationDefaults
from hsai.infer.request import Event, Request
from hsai.infer.service import Busy, Closed, OnEvent
from hsai.serve.answers import FINISH_REASONS, Answer
from hsai.serve.body import read_body
from hsai.serve.errors import (
    ApiError,
    confess,
    refuse_busy,
    refuse_closing,
    refuse_constraint,
    refuse_input,
    refuse_length,
    refuse_model,
    refuse_time,
)
from hsai.serve.exchange import Exchange, Gone
from hsai.serve.json_body import read_object
from hsai.serve.options import Wanted
from hsai.serve.respond import EventStream, ObjectResponse
from hsai.serve.served import Limits, Served

QUIET_SECONDS = 15.0
"""A stream that says nothing for so long says that it is alive: something between here and the client may doubt it."""


class Generate:
    """One path, as an ASGI application."""

    def __init__(
        self,
        read: Callable[[dict[str, Any], GenerationDefaults], Wanted],
        served: Served,
        limits: Limits,
        on_last: OnEvent,
    ) -> None:
        """Serves a form of requests.

        Args:
          read: makes a body of this form what is wanted.
          served: the model.
          limits: of a request.
          on_last: sees the last event of each request, in any thread.
        """
        self._read = read
        self._served = served
        self._limits = limits
        self._on_last = on_last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        stream = EventStream(send)
        try:
            try:
                async with asyncio.timeout(self._limits.seconds):
                    await self._answer(scope, receive, send, stream)
            except TimeoutError:
                raise refuse_time(self._limits.seconds) from None
            except asyncio.CancelledError:  # the server ends
                raise refuse_closing() from None
        except Gone:
            pass
        except ApiError as error:
            if not stream.begun:
                raise
            await stream.fail(error)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, stream: EventStream) -> None:
        body = await read_body(scope, receive, self._limits)
        exchange = Exchange()
        watcher = asyncio.create_task(_watch(receive, exchange))
        try:
            # All of it may take a while: a long body, a long prompt, a template, a schema.
            wanted = await asyncio.to_thread(self._submit, body, exchange)
            answer = wanted.form(
                self._served.name,
                self._served.engine.tokenizer,
                logprobs=wanted.logprobs is not None,
                include_usage=wanted.options.include_usage,
            )
            if wanted.options.stream:
                await _stream(exchange, answer, stream)
            else:
                event = await exchange.whole()
                _check_end(event)
                await ObjectResponse(answer.whole(event))(scope, receive, send)
        finally:
            exchange.leave()
            watcher.cancel()

    def _submit(self, body: bytes, exchange: Exchange) -> Wanted:
        """Hands what is wanted to the service."""
        wanted = self._read(read_object(body), self._served.defaults)
        if wanted.model != self._served.name:
            raise refuse_model(wanted.model, self._served.name)
        context = self._served.engine.runtime.slots
        try:
            self._served.service.check_room()  # whom there is no room for costs no more
            request = Request(
                tokens=tuple(self._encode(wanted)),
                max_tokens=min(wanted.max_tokens or context, context),
                sampling=wanted.options.sampling,
                stop=wanted.options.stop,
                logprobs=wanted.logprobs,
                constraint=wanted.options.constraint,
            )
            exchange.submit(self._served.service, request, self._on_last)
        except InputError as error:  # all else was checked
            raise refuse_input(error, param="response_format" if wanted.options.constraint else None) from error
        except Busy as error:
            raise refuse_busy(str(error), error.retry_after) from error
        except Closed:
            raise refuse_closing() from None
        return wanted

    def _encode(self, wanted: Wanted) -> Sequence[int]:
        """The tokens of the prompt."""
        engine = self._served.engine
        try:
            tokens = wanted.encode(engine)
            if len(tokens) > engine.runtime.slots:
                raise refuse_length(len(tokens), engine.runtime.slots, param=wanted.prompt_field)
            engine.check_prompt(tokens)
        except InputError as error:
            raise refuse_input(error, param=wanted.prompt_field) from error
        return tokens


async def _watch(receive: Receive, exchange: Exchange) -> None:
    """Tells the exchange when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.lose()


async def _stream(exchange: Exchange, answer: Answer, stream: EventStream) -> None:
    await stream.begin(answer.begin())
    while True:
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                event = await exchange.next()
        except TimeoutError:
            await stream.remark("still at it")
            continue
        if event.finish_reason in FINISH_REASONS:
            await stream.end(answer.chunks(event))
            return
        await stream.say(answer.chunks(dataclasses.replace(event, finish_reason=None)))
        _check_end(event)


def _check_end(event: Event) -> None:
    """Whether a text ended as a text does."""
    if event.finish_reason == "constraint":
        raise refuse_constraint()
    if event.finish_reason == "failed":
        raise confess()
    if event.finish_reason == "cancelled":  # and not by us, who would not be here
        raise refuse_closing()
