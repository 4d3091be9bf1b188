"""Our models for EleutherAI's lm-evaluation-harness: its tasks, its prompts and its metrics, our numbers.

import lm_eval
from hsai.evaluate.harness import HarnessModel
lm_eval.simple_evaluate(model=HarnessModel.open("runs/bundle"), tasks=["hellaswag"])

Needs `pip install 'hsai[harness]'`.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.evaluate.batches import Pair
from hsai.evaluate.pairs import begin_text, encode_pairs
from hsai.evaluate.perplexity import cut_windows
from hsai.evaluate.scorer import Scorer
from hsai.export.source import open_model
from hsai.infer import Engine, SamplingConfig
from hsai.models import CacheFormat, Transformer

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise InputError("the harness is not installed: pip install 'hsai[harness]'") from error

MAX_TOKENS = 256
"""What is generated at most where a task does not say; the harness's own."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names under which tasks say so."""


class HarnessModel(LM):
    """A model of ours as the harness knows them."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int = 2048,
        mesh: Mesh | None = None,
        cache: CacheFormat = "activations",
    ) -> None:
        """Wraps a model; arguments as of `hsai.evaluate.Scorer`. Text is generated on one device."""
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._cache: CacheFormat = cache
        self._scorer = Scorer(model, batch_tokens=batch_tokens, mesh=mesh, cache=cache)
        self._engine: Engine | None = None

    @classmethod
    def open(cls, directory: str | os.PathLike[str], **settings: Any) -> "HarnessModel":
        """Whatever `hsai.export.source.open_model` takes, and refuses as it does."""
        source = open_model(directory)
        return cls(source.model, source.tokenizer, **settings)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is what greedy decoding writes) of each request."""
        texts = [request.args for request in requests]
        pairs = encode_pairs(self._tokenizer, texts)
        both = zip(texts, pairs, strict=True)
        # Requests for one context follow one another; what they share is computed once.
        groups = [[pair for _, pair in group] for _, group in itertools.groupby(both, key=lambda item: item[0][0])]
        scores = [score for group in self._scorer.score(groups) for score in group]
        answers = [(score.log_likelihood, score.is_greedy) for score in scores]
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """log p of each text, in windows of the model's context that score each token once."""
        context = self._scorer.max_length
        groups: list[Sequence[Pair]] = []
        for request in requests:
            tokens = self._tokenizer.encode(request.args[0])
            groups.append(cut_windows(tokens, prefix=begin_text(self._tokenizer), context=context, stride=context))
        windows = iter(self._scorer.score([[window] for group in groups for window in group]))
        sums = [sum(next(windows)[0].log_likelihood for _ in group) for group in groups]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The text that follows each context, up to the first of the request's stop texts, which is left out."""
        if self._engine is None:
            self._engine = Engine.trace(self._model, self._tokenizer, cache=self._cache)
        texts = []
        for request in requests:
            context, settings = request.args
            texts.append(self._generate(self._engine, context, settings))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _generate(self, engine: Engine, context: str, settings: Mapping[str, Any]) -> str:
        given = [settings[name] for name in LENGTHS if settings.get(name) is not None]
        most = int(given[0]) if given else MAX_TOKENS
        temperature = float(settings.get("temperature") or 0.0)
        if settings.get("do_sample", temperature > 0) is False:
            temperature = 0.0
        room = engine.runtime.slots - most
        if room < 1:
            raise InputError(f"{most} tokens leave no room for a prompt in a context of {engine.runtime.slots}")
        ids = [*self._tokenizer.prefix, *self._tokenizer.encode(context)] or [self._tokenizer.eot]
        stops = _list_stops(settings)
        made = engine.generate_tokens(ids[-room:], max_tokens=most, sampling=SamplingConfig(temperature=temperature))
        return min((made.text.partition(stop)[0] for stop in stops), key=len, default=made.text)


def _list_stops(settings: Mapping[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]
