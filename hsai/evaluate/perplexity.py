"""Plain text as pairs to score: windows that score each token once, and llama.cpp's chunks."""

from collections.abc import Sequence
from pathlib import Path

from hsai.errors import InputError
from hsai.evaluate.batches import Pair


def read_text(path: Path) -> str:
    """The text of a file, to be measured or calibrated on: what its bytes say, line ends as they stand. A byte-order
    mark at its beginning tells how it is encoded, and is no part of it.

    Raises:
      InputError: it cannot be read, is not UTF-8, or empty.
    """
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text: byte {error.start} is not UTF-8") from error
    if not text:
        raise InputError(f"{path} holds no text")
    return text


def cut_windows(tokens: Sequence[int], *, prefix: Sequence[int], context: int, stride: int) -> list[Pair]:
    """Windows of `context` input tokens that predict each of `tokens` exactly once (the harness's rolling windows).

    The first window predicts all it can, from `prefix` on; each later one the next `stride` tokens, the last one what
    is left, with as much before them as the window holds. A stride of `context` is what the harness measures; a
    smaller one gives every token more to stand on, and costs context / stride times as much.

    Raises:
      InputError: the stride is not in 1..context.
    """
    if not 1 <= stride <= context:
        raise InputError(f"--stride {stride} must be between 1 and the window's {context} tokens")
    pairs, first = [], context - len(prefix) + 1
    if first < 1:
        raise InputError(f"--window {context} is too short: {len(prefix)} tokens stand before a text")
    if tokens:
        pairs.append(Pair(context=tuple(prefix), continuation=tuple(tokens[:first])))
    for start in range(first, len(tokens), stride):
        stop = min(start + stride, len(tokens))
        pairs.append(Pair(context=tuple(tokens[stop - context - 1 : start]), continuation=tuple(tokens[start:stop])))
    return pairs


def cut_chunks(tokens: Sequence[int], *, prefix: Sequence[int], context: int) -> list[Pair]:
    """What llama.cpp's perplexity tool scores: the second half of each chunk of `context` tokens, seen from its start.

    Chunks follow one another without overlap; an incomplete one at the end is left out. Of chunk x the tokens
    x[context // 2 + 1:] count, so that each of them has at least half of a chunk before it (and half of the text is not
    measured). Where `prefix` stands before a text, it is the text's beginning, and its tokens stand in place of the
    first ones of each chunk.

    Raises:
      InputError: the text does not fill a chunk, or a chunk has less than 4 tokens.
    """
    if context < 4:
        raise InputError(f"--window {context} must be at least 4 tokens: half of them are scored")
    text = [*prefix, *tokens]
    if len(text) < context:
        raise InputError(f"the text has {len(text)} tokens and does not fill one window of {context}; give --window")
    pairs = []
    for start in range(0, len(text) - context + 1, context):
        chunk = [*prefix, *text[start + len(prefix) : start + context]]
        seen = context // 2 + 1
        pairs.append(Pair(context=tuple(chunk[:seen]), continuation=tuple(chunk[seen:])))
    return pairs
