"""Products in every weight format, at shapes of models of 1 to 8 billion.

Weights come in as many copies as fill the last-level cache twice, and are taken in turn, so that none is ever read from
the cache: as while decoding, where each layer has its own. All copies are multiplied by in one compiled program, whose
products depend on one another, so that neither calls from Python nor products side by side blur the time.

Dimensions: R rows, D contraction, F outputs.
"""

import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from bench import peers
from bench.activations import find_dtype, name_case
from bench.programs import count_copies
from bench.timing import Case, Runner
from hsai.formats import (
    FormatConfig,
    Int2Config,
    Int3Config,
    Int4Config,
    Int4OffsetConfig,
    Int8,
    Int8Config,
    NMInt4,
    NMInt4Config,
    NMInt8Config,
    OutliersConfig,
    Packed,
    Rounded,
    Sparse,
    TernaryConfig,
    UnstructuredConfig,
    UnstructuredInt4Config,
    UnstructuredInt8Config,
    VNMInt4,
    VNMInt4Config,
    Weight,
    nbytes,
    project,
)
from hsai.formats.rounded import INTEGERS
from hsai_kernels import prefer
from hsai_kernels.dispatch import find_platform

Multiply = Callable[[jax.Array, Weight], jax.Array]


def multiply_weight(x: jax.Array, w: Weight, out_dtype: DTypeLike | None = None) -> jax.Array:
    return project(x, w, out_axes=(None, None), out_dtype=out_dtype)


def multiply_rounded(x: jax.Array, w: Weight, out_dtype: DTypeLike | None = None) -> jax.Array:
    """Activations are rounded to 8 bits as they come, as llama.cpp and ONNX Runtime do."""
    return multiply_weight(x, Rounded(w) if isinstance(w, Packed) else w, out_dtype)


FORMATS: list[tuple[str, Any, Callable[..., jax.Array]]] = [
    *(
        (config.format, config, multiply_weight)
        for config in (make() for make in typing.get_args(FormatConfig))
        # For others there is no kernel, or one of these.
        if not isinstance(config, OutliersConfig | UnstructuredConfig | UnstructuredInt8Config | UnstructuredInt4Config)
    ),
    ("int8 x int8", Int8Config(), multiply_rounded),
    ("int8 x int4", Int4Config(), multiply_rounded),
    ("int8 x int4_offset", Int4OffsetConfig(), multiply_rounded),
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

SHAPES = ((2048, 5632), (4096, 14336))
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
            if (contraction, columns) == SHAPES[0] and isinstance(weight, Packed) and find_dtype() != jnp.float32:
                # Kernels answer in their activations' dtype, so that a model's head has float32 ones, and tiles of its
                # own.
                logits = functools.partial(multiply, out_dtype=jnp.float32)
                yield _make_product(f"{name} to logits", logits, weight, dense, rows[0])


def _make_product(name: str, multiply: Multiply, weight: Weight, dense: jax.Array, rows: int) -> Case:
    contraction, columns = dense.shape
    ours = _chain("ours", rows, weight, multiply)
    others = [_chain(f"xla {find_dtype().name}", rows, dense.astype(find_dtype()), multiply_weight)]
    if isinstance(weight, Packed):
        others.append(_chain("reference", rows, weight, _prefer_reference(multiply), most=1, disturbs=True))
    if isinstance(weight, Sparse):
        # With activations as ours has them, and a scale for as many positions.
        group = contraction // weight.scale.shape[0] if isinstance(weight, NMInt4 | VNMInt4) else Int4Config().group
        others.append(_chain("our int4", rows, Int4Config(group=group).pack(dense), multiply))
    # The peer of every packed format: that of 8 bits for int8, else that of 4.
    if isinstance(weight, Packed) and peers.find_absent(peers.ONNX) is None:
        make, width = (peers.make_int8_peer, 8) if isinstance(weight, Int8) else (peers.make_int4_peer, 4)
        others.append(make(rows, contraction, columns, _count_copies(contraction * columns * width // 8, rows)))
    return Case(
        name=name_case(f"{name} {rows}x{contraction}x{columns}"),
        nbytes=nbytes(weight),
        flops=2 * rows * contraction * columns,
        metric="GB/s" if rows <= DECODE_ROWS else "GFLOP/s",
        integer=multiplies_integers(weight),
        ours=ours,
        peers=others,
    )


def multiplies_integers(weight: Weight) -> bool:
    """Whether our product with it is one of integers: on a CPU, activations are split into bytes for those formats."""
    return find_platform() == "cpu" and isinstance(weight, (Rounded, *INTEGERS))


def _prefer_reference(multiply: Multiply) -> Multiply:
    def multiply_as_reference(x: jax.Array, w: Weight) -> jax.Array:
        with prefer("reference"):
            return multiply(x, w)

    return multiply_as_reference


def _count_copies(size: int, rows: int) -> int:
    """How many weights of `size` bytes no cache holds; few for many rows, which wait for no memory."""
    copies = count_copies(size)
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
    rng, dtype = np.random.default_rng(1), find_dtype()
    inputs = {d: jnp.asarray(rng.standard_normal((rows, d)), dtype) for d in {w.shape[0] for w in weights}}

    @jax.jit
    def program(inputs: dict[int, jax.Array], weights: Sequence[Weight]) -> jax.Array:
        total = jnp.zeros((rows, 1), jnp.float32)
        for weight in weights:
            total += 1e-30 * multiply(inputs[weight.shape[0]] + total.astype(dtype), weight)[:, :1]
        return total

    compiled = program.lower(inputs, weights).compile()
    return lambda: compiled(inputs, weights).block_until_ready()
