"""Text to (context, continuation) token pairs, cut as the harness does (lm_eval.api.model, `_encode_pair`)."""

from collections.abc import Sequence

from hsai.data.tokenizer import Tokenizer
from hsai.evaluate.batches import Pair


def encode_pairs(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """The token pairs of (context, continuation) texts.

    Both are encoded as one text and cut where the context's own tokens end, since a tokenizer may join what stands at
    the seam. White space at the end of a context moves to the continuation: words carry their space in front. Before
    every text stands what the tokenizer puts before one, and an empty context is that, or the end-of-text token.

    Args:
      tokenizer: of the model.
      texts: contexts, which may be empty, and continuations, which may not.
    Raises ValueError for a continuation that has no token of its own.
    """
    moved = []
    for context, continuation in texts:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    contexts = tokenizer.encode_batch([context for context, _ in moved])
    pairs = []
    for (context, continuation), whole, own in zip(moved, wholes, contexts, strict=True):
        before = tokenizer.prefix if context else begin_text(tokenizer)
        seam = len(own) if context else 0  # a tokenizer may have tokens even for an empty text
        pair = Pair(context=(*before, *whole[:seam]), continuation=tuple(whole[seam:]))
        if not pair.continuation:
            raise ValueError(f"the continuation {continuation!r} adds no token to its context")
        pairs.append(pair)
    return pairs


def begin_text(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the first token of a text is predicted from."""
    return tokenizer.prefix or (tokenizer.eot,)
