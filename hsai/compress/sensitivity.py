"""Sensitivities: by how much the model's loss is expected to rise if one weight of one layer takes a candidate format.

The loss is the KL divergence of the model's predictions to what they were. Where nothing has changed it has no slope,
and its curvature is the Fisher matrix (2306.07629, section 4.1, weights single weights by that matrix's diagonal). For
a product y = x W, whose x and whose gradients g at y are taken to be independent, it is E[x x^T] (x) E[g g^T] (K-FAC,
1503.05671, section 3), of which the second factor's diagonal does, for rounding errors of different outputs have
nothing to do with each other:

    loss(v) = 1/2 sum_f E[g_f^2] (w - v)_f^T E[x x^T] (w - v)_f    nats a token.

Expectations are over tokens of calibration text and over labels drawn from the model itself. g comes from one backward
pass over a few windows, x x^T from the same pass block by block that solvers make; v is the candidate as it would be
solved. Of experts each has its own x, g and tokens. A table of embeddings is a product with one-hot x, and x x^T counts
tokens; the gradient of the head is known: E[g_f^2] = p_f (1 - p_f).

B batch, T query, D contraction, F outputs, V vocabulary, C positions in a chunk.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.allocate import Item, Option
from hsai.compress.block_solver import BlockSolver
from hsai.compress.calibrated import check_observed
from hsai.compress.calibration import widen_batch
from hsai.compress.ledger import keep_finite
from hsai.compress.resume import Workbench
from hsai.compress.solvers import SolverConfig
from hsai.compress.stream import Grams, Progress, Streams, stream_blocks
from hsai.errors import InputError
from hsai.formats import FormatConfig, Weight, nbytes, to_dense
from hsai.formats.observed import Tapped, level_rows, sum_products
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer
from hsai.models.transformer import Block
from hsai.sharding import lay_out

CHUNK = 128
"""Positions of a row whose logits exist together."""

Candidates = Mapping[str, tuple[Sequence[FormatConfig], SolverConfig]]
Moments = Mapping[str, jax.Array]
"""sum g^2 over all tokens at the outputs of each weight, float32 (L, F), of experts (L, E, F), of a table (F,); and of
the head, besides sum p (1 - p) (V,), the sum of x x^T (D, D) for its inputs, as they are and level."""

LOOKUP, LABELS, INPUTS, LEVEL = "embed", "head labels", "head inputs", "head inputs, level"


def measure_sensitivities(
    model: Transformer,
    candidates: Candidates,
    tokens: np.ndarray,
    *,
    batch: int,
    seed: int,
    workbench: Workbench | None = None,
    progress: Progress | None = None,
) -> list[Item]:
    """What every candidate of every layer would cost: an item for each layer and weight, and for each table.

    Args:
      model: with dense weights.
      candidates: formats of weights by their names in the model, and how they would be solved.
      tokens: int32 (N, T).
      batch: sequences at a time, B, of which N is a multiple; see `widen_batch`.
      seed: draws the labels.
      workbench: where each layer's prices, and those of tables, are kept as soon as they are known, and those of an
        earlier run are found.
      progress: called with ("measuring gradients", sequences done, in all) and ("trying formats", layers done, in all).
    Raises:
      InputError: gradients are not finite; see `stream_blocks` and `check_observed`.
    """
    blocks = {name: found for name, found in candidates.items() if name.startswith("layers.")}
    tables = [name for name in candidates if name not in blocks]
    places = [*([None] if tables else []), *(range(model.config.layers) if blocks else [])]
    found: dict[int | None, list[Item]] = {}
    for place in places:
        kept = None if workbench is None else workbench.load_trials(place)
        if kept is not None:
            found[place] = kept
    if len(found) < len(places):
        moments = sum_gradients(model, list(blocks), tokens, batch=batch, seed=seed, progress=progress)

    def keep(place: int | None, items: list[Item]) -> None:
        found[place] = items
        if workbench is not None:
            workbench.save_trials(place, items)

    def try_block(layer: int, block: Block, grams: Grams, streams: Streams) -> Block:
        check_observed(blocks, grams)
        assert streams.raw is not None
        params, solver = named_weights(block), BlockSolver(grams, streams.squares, layer=layer)
        items = []
        for full, (formats, config) in blocks.items():
            name = full.removeprefix("layers.")
            w, options = params[name].get_value(), []
            for format in formats:
                packed = solver.pack(name, w, format, config).weight
                loss = _price(w, packed, streams.raw[name], moments[full][layer], streams.counts[name], tokens.size)
                options.append(Option(format=format, bytes=nbytes(packed), loss=keep_finite(loss)))
            items.append(Item(weight=full, layer=layer, options=tuple(options)))
        keep(layer, items)
        return block

    def recall(layer: int, block: Block) -> Block | None:
        return block if layer in found else None

    def report(_: str, done: int, total: int) -> None:
        if progress is not None:
            progress("trying formats", done, total)

    if tables and None not in found:
        keep(None, [_price_table(model, name, *candidates[name], moments, tokens) for name in tables])
    if len(found) < len(places):
        # Solved for level rows, as it will be, and priced for rows as they are: what an error adds to the divergence
        # grows with the activations that it is multiplied by.
        stream_blocks(model, tokens, batch=batch, solve=try_block, recall=recall, raw=True, progress=report)
    return [item for place in places for item in found[place]]


def sum_gradients(
    model: Transformer,
    names: Sequence[str],
    tokens: np.ndarray,
    *,
    batch: int,
    seed: int,
    progress: Progress | None = None,
) -> Moments:
    """`Moments` of the weights `names` below `layers`, of the embedding table's look-ups, and of the head.

    On the devices are the weights, the residual stream of a batch at every layer, and one block's activations.

    Raises:
      InputError: gradients are not finite.
    """

    @jax.jit
    def pull(model: Transformer, tokens: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
        params = {name: named_weights(model)[name].get_value() for name in (*names, LOOKUP)}

        def forward(sinks: dict[str, jax.Array]) -> jax.Array:
            tapped: dict[str, Weight] = {name: Tapped(params[name], sink) for name, sink in sinks.items()}
            hidden, _ = replace_weights(model, tapped)(tokens, remat="full")
            return hidden

        sinks = {name: jnp.zeros((*w.shape[:-2], 1, w.shape[-1]), jnp.float32) for name, w in params.items()}
        sinks[LOOKUP] = jnp.zeros((1, model.config.embed), jnp.float32)
        hidden, back = jax.vjp(forward, sinks)
        d_hidden, labels, inputs, level = draw_labels(model, hidden, keys)
        found = {name: sink[..., 0, :] for name, sink in back(d_hidden)[0].items()}
        return found | {LABELS: labels, INPUTS: inputs, LEVEL: level}

    sums: dict[str, jax.Array] = {}
    batch = widen_batch(batch, len(tokens))
    for start in range(0, len(tokens), batch):
        # A sequence draws its own labels, however many are on the devices at a time.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), start + jnp.arange(batch))
        found = pull(model, lay_out(tokens[start : start + batch], "batch", "seq"), keys)
        sums = found if not sums else {name: sums[name] + found[name] for name in sums}
        if progress is not None:
            progress("measuring gradients", start + batch, len(tokens))
    for name, moment in sums.items():
        if not bool(jnp.all(jnp.isfinite(moment))):
            # One NaN is soon everywhere; where activations are to blame, this names the layer that made it.
            stream_blocks(model, tokens, batch=batch, solve=lambda layer, block, grams, streams: block)
            raise InputError(
                f"{name}: gradients over calibration are NaN or infinite, so that nothing can be allocated"
            )
    return sums


def draw_labels(model: Transformer, hidden: jax.Array, keys: jax.Array) -> tuple[jax.Array, ...]:
    """Of hidden states (B, T, D): the gradient (B, T, D) of -log p(label) with a label drawn from p at each position,
    by the sequence's own of `keys` (B,); the sum of p (1 - p), float32 (V,); and those of x x^T, float32 (D, D), as x
    is and of level rows. Logits exist for a chunk at a time."""
    batch, length, width = hidden.shape
    chunk = min(CHUNK, length)
    padded = jnp.pad(hidden, ((0, 0), (0, -length % chunk), (0, 0)))
    pieces = jnp.moveaxis(padded.reshape(batch, -1, chunk, width), 1, 0)
    starts = jnp.arange(len(pieces)) * chunk

    def step(
        sums: tuple[jax.Array, ...], scanned: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        x, start = scanned
        logits, back = jax.vjp(model.logits, x)
        there = (start + jnp.arange(chunk) < length)[None, :, None]
        p = jax.nn.softmax(logits, axis=-1)
        label = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, start), row))(keys, logits)
        (d_x,) = back(jnp.where(there, p - jax.nn.one_hot(label, p.shape[-1]), 0.0))
        rows = jnp.where(there, x, 0)
        labels = sums[0] + jnp.sum(jnp.where(there, p * (1.0 - p), 0.0), axis=(0, 1))
        return (labels, sums[1] + sum_products(rows), sums[2] + sum_products(level_rows(rows))), d_x

    square = jnp.zeros((width, width), jnp.float32)
    zeros: tuple[jax.Array, ...] = (jnp.zeros(model.config.vocab, jnp.float32), square, square)
    (labels, inputs, level), d_pieces = jax.lax.scan(step, zeros, (pieces, starts))
    d_hidden = jnp.moveaxis(d_pieces, 0, 1).reshape(padded.shape)[:, :length]
    return d_hidden, labels, inputs, level


def _price_table(
    model: Transformer,
    name: str,
    formats: Sequence[FormatConfig],
    config: SolverConfig,
    moments: Moments,
    tokens: np.ndarray,
) -> Item:
    """The table of embeddings, the head, or both in one."""
    w = to_dense(named_weights(model)[name].get_value())
    squares = jnp.diagonal(moments[INPUTS])
    solver = BlockSolver({name: moments[LEVEL]}, {name: squares})
    counts = jnp.asarray(np.bincount(tokens.reshape(-1), minlength=w.shape[-1]), jnp.float32)
    options = []
    for format in formats:
        packed = solver.pack(name, w, format, config).weight
        loss = 0.0
        if name == LOOKUP:
            loss += float(_price_lookup(w, packed, counts, moments[LOOKUP], tokens.size))
        if name != LOOKUP or model.config.tie_embeddings:
            loss += float(_price(w, packed, moments[INPUTS], moments[LABELS], tokens.size, tokens.size))
        options.append(Option(format=format, bytes=nbytes(packed), loss=keep_finite(loss)))
    return Item(weight=name, layer=None, options=tuple(options))


@jax.jit
def _price(
    w: jax.Array, packed: Weight, gram: jax.Array, moment: jax.Array, count: jax.Array | int, tokens: int
) -> jax.Array:
    """The formula above, of a product (..., D, F) for each token of the text; gram (..., D, D) and moment (..., F) are
    sums over `count` (...) of them."""
    missed = w.astype(jnp.float32) - to_dense(packed).astype(jnp.float32)
    share = 1.0 / jnp.maximum(jnp.asarray(count, jnp.float32), 1.0)[..., None]
    curved = jnp.matmul(gram * share[..., None], missed, precision=jax.lax.Precision.HIGHEST)
    return 0.5 * jnp.sum(moment / tokens * jnp.maximum(jnp.sum(missed * curved, axis=-2), 0.0))


@jax.jit
def _price_lookup(w: jax.Array, packed: Weight, counts: jax.Array, moment: jax.Array, tokens: int) -> jax.Array:
    """Of a look-up, whose outputs are the rows of the table; counts (V,) and moment (D,) are sums over tokens."""
    missed = w.astype(jnp.float32) - to_dense(packed).astype(jnp.float32)
    return 0.5 * jnp.sum(moment / tokens * jnp.sum(jnp.square(missed) * (counts / tokens), axis=1))
