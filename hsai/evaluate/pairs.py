"""Text to (context, continuation) token pairs, cut as the harness does (lm_eval.api.model, `_encode_pair`)."""

from collections.abc import Sequence

from hsai.data.tokenizer import Tokenizer
from hsai.evaluate.scorer import Pair


def encode_pairs(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], *, prefix: int) -> list[Pair]:
    """The token pairs of (context, continuation) texts.

    Both are encoded as one text and cut where the context's own tokens end, since a tokenizer may join what stands at
    the seam. White space at the end of a context moves to the continuation: words carry their space in front.

    Args:
      tokenizer: of the model.
      texts: contexts, which may be empty, and continuations, which may not.
      prefix: token that stands for an empty context.
    Raises ValueError for a continuation that has no token of its own.
    """
    moved = []
    for context, continuation in texts:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    contexts = tokenizer.encode_batch([context for context, _ in moved])
    pairs = []
    for (_, continuation), whole, own in zip(moved, wholes, contexts, strict=True):
        ids = whole if own or whole[:1] == [prefix] else [prefix, *whole]
        pair = Pair(context=tuple(ids[: len(own) or 1]), continuation=tuple(ids[len(own) or 1 :]))
        if not pair.continuation:
            raise ValueError(f"the continuation {continuation!r} adds no token to its context")
        pairs.append(pair)
    return pairs
