"""Output errors of a packed model over text, layer by layer, where no solver looked at it.

What plain rounding does to the outputs of each weight, beside what a solver does to them: the same pass over the layers
(`hsai.compress.stream`), the same rows of the ledger, and nothing is changed.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from hsai.compress.calibrated import make_row
from hsai.compress.ledger import LayerRow
from hsai.compress.stream import Grams, Progress, Streams, stream_blocks, take_block
from hsai.formats import FormatConfig, to_dense
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer
from hsai.models.transformer import Block


def measure_layers(
    model: Transformer,
    packed: Transformer,
    formats: Mapping[str, Sequence[FormatConfig]],
    tokens: np.ndarray,
    *,
    batch: int,
    progress: Progress | None = None,
) -> tuple[LayerRow, ...]:
    """A row for each layer of the weights below `layers`, and for the head, each behind the packed layers before it.

    Args:
      model: with dense weights.
      packed: the same model, compressed.
      formats: of the weights to be measured by their names: that of each layer, or the one of the head.
      tokens: int32 (N, T).
      batch: sequences at a time.
      progress: called with ("measuring outputs", layers done, layers in all).
    Raises:
      InputError: see `stream_blocks`.
    """
    rows: list[LayerRow] = []

    def compare(layer: int, block: Block, grams: Grams, streams: Streams) -> Block:
        dense = {name: param.get_value() for name, param in named_weights(block).items()}
        found = named_weights(take_block(packed, layer))
        held = {name: found[name].get_value().astype(w.dtype) for name, w in dense.items()}
        for full in formats:
            name = full.removeprefix("layers.")
            if name != full and name in grams:
                rows.append(make_row(full, layer, formats[full][layer], dense[name], held[name], grams[name]))
        return replace_weights(block, held)

    def compare_head(gram: jax.Array, _: jax.Array) -> None:
        for name in heads:
            w, held = (to_dense(named_weights(each)[name].get_value()) for each in (model, packed))
            rows.append(make_row(name, None, formats[name][0], w, held, gram))

    def report(_: str, done: int, total: int) -> None:
        if progress is not None:
            progress("measuring outputs", done, total)

    heads = [name for name in formats if not name.startswith("layers.")]
    finish = compare_head if heads else None
    stream_blocks(model, tokens, batch=batch, solve=compare, finish=finish, packed=packed, progress=report)
    return tuple(rows)
