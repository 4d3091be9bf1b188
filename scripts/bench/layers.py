"""What else a model is made of: the training loss, fused layers, and rotary embedding.

Dimensions: T tokens, D embed, F ffn or outputs, V vocabulary, N heads, H head dim.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.activations import find_dtype, name_case
from bench.programs import draw, make_runner
from bench.timing import Case
from hsai.models.rope import RopeConfig, make_rotation
from hsai_kernels import cross_entropy_sum, gated_mlp, norm_matmul, rope

LAYERS = ((128, 256, 512), (512, 2048, 5632))
"""T, D, F: a small one, and TinyLlama-1.1B's."""


def make_cross_entropy(*, quick: bool) -> Iterator[Case]:
    """The training loss and its gradients: 3 products of tokens, embedding and vocabulary."""
    tokens, embed, vocab = (512, 256, 8192) if quick else (1024, 576, 49152)
    x, w, weights = draw((tokens, embed), (embed, vocab), (tokens,))
    # As in training, where the weight is rounded to the activations' dtype before it comes here.
    x, w = x.astype(find_dtype()), (w * embed**-0.5).astype(find_dtype())
    targets = jnp.asarray(np.random.default_rng(3).integers(0, vocab, tokens), jnp.int32)

    def lose(implementation: str | None, x: jax.Array, w: jax.Array) -> Any:
        loss = functools.partial(cross_entropy_sum, targets=targets, weights=weights, implementation=implementation)
        return jax.value_and_grad(loss, (0, 1))(x, w)

    def lose_xla(x: jax.Array, w: jax.Array) -> Any:
        def loss(x: jax.Array, w: jax.Array) -> jax.Array:
            logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
            picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
            return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=1) - picked))

        return jax.value_and_grad(loss, (0, 1))(x, w)

    yield Case(
        name=name_case(f"cross_entropy {tokens} tokens {embed}x{vocab}"),
        nbytes=2 * (x.nbytes + w.nbytes),
        flops=6 * tokens * embed * vocab,
        metric="GFLOP/s",
        ours=make_runner("ours", functools.partial(lose, None), (x, w)),
        peers=[
            make_runner("xla", lose_xla, (x, w), disturbs=True),
            make_runner("reference", functools.partial(lose, "reference"), (x, w), disturbs=True),
        ],
    )


def make_gated_mlp(*, quick: bool) -> Iterator[Case]:
    """The feed-forward block. The reference is XLA's own: three products, and what stands between them fused."""
    for tokens, embed, ffn in LAYERS[: 1 if quick else 2]:
        x, gate, up, down = _draw_layer((tokens, embed), (embed, ffn), (embed, ffn), (ffn, embed))

        def run(implementation: str | None, *operands: jax.Array) -> jax.Array:
            return gated_mlp(*operands, implementation=implementation)

        yield _make_case(f"gated_mlp {tokens} tokens {embed}x{ffn}", run, (x, gate, up, down), 6 * tokens * embed * ffn)


def make_norm_matmul(*, quick: bool) -> Iterator[Case]:
    """Queries, keys and values of normalized tokens. The reference is XLA's own."""
    for (tokens, embed, _), columns in zip(LAYERS[: 1 if quick else 2], (512, 2560), strict=False):
        x, gain, w = _draw_layer((tokens, embed), (embed,), (embed, columns))

        def run(implementation: str | None, *operands: jax.Array) -> jax.Array:
            return norm_matmul(*operands, eps=1e-5, implementation=implementation)

        yield _make_case(
            f"norm_matmul {tokens} tokens {embed}x{columns}", run, (x, gain, w), 2 * tokens * embed * columns
        )


def make_rope(*, quick: bool) -> Iterator[Case]:
    """The rotation of queries, alone, as it is in no model: XLA fuses it with its neighbours.

    The peer is transformers' way to write it: x * cos + rotate_half(x) * sin.
    """
    for batch, tokens, heads, head_dim in ((1, 128, 4, 64), (4, 2048, 32, 64))[: 1 if quick else 2]:
        (x,) = _draw_layer((batch, tokens, heads, head_dim))
        at = jnp.tile(jnp.arange(tokens, dtype=jnp.int32), (batch, 1))
        cos, sin = make_rotation(at, RopeConfig(), head_dim)

        def rotate_half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
            wide, cos, sin = x.astype(jnp.float32), jnp.tile(cos, 2), jnp.tile(sin, 2)
            first, second = jnp.split(wide, 2, axis=-1)
            return (wide * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)

        yield Case(
            name=name_case(f"rope {batch}x{tokens} tokens {heads} heads of {head_dim}"),
            nbytes=2 * x.nbytes + cos.nbytes + sin.nbytes,
            flops=3 * x.size,
            metric="GB/s",
            ours=make_runner("ours", rope, (x, cos, sin)),
            peers=[make_runner("xla rotate_half", rotate_half, (x, cos, sin))],
        )


def _draw_layer(*shapes: tuple[int, ...]) -> list[jax.Array]:
    """Operands in the activations' dtype, of a size that keeps that of activations."""
    return [(array * array.shape[0] ** -0.5).astype(find_dtype()) for array in draw(*shapes)]


def _make_case(name: str, run: Callable[..., jax.Array], operands: Sequence[jax.Array], flops: int) -> Case:
    """Of a layer that arithmetic bounds, beside its reference."""
    return Case(
        name=name_case(name),
        nbytes=sum(array.nbytes for array in operands),
        flops=flops,
        metric="GFLOP/s",
        ours=make_runner("ours", functools.partial(run, None), operands),
        peers=[make_runner("reference", functools.partial(run, "reference"), operands)],
    )
