"""What the TPU kernels of attention share: block sizes, who may see whom block by block, and masks.

Which blocks a block of queries reads follows from data (positions, window, segments). So it is worked out before the
kernels start, from the lowest and highest position and segment of each block, and prefetched as scalars: blocks outside
the range [first, last] of a block are not fetched, and those inside that hold nothing visible are not computed.

Dimensions: B batch, R rows (the queries of all heads of a group, query by query), S keys, H head dim, M marks a row
(its position, and its segment if there are segments), I blocks of rows, J blocks of keys.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hsai_kernels.block_product import multiply
from hsai_kernels.mosaic import LANES, MEMORY_LIMIT, TILE_ROWS
from hsai_kernels.tuning import FEW_ROWS, choose_tile

LOWEST = float(jnp.finfo(jnp.float32).min)

LARGEST_BLOCKS = {
    # (bytes of an element, head dims up to): (rows, keys) forward, (rows, keys) backward.
    (2, 128): ((512, 1024), (512, 512)),
    (2, 256): ((512, 512), (512, 512)),
    (4, 128): ((256, 512), (256, 256)),
    (4, 256): ((256, 256), (256, 256)),
}
"""A block of scores and what is computed from it (5 values of 4 bytes a score) stays below a sixth of the limit. With
float32 the matrix unit makes six passes, so that smaller blocks hide their traffic as well, and compile in a third."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is fixed when the program is traced."""

    window: int | None
    softcap: float | None
    scale: float
    forward: tuple[int, int]
    """Rows and keys a block, in the forward pass."""
    backward: tuple[int, int]
    """Rows and keys a block, in the backward pass."""
    keys: int
    """S before padding: keys from here on are none."""


def choose_blocks(
    rows: int, keys: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and keys a block in the forward and the backward pass: tuned ones, or LARGEST_BLOCKS.

    Raises NotImplementedError for a dtype or a head dim that has none, and where the chip's compiler is known to refuse
    them.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"has operands of float32 or bfloat16, not of {dtype}")
    for (itemsize, largest), blocks in LARGEST_BLOCKS.items():
        if itemsize == dtype.itemsize and head_dim <= largest:
            shape = f"head dim {largest}{', few rows' if rows <= FEW_ROWS else ''}"
            forward, backward = (
                choose_tile(
                    f"attention {name}",
                    dtype=dtype,
                    shape=shape,
                    own={"rows": r, "keys": s},
                    fit=lambda sides: {
                        "rows": _fit(rows, sides["rows"], TILE_ROWS),
                        "keys": _fit(keys, sides["keys"], LANES),
                    },
                )
                for name, (r, s) in zip(("forward", "backward"), blocks, strict=True)
            )
            return (forward["rows"], forward["keys"]), (backward["rows"], backward["keys"])
    raise NotImplementedError(f"has head dims up to {max(largest for _, largest in LARGEST_BLOCKS)}, not {head_dim}")


def _fit(length: int, largest: int, tile: int) -> int:
    """The block for a length: as few blocks as `largest` allows, of equal size, in whole tiles."""
    blocks = pl.cdiv(length, largest)
    tile = tile if length <= LANES else LANES
    return pl.cdiv(pl.cdiv(length, blocks), tile) * tile


def pad_marks(marks: jax.Array, block: int) -> jax.Array:
    """int32 (B, M, length) up to whole blocks and lanes, by repeating the last: bounds of blocks stay what they are."""
    length = marks.shape[2]
    wanted = pl.cdiv(length, block) * max(block, LANES)
    return jnp.pad(marks, ((0, 0), (0, 0), (0, wanted - length)), mode="edge")


def pad_rows(x: jax.Array, block: int) -> jax.Array:
    """(B, K, length, H) with zeros up to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Prefetched scalars: for every block its lowest and highest marks, and the range of blocks that it reads.

    Arrays are flat, (B * I * 2 * M) or (B * J * 2 * M): two-dimensional ones would be padded to 128 in scalar memory.
    """

    rows: jax.Array
    keys: jax.Array
    first: jax.Array
    """int32 (B * I) or, for the pass over keys, (B * J)."""
    last: jax.Array


def find_bounds(
    options: Options, at_rows: jax.Array, at_keys: jax.Array, rows: int, keys: int, by_keys: bool
) -> Bounds:
    """The bounds of blocks of `rows` rows and `keys` keys, from padded marks; `by_keys`: ranges are those of keys."""
    low_rows, high_rows = _find_extremes(at_rows, max(rows, LANES))
    low_keys, high_keys = _find_extremes(at_keys, keys)
    met = _may_see(
        options.window,
        [(low_rows[:, m, :, None], high_rows[:, m, :, None]) for m in range(low_rows.shape[1])],
        [(low_keys[:, m, None, :], high_keys[:, m, None, :]) for m in range(low_rows.shape[1])],
    )
    if by_keys:
        met = met.swapaxes(1, 2)
    count = met.shape[2]
    first = jnp.argmax(met, axis=2)
    last = jnp.where(jnp.any(met, axis=2), count - 1 - jnp.argmax(met[:, :, ::-1], axis=2), 0)

    def flatten(low: jax.Array, high: jax.Array) -> jax.Array:
        return jnp.stack([low, high], axis=-1).swapaxes(1, 2).reshape(-1)

    return Bounds(
        rows=flatten(low_rows, high_rows),
        keys=flatten(low_keys, high_keys),
        first=first.astype(jnp.int32).reshape(-1),
        last=last.astype(jnp.int32).reshape(-1),
    )


def _find_extremes(marks: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest of each block: int32 (B, M, blocks) twice."""
    split = marks.reshape(*marks.shape[:2], -1, block)
    return jnp.min(split, axis=-1), jnp.max(split, axis=-1)


def _may_see(window: int | None, rows: list[tuple[Any, Any]], keys: list[tuple[Any, Any]]) -> Any:
    """Whether any row of a block may see any key of another, from the (lowest, highest) of each of their marks."""
    (low_row, high_row), (low_key, high_key) = rows[0], keys[0]
    met = low_key <= high_row
    if window is not None:
        # Where a row is before the last key the difference may leave int32; where none is, it is then negative.
        met &= (low_row < high_key) | (low_row - high_key < window)
    if len(rows) > 1:
        met &= (rows[1][0] <= keys[1][1]) & (keys[1][0] <= rows[1][1])
    return met


def is_needed(options: Options, rows: Any, keys: Any, row_block: Any, key_block: Any, marks: int) -> Any:
    """In a kernel, from the bounds in scalar memory: whether a block of rows may see any key of a block of keys."""

    def read(bounds: Any, block: Any) -> list[tuple[Any, Any]]:
        return [(bounds[block * 2 * marks + 2 * m], bounds[block * 2 * marks + 2 * m + 1]) for m in range(marks)]

    return _may_see(options.window, read(rows, row_block), read(keys, key_block))


def find_visible(options: Options, at_rows: list[jax.Array], at_keys: list[jax.Array], keys: jax.Array) -> jax.Array:
    """bool: which keys a row sees. Marks of rows broadcast against marks of keys and `keys`, the index of each key."""
    visible = at_keys[0] <= at_rows[0]
    if options.window is not None:
        # Positions further apart than int32 reaches have a negative distance.
        distance = at_rows[0] - at_keys[0]
        visible &= (distance >= 0) & (distance < options.window)
    if len(at_rows) > 1:
        visible &= at_rows[1] == at_keys[1]
    return visible & (keys < options.keys)


def turn_row(row: jax.Array) -> jax.Array:
    """(1, length) -> (length, 128), the same in every lane: a transpose is for whole tiles of 32 bits."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def score(options: Options, a: jax.Array, b: jax.Array, b_scale: jax.Array | None = None) -> jax.Array:
    """float32 scores of each row of `a` with each row of `b`, capped; of codes with a scale each, (1, rows of `b`)."""
    scores = multiply(a, b, (1, 1)) * options.scale
    if b_scale is not None:
        scores = scores * b_scale
    return scores if options.softcap is None else options.softcap * jnp.tanh(scores / options.softcap)


def widen(cached: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A block of a cache in the queries' dtype; every int8 code and every bfloat16 number is one of it."""
    if cached.dtype == jnp.int8:
        cached = cached.astype(jnp.int32).astype(jnp.float32)
    return cached.astype(dtype)


def set_semantics() -> Any:
    """Batch, heads and the blocks that keep results are independent; the blocks that pass by follow one another."""
    order: tuple[Any, ...] = ("parallel", "parallel", "parallel", "arbitrary")
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=MEMORY_LIMIT)
