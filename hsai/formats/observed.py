"""Weights that look on; calibration puts them in the place of the real ones.

The model is written once, without hooks, and `project` is the one place that all products pass (`project_sorted` that
of experts). `Observed` takes note there of what it is multiplied by, for H = X^T X of the solvers. It lives within one
trace: it is made inside of the function that is compiled, and that function returns what was noted. `Tapped` has the
gradient of what it gives squared and summed, for the sensitivities of an allocation; jax's own differentiation carries
that out of any scan.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hsai.formats.packed import Packed, Weight, to_dense
from hsai.sharding import constrain

ROWS = 128
"""Of an expert that are multiplied at a time."""


class Notes:
    """Gram matrices of the inputs of observed weights, in which every row counts the same (`level_rows`), and sums of
    squares of rows as they are; weights with the same input share one."""

    def __init__(self, *, raw: bool = False) -> None:
        """Args:
        raw: also has Gram matrices of rows as they are, each counting by the square of its norm.
        """
        self._wants_raw = raw
        self._inputs: list[jax.Array] = []
        self._grams: list[jax.Array] = []
        self._raw: list[jax.Array] = []
        self._squares: list[jax.Array] = []
        self._counts: list[jax.Array] = []
        self._owner: dict[str, int] = {}

    def add(self, name: str, x: jax.Array, sizes: jax.Array | None = None) -> None:
        """Adds x^T x of (..., D), float32 (D, D), for the weight `name`; with `sizes`, int32 (E,), that of each
        expert's rows of (R, D), float32 (E, D, D)."""
        index = next((i for i, seen in enumerate(self._inputs) if seen is x), len(self._inputs))
        if index == len(self._inputs):
            self._inputs.append(x)
            for rows, sums in ((level_rows(x), self._grams), *([(x, self._raw)] if self._wants_raw else [])):
                sums.append(sum_products(rows) if sizes is None else sum_products_sorted(rows, sizes))
            self._squares.append(sum_squares(x, sizes))
            self._counts.append(jnp.asarray(x.size // x.shape[-1] if sizes is None else sizes, jnp.float32))
        if name in self._owner:
            raise ValueError(f"{name} was multiplied by twice in one pass; its inputs would be mixed up")
        self._owner[name] = index

    @property
    def grams(self) -> list[jax.Array]:
        """Each input's matrix, in the order in which inputs were met."""
        return self._grams

    @property
    def raw(self) -> list[jax.Array]:
        """The same of rows as they are; empty unless they were asked for."""
        return self._raw

    @property
    def squares(self) -> list[jax.Array]:
        """The diagonals of those, which are always there: float32 (D,), or (E, D)."""
        return self._squares

    @property
    def counts(self) -> list[jax.Array]:
        """How many rows each matrix is a sum over, float32 () or (E,)."""
        return self._counts

    @property
    def owner(self) -> Mapping[str, int]:
        """Which of `grams` belongs to a weight."""
        return self._owner


def level_rows(x: jax.Array) -> jax.Array:
    """x (..., D), float32, with each row scaled to a root mean square of 1; rows of zeros stay.

    The few tokens on which a trained model parks its attention reach a block's inner products with activations that
    are a thousand times the others' (2402.17762). Summed as they are they would be nearly all of X^T X, and what is
    solved for it good for them alone.
    """
    wide = x.astype(jnp.float32)
    squares = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    # What has no square must not pass for a row of zeros: it has to be seen behind this.
    factor = jnp.where(jnp.isfinite(squares), jax.lax.rsqrt(squares), jnp.nan)
    return wide * jnp.where(squares == 0, 0.0, factor)


def sum_squares(x: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
    """Of each position the sum of x^2 over rows (..., D), float32 (D,); with `sizes`, int32 (E,), over each expert's of
    rows (R, D) that are sorted by expert, (E, D)."""
    squares = jnp.square(x.astype(jnp.float32))
    if sizes is None:
        return jnp.sum(squares, axis=tuple(range(x.ndim - 1)))
    owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    return jax.ops.segment_sum(squares, owner, sizes.shape[0])


def sum_products(x: jax.Array) -> jax.Array:
    """X^T X of (..., D), float32 (D, D); on a mesh each device has some rows of it."""
    wide = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return constrain(jnp.matmul(wide.T, wide, precision=jax.lax.Precision.HIGHEST), "gram", None)


def sum_products_sorted(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """X^T X of each expert's rows, float32 (E, D, D), of rows (R, D) that are sorted by expert; sizes int32 (E,).

    Experts take their rows in blocks of one length, the last of them not full: work and memory are those of all rows
    once, and of a block more an expert, however uneven they are.
    """
    count, (rows, width) = sizes.shape[0], x.shape
    block = min(ROWS, rows)
    blocks = -(-sizes // block)
    ends, last = jnp.cumsum(sizes), jnp.cumsum(blocks)
    padded = jnp.pad(x.astype(jnp.float32), ((0, block), (0, 0)))

    def step(grams: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        expert = jnp.clip(jnp.searchsorted(last, index, side="right"), 0, count - 1)
        start = ends[expert] - sizes[expert] + (index - (last[expert] - blocks[expert])) * block
        part = jax.lax.dynamic_slice_in_dim(padded, start, block)
        part = jnp.where(((start + jnp.arange(block)) < ends[expert])[:, None], part, 0.0)
        found = grams[expert] + jnp.matmul(part.T, part, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.dynamic_update_index_in_dim(grams, found, expert, 0), None

    most = -(-rows // block) + count
    grams, _ = jax.lax.scan(step, jnp.zeros((count, width, width), jnp.float32), jnp.arange(most))
    return constrain(grams, "experts", "gram", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed(Packed):
    """`value`, and where to note what it meets."""

    value: Weight
    name: str = dataclasses.field(metadata={"static": True})
    notes: Notes = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def dense(self) -> jax.Array:
        return to_dense(self.value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tapped(Packed):
    """`value`, and `sink`, float32 (..., 1, F): zeros, with sum g^2 for a gradient, g that of each row of the product;
    of experts each has its own."""

    value: Weight
    sink: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def dense(self) -> jax.Array:
        return to_dense(self.value)

    def tap(self, y: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        """y (..., F) itself; with `sizes`, int32 (E,), rows (R, F) of experts, sorted by them."""
        return _tap(y, self.sink, sizes)


def is_watched(*weights: Weight) -> bool:
    """Whether one of the weights looks on."""
    return any(isinstance(w, Observed | Tapped) for w in weights)


def takes_notes(*weights: Weight) -> bool:
    """Whether one of them does so within the trace that it was made in."""
    return any(isinstance(w, Observed) for w in weights)


@jax.custom_vjp
def _tap(y: jax.Array, sink: jax.Array, sizes: jax.Array | None) -> jax.Array:
    return y


def _tap_forward(
    y: jax.Array, sink: jax.Array, sizes: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    return y, (sink, sizes)


def _tap_backward(saved: tuple[jax.Array, jax.Array | None], grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    # No gradient of anything, but a sum over rows that adds up over batches as one does.
    sink, sizes = saved
    return grad, sum_squares(grad, sizes).reshape(sink.shape), None


_tap.defvjp(_tap_forward, _tap_backward)
