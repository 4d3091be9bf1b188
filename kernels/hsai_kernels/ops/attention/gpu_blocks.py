"""What the GPU attention kernels share: the plan of a call, its blocks in memory, and scores of rows and keys.

A row is one query of one head. The G query heads of a kv head follow one another for every query, so that a block of
rows shares each key that it loads, and takes its queries from (B, T, N, H) as they are. That serves
training and decoding alike: with one query, the heads are the rows. Triton's blocks are powers of two and its loads
check nothing: what lies outside (ragged lengths, head dims such as 80) is masked here, where it is static that there is
any.

Dimensions: B batch, T query, S key, N heads, K kv heads, G = N / K, H head dim; R rows and E keys a block, P >= H.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hsai_kernels.block_product import multiply
from hsai_kernels.triton_blocks import SMALLEST_BLOCK, check_block, index_matrix, load_matrix

LOWEST = float(jnp.finfo(jnp.float32).min)
LOG2_E = math.log2(math.e)
"""Weights are powers of two, which the hardware has: this factor is part of the scores' scale."""

Marks = tuple[jax.Array, ...]
"""Positions, and segments if there are any."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How a kernel is cut: rows and keys a block, warps a block, and stages of the software pipeline."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        for name in ("rows", "keys"):
            check_block(name, getattr(self, name))


Tiles = Mapping[str, Tile]
"""A tile for each of the kernels: "forward", "d_rows" and "d_keys"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is static in a call."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    softcap: float | None
    scale: float
    interpret: bool

    @property
    def group(self) -> int:
        """Query heads a kv head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Rows a kv head."""
        return self.queries * self.group

    @property
    def width(self) -> int:
        """Columns of a block: the head dim, or the next power of two."""
        return max(SMALLEST_BLOCK, pl.next_power_of_2(self.head_dim))


def specify_rows(plan: Plan) -> pl.BlockSpec:
    """All rows of a batch, (T * N, P), of an array (B, T * N, H); programs are (block, ..., kv head, batch)."""
    return pl.BlockSpec((None, plan.queries * plan.heads, plan.width), lambda *at: (at[-1], 0, 0))


def specify_keys(plan: Plan, tile: Tile) -> pl.BlockSpec:
    """All keys of a head in whole blocks, (blocks * E, P), of an array (B, S, K, H)."""
    length = pl.cdiv(plan.keys, tile.keys) * tile.keys
    return pl.BlockSpec((None, length, None, plan.width), lambda *at: (at[-1], 0, at[-2], 0))


def specify_vector(length: int) -> pl.BlockSpec:
    """All of a batch, (length,), of an array (B, length')."""
    return pl.BlockSpec((None, length), lambda *at: (at[-1], 0))


def specify_key_marks(plan: Plan, tile: Tile, marks: Marks) -> tuple[pl.BlockSpec, ...]:
    """Positions and segments of keys, in whole blocks."""
    return tuple(specify_vector(pl.cdiv(plan.keys, tile.keys) * tile.keys) for _ in marks)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows of a block are: each (R,)."""

    index: jax.Array
    """In the T * N rows of a batch."""
    query: jax.Array
    """In the T queries."""
    real: jax.Array
    """Whether there is such a row: a last block may be ragged."""


def locate_rows(plan: Plan, tile: Tile, block: jax.Array, kv_head: jax.Array) -> Rows:
    """Rows of block `block` of a kv head."""
    row = block * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
    query = jax.lax.div(row, jnp.int32(plan.group))
    index = query * plan.heads + kv_head * plan.group + jax.lax.rem(row, jnp.int32(plan.group))
    return Rows(index=index, query=query, real=row < plan.rows)


def find_columns(plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Columns of a block, and which of them a head has: each (P,)."""
    columns = jnp.arange(plan.width, dtype=jnp.int32)
    return columns, columns < plan.head_dim


def load_rows(plan: Plan, ref: jax.Array, rows: Rows) -> jax.Array:
    """(R, P), zeros outside."""
    columns, inside = find_columns(plan)
    return load_matrix(ref, rows.index, columns, rows.real[:, None] & inside[None, :])


def store_rows(plan: Plan, ref: jax.Array, rows: Rows, value: jax.Array) -> None:
    """Writes (R, P)."""
    columns, inside = find_columns(plan)
    mask = rows.real[:, None] & inside[None, :]
    plgpu.store(ref.at[index_matrix(rows.index, columns)], value.astype(ref.dtype), mask=mask)


def load_row_vectors(rows: Rows, ref: jax.Array) -> jax.Array:
    """(R,) of what every row has once, zeros outside."""
    return plgpu.load(ref.at[rows.index], mask=rows.real, other=0)


def load_row_marks(rows: Rows, refs: Marks) -> Marks:
    """Positions and segments of the rows' queries, (R,) each, zeros outside."""
    return tuple(plgpu.load(ref.at[rows.query], mask=rows.real, other=0) for ref in refs)


def find_keys(plan: Plan, tile: Tile, block: jax.Array) -> jax.Array | None:
    """Which keys of a block there are, (E,); None where all are, always."""
    if plan.keys % tile.keys == 0:
        return None
    return block * tile.keys + jnp.arange(tile.keys, dtype=jnp.int32) < plan.keys


def _select_keys(plan: Plan, tile: Tile, block: jax.Array) -> tuple[tuple[Any, Any], jax.Array | None]:
    at = (pl.ds(block * tile.keys, tile.keys), pl.ds(0, plan.width))
    real = find_keys(plan, tile, block)
    mask = None if real is None else real[:, None]
    if plan.width != plan.head_dim:
        inside = find_columns(plan)[1][None, :]
        mask = inside if mask is None else mask & inside
    return at, None if mask is None else jnp.broadcast_to(mask, (tile.keys, plan.width))


def load_keys(plan: Plan, tile: Tile, ref: jax.Array, block: jax.Array) -> jax.Array:
    """(E, P), zeros outside."""
    at, mask = _select_keys(plan, tile, block)
    return plgpu.load(ref.at[at]) if mask is None else plgpu.load(ref.at[at], mask=mask, other=0)


def store_keys(plan: Plan, tile: Tile, ref: jax.Array, block: jax.Array, value: jax.Array) -> None:
    """Writes (E, P)."""
    at, mask = _select_keys(plan, tile, block)
    plgpu.store(ref.at[at], value.astype(ref.dtype), mask=mask)


def load_key_marks(plan: Plan, tile: Tile, refs: Marks, block: jax.Array) -> Marks:
    """Positions and segments of keys, (E,) each, zeros outside."""
    at, real = pl.ds(block * tile.keys, tile.keys), find_keys(plan, tile, block)
    return tuple(plgpu.load(ref.at[at]) if real is None else plgpu.load(ref.at[at], mask=real, other=0) for ref in refs)


def specify_key_scales(plan: Plan, tile: Tile) -> pl.BlockSpec:
    """Scales of all keys of a head, in whole blocks, (blocks * E,), of an array (B, S, K)."""
    length = pl.cdiv(plan.keys, tile.keys) * tile.keys
    return pl.BlockSpec((None, length, None), lambda *at: (at[-1], 0, at[-2]))


def find_visible(plan: Plan, at_q: Marks, at_k: Marks, real: jax.Array | None) -> jax.Array:
    """bool: who sees whom, where rows and keys lie on different axes; `real` masks keys or rows that are none."""
    visible = at_k[0] <= at_q[0]
    if plan.window is not None:
        # Positions further apart than int32 reaches have a negative distance.
        distance = at_q[0] - at_k[0]
        visible &= (distance >= 0) & (distance < plan.window)
    if len(at_q) > 1:
        visible &= at_q[1] == at_k[1]
    return visible if real is None else visible & real


def score(
    plan: Plan, a: jax.Array, b: jax.Array, b_scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Base-2 scores of `a` (x, P) and `b` (y, P), float32 (x, y), and with a softcap their slope in the product.

    With `b_scale` (y,) `b` are codes, of which each row has a scale.
    """
    product = multiply(a, b, (1, 1))
    if b_scale is not None:
        product = product * b_scale[None, :]
    if plan.softcap is None:
        return product * (plan.scale * LOG2_E), None
    bent = jnp.tanh(product * (plan.scale / plan.softcap))
    return bent * (plan.softcap * LOG2_E), 1.0 - bent * bent


def find_reach(plan: Plan, rows: int, keys: int, at_q: Marks, at_k: Marks) -> jax.Array:
    """bool (B, row blocks, key blocks): False where surely no query of a block of rows sees any key of the other.

    From the least and largest position and segment of each block: XLA fuses it into the reductions that follow.
    """
    at_q = tuple(jnp.repeat(mark, plan.group, axis=1) for mark in at_q)
    bounds_q, bounds_k = _bound_blocks(at_q, rows), _bound_blocks(at_k, keys)
    (low_q, high_q), (low_k, high_k) = (
        tuple(x[:, :, None] for x in bounds_q[0]),
        tuple(x[:, None, :] for x in bounds_k[0]),
    )
    reach = low_k <= high_q
    if plan.window is not None:
        # Where a query is before all keys the difference may leave int32; where none is, it is then negative.
        reach &= (low_q < high_k) | (low_q - high_k < plan.window)
    if len(at_q) > 1:
        (low_q, high_q), (low_k, high_k) = (
            tuple(x[:, :, None] for x in bounds_q[1]),
            tuple(x[:, None, :] for x in bounds_k[1]),
        )
        reach &= (low_k <= high_q) & (low_q <= high_k)
    return reach


def _bound_blocks(marks: Marks, size: int) -> list[tuple[jax.Array, jax.Array]]:
    """The least and largest of each mark in every block of `size`, (B, blocks) each."""
    bounds = []
    for mark in marks:
        # The last one again and again is in the last block already.
        full = jnp.pad(mark, ((0, 0), (0, -mark.shape[1] % size)), mode="edge").reshape(mark.shape[0], -1, size)
        bounds.append((jnp.min(full, axis=-1), jnp.max(full, axis=-1)))
    return bounds


def find_range(reach: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """int32: the first block along `axis` that is in reach, and the one after the last; first >= last if none is."""
    count = reach.shape[axis]
    block = jax.lax.broadcasted_iota(jnp.int32, reach.shape, axis)
    return (
        jnp.min(jnp.where(reach, block, count), axis=axis),
        jnp.max(jnp.where(reach, block + 1, 0), axis=axis),
    )
