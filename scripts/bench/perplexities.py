"""The perplexity of the same chunks of a text, by hsai and by llama.cpp.

Both score the second half of each chunk (hsai/evaluate/perplexity.py tells why), from float32 logits. llama.cpp
multiplies by quantized weights as they are, with activations rounded to 8 bits; hsai in float32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsai.cli.tasks import compute_in
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.evaluate import Pair, Scorer
from hsai.evaluate.documents import load_documents
from hsai.evaluate.metrics import Metric, perplexity
from hsai.evaluate.perplexity import cut_chunks
from hsai.machine import count_cores
from hsai.models import Transformer
from hsai.progress import ProgressBar


def read_passages() -> str:
    """LAMBADA's passages with their last words."""
    documents = load_documents("lambada")
    return "\n\n".join(f"{document['context']} {document['word']}" for document in documents)


def open_llama(path: Path, window: int) -> Any:
    """A GGUF file in llama.cpp, with the logits of every token, on all cores of this process."""
    import llama_cpp

    threads = count_cores()
    return llama_cpp.Llama(
        str(path),
        n_ctx=window,
        n_batch=window,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )


def cut_text(model: Any, tokenizer: Tokenizer, text: str, window: int) -> list[Pair]:
    """The chunks of a text, which must be the same tokens on both sides.

    Raises:
      InputError: llama.cpp's tokenizer disagrees with ours.
    """
    tokens = model.tokenize(text.encode(), add_bos=False, special=False)
    theirs_prefix = model.tokenize(b"", add_bos=True, special=False)
    if theirs_prefix != list(tokenizer.prefix):
        raise InputError(f"llama.cpp puts {theirs_prefix} before a text, and hsai {list(tokenizer.prefix)}")
    if tokens != tokenizer.encode(text):
        raise InputError("hsai and llama.cpp cut the text into different tokens: their numbers cannot be compared")
    return cut_chunks(tokens, prefix=tokenizer.prefix, context=window)


def measure_ours(model: Transformer, pairs: Sequence[Pair], progress: ProgressBar, name: str = "hsai") -> Metric:
    """hsai, in float32."""
    scorer = Scorer(compute_in(model, "float32"))
    scores = scorer.score([[pair] for pair in pairs], lambda done, total: progress(name, done, total))
    return perplexity([value for (score,) in scores for value in score.token_log_likelihoods])


def measure_llama(model: Any, pairs: Sequence[Pair], progress: ProgressBar, name: str = "llama.cpp") -> Metric:
    """llama.cpp, chunk by chunk."""
    values: list[float] = []
    for index, pair in enumerate(pairs):
        tokens = [*pair.context, *pair.continuation]
        model.reset()
        model.eval(tokens)
        logits = np.asarray(model.scores[len(pair.context) - 1 : len(tokens) - 1], np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        picked = logits[np.arange(len(logits)), pair.continuation]
        values += (picked - np.log(np.exp(logits).sum(axis=1))).tolist()
        progress(name, index + 1, len(pairs))
    return perplexity(values)
