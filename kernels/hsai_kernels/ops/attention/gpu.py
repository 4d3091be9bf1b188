"""GPU backend of attention: flash attention in Pallas Triton, forward and backward, memory linear in the length.

Blocks of keys that no query of a block sees (above the diagonal, beyond the window, in another document, behind a row's
end in its cache) before the first and after the last one that is seen are not read: a loop's bounds are data.

Float32 products are exact to float32, on the ordinary cores; bfloat16 ones run on the tensor cores, and are summed in
float32. Kernels: gpu_forward.py, gpu_backward.py; what they share: gpu_blocks.py.

A cache of fewer bits than the queries (int8 with scales, bfloat16 under float32) is read as it is stored and widened
block by block; where a gradient is taken, the chunked backend serves it. One of 4 bits is widened as a whole in front
of the kernels: it saves memory, and no time.

Dimensions: B batch, T query, S key, N heads, K kv heads, H head dim.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import check_platform
from hsai_kernels.gradients import differentiate_through
from hsai_kernels.interpret import is_interpreting_gpu
from hsai_kernels.ops.attention.chunked import attention_chunked
from hsai_kernels.ops.attention.gpu_backward import pull_back
from hsai_kernels.ops.attention.gpu_blocks import Marks, Plan, Tile, Tiles
from hsai_kernels.ops.attention.gpu_forward import attend
from hsai_kernels.ops.attention.reference import read_cache
from hsai_kernels.triton_blocks import fit_block
from hsai_kernels.tuning import FEW_ROWS, Sides, choose_tile

LARGEST_HEAD_DIM = 256

TILES: Mapping[tuple[str, int], Tiles] = {
    ("bfloat16", 64): {
        "forward": Tile(rows=128, keys=64, warps=8, stages=3),
        "d_rows": Tile(rows=64, keys=64, warps=4, stages=2),
        "d_keys": Tile(rows=64, keys=64, warps=4, stages=2),
    },
    ("bfloat16", 128): {
        "forward": Tile(rows=128, keys=32, warps=8, stages=2),
        "d_rows": Tile(rows=64, keys=64, warps=8, stages=2),
        "d_keys": Tile(rows=64, keys=64, warps=8, stages=2),
    },
    ("bfloat16", 256): {
        "forward": Tile(rows=64, keys=32, warps=8, stages=2),
        "d_rows": Tile(rows=32, keys=32, warps=8, stages=2),
        "d_keys": Tile(rows=32, keys=32, warps=8, stages=2),
    },
    ("float32", 64): {
        "forward": Tile(rows=64, keys=32, warps=8, stages=2),
        "d_rows": Tile(rows=64, keys=32, warps=8, stages=2),
        "d_keys": Tile(rows=64, keys=32, warps=8, stages=2),
    },
    ("float32", 128): {
        "forward": Tile(rows=32, keys=16, warps=8, stages=2),
        "d_rows": Tile(rows=16, keys=32, warps=8, stages=2),
        "d_keys": Tile(rows=32, keys=32, warps=8, stages=2),
    },
    ("float32", 256): {
        "forward": Tile(rows=32, keys=32, warps=8, stages=1),
        "d_rows": Tile(rows=32, keys=16, warps=8, stages=2),
        "d_keys": Tile(rows=32, keys=32, warps=8, stages=1),
    },
}
"""By dtype and the largest head dim that a row of the table serves. Chosen so that on an A100 and an H100 operands fit
the shared memory and nothing spills from registers (tests/kernels/test_aot.py), and not yet by time: no GPU was
there."""

NARROW_TILES: Mapping[tuple[str, int], Tile] = {
    ("bfloat16", 256): Tile(rows=64, keys=16, warps=8, stages=2),
    ("float32", 64): Tile(rows=64, keys=16, warps=8, stages=2),
    ("float32", 128): Tile(rows=32, keys=16, warps=8, stages=1),
    ("float32", 256): Tile(rows=16, keys=32, warps=8, stages=1),
}
"""Of the forward pass over a cache of fewer bits than the queries, where TILES' spill: widening takes registers."""


def attention_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Softmax attention over the visible keys; arguments and shapes as in api.py, already validated.

    `tiles` are for tests; None for `choose_tiles`. Raises NotImplementedError for what it does not support.
    """
    check_platform("gpu")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"has q, k, v of bfloat16 or float32, not of {q.dtype}")
    if q.shape[3] > LARGEST_HEAD_DIM:
        raise NotImplementedError(f"has head dims of at most {LARGEST_HEAD_DIM}, not {q.shape[3]}")
    if q.size == 0 or k.size == 0:
        raise NotImplementedError(f"has queries and keys that are not empty, not q {q.shape} and k {k.shape}")
    if k.dtype == jnp.uint8:
        k, v = (read_cache(cache, by, q.dtype).astype(q.dtype) for cache, by in ((k, k_scale), (v, v_scale)))
        k_scale = v_scale = None
    plan = Plan(
        batch=q.shape[0],
        queries=q.shape[1],
        keys=k.shape[1],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        window=window,
        softcap=softcap,
        scale=scale,
        interpret=is_interpreting_gpu(),
    )
    at_q: Marks = (q_positions,)
    at_k: Marks = (kv_positions,)
    if q_segments is not None and kv_segments is not None:
        at_q, at_k = (q_positions, q_segments), (kv_positions, kv_segments)
    at_q, at_k = (tuple(mark.astype(jnp.int32) for mark in marks) for marks in (at_q, at_k))
    if tiles is None:
        tiles = choose_tiles(plan.rows, plan.keys, plan.head_dim, q.dtype, narrow=k.dtype != q.dtype)
    settings = _Settings(plan, tuple(sorted(tiles.items())))
    if k.dtype == q.dtype:
        return _attend(settings, q, k, v, at_q, at_k)
    reference = functools.partial(attention_chunked, window=window, softcap=softcap, scale=scale)
    operands = (q, k, v, q_positions, kv_positions, q_segments, kv_segments, k_scale, v_scale)
    return differentiate_through(reference, functools.partial(_attend_cache, plan, tiles["forward"]))(*operands)


def _attend_cache(
    plan: Plan,
    tile: Tile,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
) -> jax.Array:
    """As attention_gpu, where k and v have fewer bits than q; without gradients."""
    at_q, at_k = (
        tuple(mark.astype(jnp.int32) for mark in marks if mark is not None)
        for marks in ((q_positions, q_segments), (kv_positions, kv_segments))
    )
    scales = tuple(scale for scale in (k_scale, v_scale) if scale is not None)
    return attend(plan, tile, q, k, v, at_q, at_k, scales)[0]


def choose_tiles(rows: int, keys: int, head_dim: int, dtype: Any, *, narrow: bool = False) -> Tiles:
    """Tuned ones or TILES, no larger than the call has rows (queries times heads a kv head) and keys.

    With `narrow` the keys have fewer bits than the queries. Raises NotImplementedError if the chip's compiler is known
    to refuse any of them.
    """
    name = jnp.dtype(dtype).name
    width = min(limit for kind, limit in TILES if kind == name and limit >= head_dim)
    own = dict(TILES[name, width])
    shape = f"head dim {width}{', few rows' if rows <= FEW_ROWS else ''}"
    if narrow and (name, width) in NARROW_TILES:
        own, shape = own | {"forward": NARROW_TILES[name, width]}, f"{shape}, narrow cache"
    if narrow:  # gradients are not this backend's
        own = {"forward": own["forward"]}

    def fit(sides: Sides) -> Sides:
        return {**sides, "rows": fit_block(sides["rows"], rows), "keys": fit_block(sides["keys"], keys)}

    return {
        kernel: Tile(
            **choose_tile(f"attention {kernel}", dtype=name, shape=shape, own=dataclasses.asdict(tile), fit=fit)
        )
        for kernel, tile in own.items()
    }


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is static, hashable as custom_vjp needs it."""

    plan: Plan
    named_tiles: tuple[tuple[str, Tile], ...]

    @property
    def tiles(self) -> dict[str, Tile]:
        return dict(self.named_tiles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: _Settings, q: jax.Array, k: jax.Array, v: jax.Array, at_q: Marks, at_k: Marks) -> jax.Array:
    return attend(settings.plan, settings.tiles["forward"], q, k, v, at_q, at_k)[0]


def _attend_forward(
    settings: _Settings, q: jax.Array, k: jax.Array, v: jax.Array, at_q: Marks, at_k: Marks
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, logs = attend(settings.plan, settings.tiles["forward"], q, k, v, at_q, at_k)
    return out, ((q, k, v), at_q, at_k, out, logs)


def _attend_backward(settings: _Settings, saved: tuple[Any, ...], grad: jax.Array) -> tuple[Any, ...]:
    operands, at_q, at_k, out, logs = saved
    return (*pull_back(settings.plan, settings.tiles, operands, at_q, at_k, out, logs, grad), None, None)


_attend.defvjp(_attend_forward, _attend_backward)
