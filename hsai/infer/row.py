"""One request on its way through the engine: its tokens, its pages, its text, and what it took.

Attributes are read and written by the scheduler, which is the only one that knows of more than one sequence.
"""

import logging
import time
from collections.abc import Callable

import numpy as np

from hsai.data.tokenizer import Tokenizer
from hsai.infer.choose import Extras, Kind
from hsai.infer.constraint import Follower, GuideFailed
from hsai.infer.pages import Name
from hsai.infer.programs import Made
from hsai.infer.request import Event, FinishReason, Request, TokenLogprob, Usage
from hsai.infer.streaming import StopFinder, TextStream

logger = logging.getLogger(__name__)


class Row:
    """A request that is being answered.

    All of its `tokens` but the last are read before the last is, which makes the next one.

    Attributes:
      request: what was asked.
      tokens: those of the prompt, and the new ones.
      read: how many of them the row's pages hold.
      followed: how many of them the draft model's pages hold, where there is one.
      pages: the row's pages, in order.
      names: of full pages of its tokens, from the first on; the first `named` pages bear theirs.
      cached: tokens of the prompt that were in the cache when the row began.
      follower: of the request's constraint.
      kind: what a program must have to write this row's tokens.
      finished: why it ended, once it has.
      told: whether whoever asked was told so.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        slots: int,
        follower: Follower | None,
        give: Callable[[Event], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        """A row that has nothing yet.

        Args:
          request: which suits the model.
          tokenizer: of the model.
          slots: tokens that the context holds.
          follower: of the request's constraint.
          give: takes events.
          is_cancelled: whether nobody wants the answer any more.
        """
        self.request = request
        self.tokens = list(request.tokens)
        self.read = self.followed = 0
        self.pages: list[int] = []
        self.names: list[Name] = []
        self.named = 0
        self.finished: FinishReason | None = None
        self.told = False
        self.cached = 0
        self.follower = follower
        self.is_cancelled = is_cancelled
        self._give = give
        self._tokenizer = tokenizer
        self._context = slots + 1 - len(request.tokens)
        self._stream = TextStream(tokenizer)
        self._stops = StopFinder(request.stop)
        self._seen: np.ndarray | None = None
        self._history = np.zeros(0, np.int32)
        self._steps = self._drafted = self._accepted = 0
        self._queued = time.perf_counter()
        self._begun = self._first = self._last = 0.0
        plain = follower is None and request.logprobs is None and request.sampling.repetition_penalty == 1.0
        self.kind: Kind = "full" if not plain else "greedy" if request.sampling.temperature == 0.0 else "drawn"

    @property
    def new(self) -> int:
        """How many tokens were made."""
        return len(self.tokens) - len(self.request.tokens)

    @property
    def most(self) -> int:
        """How many more may be made."""
        return min(self.request.max_tokens, self._context) - self.new

    @property
    def unread(self) -> int:
        """Tokens that must be read before the last one is."""
        return len(self.tokens) - 1 - self.read

    def begin(self) -> bool:
        """Starts the clock, when the row is taken up for the first time: whether it is."""
        first = self._begun == 0.0
        if first:
            self._begun = time.perf_counter()
        return first

    def fill_extras(self, index: int, extras: Extras) -> None:
        """Writes what the row wants into its line of `extras`, which are numpy's."""
        if self.request.sampling.repetition_penalty != 1.0:
            if self._seen is None:
                self._seen = np.zeros(extras.seen.shape[1], bool)
                self._seen[self.tokens] = True
            extras.seen[index] = self._seen
        if self.follower is not None:
            extras.allowed[index] = self.follower.allowed
        if self.request.logprobs is not None:
            extras.probable[...] = True

    def fill_history(self, line: np.ndarray) -> None:
        """Writes the row's tokens into its line, int32 (S,), of the rows of a block."""
        new = np.asarray(self.tokens[len(self._history) :], np.int32)
        self._history = np.concatenate([self._history, new])
        line[: len(self._history)] = self._history

    def take(self, index: int, made: Made) -> None:
        """Goes on with what a block made in its row `index`, and tells what became certain."""
        now = time.perf_counter()
        text: list[str] = []
        first = len(self.tokens)
        logprobs: list[TokenLogprob] = []
        if made.drafts is not None:
            drafted, accepted = made.drafts[:, index].tolist()
            self._drafted, self._accepted = self._drafted + drafted, self._accepted + accepted
        for step, token in enumerate(made.tokens[:, index].tolist()):
            if token < 0 or self.finished is not None:
                break
            self._steps += 1
            self._first = self._first or now
            self._last = now
            if token in self._tokenizer.stops:
                self.finished = "end_of_text"
                break
            self.tokens.append(token)
            if self._seen is not None:
                self._seen[token] = True
            if self.request.logprobs is not None:
                logprobs.append(_read_logprob(made, step, index, token, self.request.logprobs))
            text.append(self._stops.push(self._stream.push(token)))
            self._follow(token)
        event = Event(text="".join(text), tokens=tuple(self.tokens[first:]), logprobs=tuple(logprobs))
        if self.finished is not None:
            self.finish(self.finished, event)
        elif event != Event():
            self._give(event)

    def _follow(self, token: int) -> None:
        """Whether the text ends with this token."""
        if self._stops.found:
            self.finished = "stop"
            return
        if self.follower is not None:
            try:
                self.follower.push(token)
            except GuideFailed as error:
                fault = " ".join(str(error).split("<state>")[0].split())
                logger.warning("the parser of a constraint gave up: %s", fault[:300])
                self.finished = "constraint"
                return
            if self.follower.ended:
                self.finished = "end_of_text"
                return
        if self.most == 0:
            self.finished = "max_tokens" if self.new == self.request.max_tokens else "context"

    def finish(self, reason: FinishReason, event: Event | None = None) -> None:
        """Tells that the text has ended; `event` is what was not told yet."""
        self.finished = reason
        event = event or Event()
        rest = ""
        if not self._stops.found:
            rest = self._stops.push(self._stream.finish())
            rest += self._stops.finish()
        begun = self._begun or time.perf_counter()
        usage = Usage(
            prompt_tokens=len(self.request.tokens),
            cached_tokens=self.cached,
            new_tokens=self.new,
            steps=max(0, self._steps - 1),
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            seconds_queued=begun - self._queued,
            seconds_prefill=self._first - begun if self._first else 0.0,
            seconds_decode=self._last - self._first,
        )
        self._give(
            Event(
                text=event.text + rest,
                tokens=event.tokens,
                logprobs=event.logprobs,
                finish_reason=reason,
                usage=usage,
            )
        )
        self.told = True


def _read_logprob(made: Made, step: int, index: int, token: int, count: int) -> TokenLogprob:
    """What a block says of a token's probability."""
    assert made.logprobs is not None and made.top_tokens is not None and made.top_logprobs is not None
    tops = zip(made.top_tokens[step, index].tolist(), made.top_logprobs[step, index].tolist(), strict=True)
    top = tuple((other, value) for other, value in tops if other >= 0)[:count]
    return TokenLogprob(token=token, logprob=float(made.logprobs[step, index]), top=top)
