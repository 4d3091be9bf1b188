"""The cases: products in every weight format, attention, and the training loss, at shapes of models of 1 to 8 billion.

Weights come in as many copies as fill the last-level cache twice, and are taken in turn, so that none is ever read from
the cache: as while decoding, where each layer has its own. All copies are multiplied by in one compiled program, whose
products depend on one another, so that neither calls from Python nor products side by side blur the time.

Dimensions: B batch, T query, S key, N heads, K kv heads, H head dim, D contraction, F outputs, V vocabulary.
"""

import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import peers
from bench.ceilings import find_cache_size
from bench.timing import Case, Runner
from hsai.formats import (
    NM,
    VNM,
    FormatConfig,
    Int2,
    Int2Config,
    Int3,
    Int3Config,
    Int4,
    Int4Config,
    Int8,
    Int8Config,
    NMInt4,
    NMInt4Config,
    NMInt8,
    NMInt8Config,
    Packed,
    Ternary,
    TernaryConfig,
    VNMInt4,
    VNMInt4Config,
    Weight,
    nbytes,
    project,
)
from hsai_kernels import attention, cross_entropy_sum, prefer, quantized_matmul, sparse_matmul

Multiply = Callable[[jax.Array, Weight], jax.Array]


def multiply_weight(x: jax.Array, w: Weight) -> jax.Array:
    return project(x, w, out_axes=(None, None))


def multiply_rounded(x: jax.Array, w: Int8 | Int4 | Int3 | Int2 | Ternary | NMInt8 | NMInt4 | VNMInt4) -> jax.Array:
    """Activations are rounded to 8 bits as they come, as llama.cpp and ONNX Runtime do."""
    match w:
        case Int8(values, scale):
            return quantized_matmul(x, values, scale, activation_bits=8)
        case Int4(words, scale) | Int3(words, scale) | Int2(words, scale):
            return quantized_matmul(x, words, scale, bits=w.bits, centered=w.centered, activation_bits=8)
        case Ternary(words, scale):
            return quantized_matmul(x, words, scale, bits=2, activation_bits=8)
        case NMInt8(values, indices, scale, n, m) | NMInt4(values, indices, scale, n, m):
            return sparse_matmul(x, values, indices, scale, n=n, m=m, activation_bits=8)
        case VNMInt4(words, indices, scale, choices, n, m):
            return sparse_matmul(x, words, indices, scale, choices, n=n, m=m, activation_bits=8)


FORMATS: list[tuple[str, Any, Multiply]] = [
    *((config.format, config, multiply_weight) for config in (make() for make in typing.get_args(FormatConfig))),
    ("int8 x int8", Int8Config(), multiply_rounded),
    ("int8 x int4", Int4Config(), multiply_rounded),
    ("int8 x int3", Int3Config(), multiply_rounded),
    ("int8 x int2", Int2Config(), multiply_rounded),
    ("int8 x ternary", TernaryConfig(), multiply_rounded),
    ("nm_int4 4:8", NMInt4Config(n=4, m=8), multiply_weight),
    ("nm_int4 2:8", NMInt4Config(n=2, m=8), multiply_weight),
    ("int8 x nm_int8", NMInt8Config(), multiply_rounded),
    ("int8 x nm_int4", NMInt4Config(), multiply_rounded),
    ("int8 x vnm_int4", VNMInt4Config(), multiply_rounded),
]
"""Each weight format as it is by default, and what else the kernels multiply by."""

SHAPES = ((2048, 5632), (4096, 4096), (4096, 14336))
"""(D, F)."""

DECODE_ROWS = 8
"""Up to here a product waits for its weight; beyond, for arithmetic."""


def make_products(rows: Sequence[int], *, quick: bool) -> Iterator[Case]:
    """x (R, D) @ w (D, F) in all formats: bound by reading the weight for few rows, by arithmetic for many."""
    for contraction, columns in SHAPES[:1] if quick else SHAPES:
        draw = np.random.default_rng(0).standard_normal((contraction, columns), np.float32)
        dense = jnp.asarray(draw * contraction**-0.5)
        for name, config, multiply in FORMATS:
            weight = config.pack(dense)
            for count in rows:
                yield _make_product(name, multiply, weight, dense, count)


def _make_product(name: str, multiply: Multiply, weight: Weight, dense: jax.Array, rows: int) -> Case:
    contraction, columns = dense.shape
    ours = _chain("ours", rows, weight, multiply)
    others = [_chain("xla float32", rows, dense, multiply_weight)]
    if isinstance(weight, Packed):
        others.append(_chain("reference", rows, weight, _prefer_reference(multiply), most=1, disturbs=True))
    if isinstance(weight, NM | NMInt8 | NMInt4 | VNM | VNMInt4):
        # With activations as ours has them, and a scale for as many positions.
        group = contraction // weight.scale.shape[0] if isinstance(weight, NMInt4 | VNMInt4) else Int4Config().group
        others.append(_chain("our int4", rows, Int4Config(group=group).pack(dense), multiply))
    # The peer of every packed format: that of 8 bits for int8, else that of 4.
    if isinstance(weight, Packed) and peers.find_absent(peers.ONNX) is None:
        make, width = (peers.make_int8_peer, 8) if isinstance(weight, Int8) else (peers.make_int4_peer, 4)
        others.append(make(rows, contraction, columns, _count_copies(contraction * columns * width // 8, rows)))
    return Case(
        name=f"{name} {rows}x{contraction}x{columns}",
        nbytes=nbytes(weight),
        flops=2 * rows * contraction * columns,
        metric="GB/s" if rows <= DECODE_ROWS else "GFLOP/s",
        integer=multiplies_integers(weight),
        ours=ours,
        peers=others,
    )


def multiplies_integers(weight: Weight) -> bool:
    """Whether our product with it is one of integers: on a CPU, activations are split into bytes for those formats."""
    codes = Int8 | Int4 | Int3 | Int2 | Ternary | NMInt8 | NMInt4 | VNMInt4
    return jax.default_backend() == "cpu" and isinstance(weight, codes)


def _prefer_reference(multiply: Multiply) -> Multiply:
    def multiply_as_reference(x: jax.Array, w: Weight) -> jax.Array:
        with prefer("reference"):
            return multiply(x, w)

    return multiply_as_reference


def _count_copies(size: int, rows: int) -> int:
    """How many weights of `size` bytes fill the last-level cache twice; few for many rows, which wait for no memory."""
    copies = -(-2 * find_cache_size() // size)
    return copies if rows <= DECODE_ROWS else min(copies, 2)


def _chain(
    name: str, rows: int, weight: Weight, multiply: Multiply, *, most: int | None = None, disturbs: bool = False
) -> Runner:
    """x times each of the copies of a weight."""
    copies = most or _count_copies(nbytes(weight), rows)

    def build() -> Callable[[], object]:
        return chain_products(rows, [jax.tree.map(lambda leaf: leaf.copy(), weight) for _ in range(copies)], multiply)

    return Runner(name=name, build=build, times=copies, disturbs=disturbs)


def chain_products(rows: int, weights: Sequence[Weight], multiply: Multiply) -> Callable[[], object]:
    """x (R, D) times each of `weights` (D, F) in one compiled program: a little of each result is added to the next x.

    The x of each D is its own, and whatever follows one product in time waits for it, of whatever shape it is.
    """
    rng = np.random.default_rng(1)
    inputs = {d: jnp.asarray(rng.standard_normal((rows, d)), jnp.float32) for d in {w.shape[0] for w in weights}}

    @jax.jit
    def program(inputs: dict[int, jax.Array], weights: Sequence[Weight]) -> jax.Array:
        total = jnp.zeros((rows, 1), jnp.float32)
        for weight in weights:
            total += 1e-30 * multiply(inputs[weight.shape[0]] + total, weight)[:, :1]
        return total

    compiled = program.lower(inputs, weights).compile()
    return lambda: compiled(inputs, weights).block_until_ready()


def _make_runner(
    name: str, function: Callable[..., Any], arguments: Sequence[Any], *, disturbs: bool = False
) -> Runner:
    def build() -> Callable[[], object]:
        compiled = jax.jit(function).lower(*arguments).compile()
        return lambda: jax.block_until_ready(compiled(*arguments))

    return Runner(name=name, build=build, disturbs=disturbs)


def _draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(2)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def make_attention(*, quick: bool) -> Iterator[Case]:
    """Training on rows of 2048 tokens, forward and backward; decoding and prefill over caches of each type."""
    heads, kv_heads, head_dim = (4, 2, 64) if quick else (16, 4, 64)
    length = 1024 if quick else 2048
    operands = _draw((1, length, heads, head_dim), *[(1, length, kv_heads, head_dim)] * 2)
    at = jnp.arange(length, dtype=jnp.int32)[None]

    def train(implementation: str | None, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out = attention(q, k, v, q_positions=at, kv_positions=at, implementation=implementation)
            return jnp.sum(jnp.square(out))

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    yield Case(
        name=f"attention train {length} tokens {heads}/{kv_heads} heads",
        nbytes=sum(array.nbytes for array in operands),
        # 2 products forward and 5 backward (FlashAttention-2, 2307.08691, section 4.1), of which causality halves each.
        flops=7 * heads * length**2 * head_dim,
        metric="GFLOP/s",
        ours=_make_runner("ours", functools.partial(train, None), operands),
        peers=[_make_runner("reference", functools.partial(train, "reference"), operands, disturbs=True)],
    )

    # Queries that follow one another at the end of a cache which they fill: one of 4 rows, and a prompt of 512 tokens.
    for batch, queries, slots in ((1 if quick else 4, 1, 4096), (1, 512, 512)):
        for cache in ("float32", "bfloat16", "int8"):
            yield _make_forward(cache, batch, queries, slots)


def _make_forward(cache: str, batch: int, queries: int, slots: int, heads: int = 32, kv_heads: int = 8) -> Case:
    """Decoding or prefill of float32 queries of head dim 128, over a cache of some type."""
    head_dim = 128
    q, *parts = _draw((batch, queries, heads, head_dim), *[(batch, slots, kv_heads, head_dim)] * 2)
    operands: dict[str, jax.Array] = {}
    for name, part in zip("kv", parts, strict=True):
        if cache == "int8":
            scale = jnp.max(jnp.abs(part), axis=-1) / 127.0
            codes = jnp.round(part / scale[..., None]).astype(jnp.int8)
            operands |= {name: codes, f"{name}_scale": scale}
        else:
            operands[name] = part.astype(cache)
    at = jnp.tile(jnp.arange(slots), (batch, 1))
    marks = {"q_positions": at[:, slots - queries :], "kv_positions": at}
    seen = sum(slots - queries + 1 + i for i in range(queries))

    def attend(implementation: str | None, q: jax.Array, operands: dict[str, jax.Array]) -> jax.Array:
        return attention(q, **operands, **marks, implementation=implementation)

    return Case(
        name=f"attention {cache} {batch}x{queries} of {slots} slots {heads}/{kv_heads} heads",
        nbytes=sum(array.nbytes for array in operands.values()),
        flops=4 * batch * heads * seen * head_dim,
        metric="GB/s" if queries == 1 else "GFLOP/s",
        ours=_make_runner("ours", functools.partial(attend, None), (q, operands)),
        # The chunked path is the reference where all scores fit one of its blocks, as they do here.
        peers=[_make_runner("reference", functools.partial(attend, "reference"), (q, operands), disturbs=True)],
    )


def make_cross_entropy(*, quick: bool) -> Iterator[Case]:
    """The training loss and its gradients: 3 products of tokens, embedding and vocabulary."""
    tokens, embed, vocab = (512, 256, 8192) if quick else (1024, 576, 49152)
    x, w, weights = _draw((tokens, embed), (embed, vocab), (tokens,))
    targets = jnp.asarray(np.random.default_rng(3).integers(0, vocab, tokens), jnp.int32)

    def lose(implementation: str | None, x: jax.Array, w: jax.Array) -> Any:
        loss = functools.partial(cross_entropy_sum, targets=targets, weights=weights, implementation=implementation)
        return jax.value_and_grad(loss, (0, 1))(x, w)

    yield Case(
        name=f"cross_entropy {tokens} tokens {embed}x{vocab}",
        nbytes=2 * (x.nbytes + w.nbytes),
        flops=6 * tokens * embed * vocab,
        metric="GFLOP/s",
        ours=_make_runner("ours", functools.partial(lose, None), (x, w * embed**-0.5)),
        peers=[_make_runner("reference", functools.partial(lose, "reference"), (x, w * embed**-0.5), disturbs=True)],
    )
