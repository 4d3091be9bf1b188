"""The weighted sum of cross-entropies in plain jax, whose gradient is made in the forward pass, while logits are there.

A sum has one number of gradient from behind, which scales what was made before it was known (Hsu et al., Liger Kernel,
2410.10989): 3 products, as if all logits had been kept, where `chunked.py` makes 4. What is kept instead
are the gradients themselves, as large as x and w; training would hold them a moment later anyway. Without
differentiation nothing of this happens: then it is the sum of `chunked.py`'s losses.

Dimensions: B leading dimensions, T tokens, D embed, V vocabulary, C tokens a block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from hsai_kernels.ops.cross_entropy.chunked import BLOCK_TOKENS, WIDE, cross_entropy_chunked, join_tokens, split_tokens
from hsai_kernels.ops.cross_entropy.vocabulary import ELSEWHERE, Split, add_parts, find_own, join_parts
from hsai_kernels.tuning import choose_tile

Operands = tuple[jax.Array, jax.Array, jax.Array]
"""Gradients of x, w and weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is fixed when the program is traced."""

    softcap: float | None
    z_loss: float
    chunk: int
    split: Split


def cross_entropy_sum_chunked(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    softcap: float | None,
    z_loss: float,
    chunk: int | None,
    split: Split = (),
) -> jax.Array:
    """float32 scalar; arguments as in api.py, already validated, targets in [0, V)."""
    if 0 in x.shape:
        return jnp.zeros((), jnp.float32)
    tokens, embed = x.shape[-2:]
    tile = choose_tile(
        "cross_entropy_sum chunked",
        dtype=x.dtype,
        shape=f"D {embed}",
        own={"tokens": BLOCK_TOKENS},
        fit=lambda sides: {"tokens": min(sides["tokens"], tokens)},
    )
    options = Options(softcap=softcap, z_loss=z_loss, chunk=min(chunk or tile["tokens"], tokens), split=split)
    rows = (-1, tokens)
    return _compute(options, x.reshape(*rows, x.shape[-1]), w, targets.reshape(rows), weights.reshape(rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compute(options: Options, x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(weights * cross_entropy_chunked(x, w, targets, **dataclasses.asdict(options)))


def _forward(
    options: Options, x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, Operands]:
    """The sum, and its gradients."""
    rounded = w.astype(x.dtype)

    def read_tokens(d_w: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        hidden, targets, weights = block
        logits = jnp.einsum("bcd,dv->bcv", hidden, rounded, **WIDE)
        if options.softcap is not None:
            logits = options.softcap * jnp.tanh(logits / options.softcap)
        own = find_own(targets, w.shape[1], options.split)
        picked = jnp.take_along_axis(logits, jnp.maximum(own, 0)[..., None], axis=-1)[..., 0]
        picked = jnp.where(own == ELSEWHERE, 0.0, picked)
        log_sum, picked = join_parts(jax.nn.logsumexp(logits, axis=-1), picked, options.split)
        # d loss / d log_sum is one, and what z_loss adds.
        pull = weights * (1.0 + 2.0 * options.z_loss * log_sum)
        d_logits = jnp.exp(logits - log_sum[..., None]) * pull[..., None]
        d_logits -= jnp.where(jnp.arange(w.shape[1]) == own[..., None], weights[..., None], 0.0)
        if options.softcap is not None:
            d_logits *= 1.0 - jnp.square(logits / options.softcap)
        d_logits = d_logits.astype(x.dtype)
        d_hidden = add_parts(jnp.einsum("bcv,dv->bcd", d_logits, rounded, **WIDE), options.split)
        # (D, V), not (V, D) to be turned: on a CPU that takes a fifth of a training step.
        d_w += jnp.einsum("bcd,bcv->dv", hidden, d_logits, **WIDE)
        return d_w, (log_sum - picked + options.z_loss * jnp.square(log_sum), d_hidden.astype(x.dtype))

    blocks = tuple(split_tokens(array, options.chunk) for array in (x, targets, weights))
    d_w, (loss, d_x) = jax.lax.scan(read_tokens, jnp.zeros(w.shape, jnp.float32), blocks)
    loss = join_tokens(loss, x)
    return jnp.sum(weights * loss), (join_tokens(d_x, x), d_w.astype(w.dtype), loss)


def _backward(options: Options, saved: Operands, grad: jax.Array) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    d_x, d_w, loss = saved
    return (grad * d_x).astype(d_x.dtype), (grad * d_w).astype(d_w.dtype), None, grad * loss


_compute.defvjp(_forward, _backward)
