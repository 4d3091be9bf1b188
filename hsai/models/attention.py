"""Grouped-query attention with rotary positions, and an optional cache.

Families differ in biases, normalized queries and keys, the scale of the scores, and which layers see how far.

B batch, T query, S key, D embed, N heads, K kv heads, H head dim.
"""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from hsai.formats import project, project_all
from hsai.models.cache import LayerView
from hsai.models.heads import attend_heads
from hsai.models.layers import RMSNorm, declare
from hsai.models.rope import Rotation, rotate
from hsai.sharding import Axes, constrain

if TYPE_CHECKING:
    from hsai.models.transformer import TransformerConfig


class Attention(nnx.Module):
    """Projects to heads, attends, projects back. Heads are stored flat: q is (D, N * H)."""

    def __init__(self, config: "TransformerConfig", *, rngs: nnx.Rngs) -> None:
        c, d = config, config.embed
        std = d**-0.5
        self.q = declare(rngs, (d, c.heads * c.head_dim), ("embed", "heads"), std=std)
        self.k = declare(rngs, (d, c.kv_heads * c.head_dim), ("embed", "kv_heads"), std=std)
        self.v = declare(rngs, (d, c.kv_heads * c.head_dim), ("embed", "kv_heads"), std=std)
        # Each block adds two branches to the residual stream; narrower outputs keep its variance level over depth.
        out_std = (c.heads * c.head_dim * 2 * c.layers) ** -0.5
        self.o = declare(rngs, (c.heads * c.head_dim, d), ("heads", "embed"), std=out_std)

        def bias(axis: str, count: int) -> nnx.Param | None:
            zeros = jnp.zeros((count * c.head_dim,), jnp.float32)
            return nnx.Param(zeros, out_sharding=(axis,)) if c.qkv_bias else None

        def norm() -> RMSNorm | None:
            return RMSNorm(c.head_dim, c.norm_eps, axis="head_dim", plus_one=c.norm_plus_one) if c.qk_norm else None

        self.q_bias = bias("heads", c.heads)
        self.k_bias, self.v_bias = bias("kv_heads", c.kv_heads), bias("kv_heads", c.kv_heads)
        self.q_norm, self.k_norm = norm(), norm()
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        rotation: Rotation,
        segments: jax.Array | None,
        cache: LayerView | None,
        is_global: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerView | None]:
        """Attends from x to itself, or, with a cache, to everything in the cache after x was written to it.

        Args:
          x: (B, T, D).
          positions: (B, T) int32; a query sees keys at its own position and before.
          rotation: of the positions.
          segments: (B, T) int32 or None; a query sees keys of its own segment only.
          cache: where keys and values of earlier tokens are; excludes `segments`.
          is_global: a bool scalar, where layers differ: whether this one sees beyond the window.
        Returns: (B, T, D), and the cache with x written to it.
        """
        c = self.config
        batch, length, _ = x.shape

        def heads(flat: jax.Array, bias: nnx.Param | None, axis: str, count: int) -> jax.Array:
            if bias is not None:
                flat = flat + bias[...].astype(flat.dtype)
            # The flat axis may be cut inside a head, where there are fewer kv heads than devices; heads are whole.
            return constrain(flat.reshape(batch, length, count, c.head_dim), "batch", "seq", axis, "head_dim")

        weights = self.q.get_value(), self.k.get_value(), self.v.get_value()
        axes: list[Axes] = [("batch", "seq", axis) for axis in ("heads", "kv_heads", "kv_heads")]
        q, k, v = project_all(x, weights, out_axes=axes, in_axis="embed")
        q = heads(q, self.q_bias, "heads", c.heads)
        k, v = (heads(flat, bias, "kv_heads", c.kv_heads) for flat, bias in ((k, self.k_bias), (v, self.v_bias)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotation), rotate(k, rotation)
        scale = None if c.query_scalar is None else c.query_scalar**-0.5
        if cache is not None:
            cache = cache.write(k, v, positions)

        def attend(window: int | None, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            if cache is not None:
                return cache.attend(q, positions, window=window, scale=scale)
            return attend_heads(
                q,
                k,
                v,
                q_positions=positions,
                kv_positions=positions,
                q_segments=segments,
                kv_segments=segments,
                window=window,
                scale=scale,
            )

        if is_global is None:
            y = attend(c.sliding_window, q, k, v)
        else:  # both kinds of layer are compiled, each with a window that the kernels know; one of them runs
            kinds = (functools.partial(attend, window) for window in (None, c.sliding_window))
            y = jax.lax.cond(is_global, *kinds, q, k, v)
        y = y.reshape(batch, length, -1)
        return project(y, self.o.get_value(), out_axes=("batch", "seq", "embed"), in_axis="heads"), cache
