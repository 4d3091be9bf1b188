"""The programs for GPUs: for every kernel a few shapes, a ragged one among them, in each dtype.

Dimensions: B batch, T query, S key, N heads, K kv heads, H head dim; R rows, D contraction, F outputs, g positions that
share a scale, V outputs that choose together.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hsai_kernels.aot.cache_cases import list_caches
from hsai_kernels.aot.case import DTYPES, Case
from hsai_kernels.dispatch import compile_for
from hsai_kernels.ops.attention.api import attention
from hsai_kernels.ops.attention.gpu import choose_tiles
from hsai_kernels.ops.attention.gpu_backward import pull_back_keys, pull_back_rows
from hsai_kernels.ops.attention.gpu_blocks import Marks, Plan
from hsai_kernels.ops.quantized_matmul.api import quantized_matmul
from hsai_kernels.ops.sparse_matmul.api import sparse_matmul
from hsai_kernels.ops.sparse_matmul.reference import POSITION_BITS
from hsai_kernels.tuning import Use, record_tiles, use_tiles


def _list_attention() -> Iterator[Case]:
    """Each kernel with its own tile: the forward one as the API calls it."""
    # B, T, S, N, K, H
    shapes: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
        ("head dim 64", (2, 1024, 1024, 4, 2, 64), {}),
        ("ragged, head dim 80, window, softcap, segments", (1, 500, 700, 6, 2, 80), {"window": 300, "softcap": 30.0}),
        ("head dim 128", (1, 1024, 1024, 4, 1, 128), {}),
        ("head dim 256", (1, 1024, 1024, 2, 2, 256), {}),
        ("decoding, split keys", (2, 1, 5000, 8, 2, 128), {}),
    )
    for (name, shape, options), dtype in itertools.product(shapes, DTYPES):
        batch, queries, keys, heads, kv_heads, head_dim = shape
        q = jax.ShapeDtypeStruct((batch, queries, heads, head_dim), dtype)
        k = jax.ShapeDtypeStruct((batch, keys, kv_heads, head_dim), dtype)
        marks = tuple(jax.ShapeDtypeStruct((batch, length), jnp.int32) for length in (queries, keys))
        at_q, at_k = ((mark,) * (2 if options else 1) for mark in marks)
        forward = functools.partial(_attend, options)
        quick = name.startswith("ragged")
        yield Case(
            kernel="attention forward",
            name=name,
            dtype=dtype,
            function=forward,
            operands=(q, k, k, at_q, at_k),
            quick=quick,
        )
        if queries == 1:
            continue
        plan = Plan(
            batch=batch,
            queries=queries,
            keys=keys,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=options.get("window"),
            softcap=options.get("softcap"),
            scale=head_dim**-0.5,
            interpret=False,
        )
        rows = jax.ShapeDtypeStruct((batch, queries * heads, head_dim), dtype)
        vector = jax.ShapeDtypeStruct(rows.shape[:2], jnp.float32)
        arrays = (rows, rows, vector, vector, k, k)
        for kernel in ("d_rows", "d_keys"):
            yield Case(
                kernel=f"attention {kernel}",
                name=name,
                dtype=dtype,
                function=functools.partial(_pull_back, plan, kernel),
                operands=(arrays, at_q, at_k),
                quick=quick,
            )
    yield from list_caches("gpu", "decoding, split keys", 5000)
    for length in (4096, 8192):
        q = jax.ShapeDtypeStruct((1, length, 4, 64), "bfloat16")
        k = jax.ShapeDtypeStruct((1, length, 2, 64), "bfloat16")
        at = (jax.ShapeDtypeStruct((1, length), jnp.int32),)
        gradient = jax.grad(lambda *operands: jnp.sum(_attend({}, *operands)), argnums=(0, 1, 2))
        yield Case(
            kernel="attention gradient",
            name=f"length {length}",
            dtype="bfloat16",
            function=gradient,
            operands=(q, k, k, at, at),
        )


def _pull_back(plan: Plan, kernel: str, arrays: tuple[jax.Array, ...], at_q: Marks, at_k: Marks) -> Any:
    tile = choose_tiles(plan.rows, plan.keys, plan.head_dim, arrays[0].dtype)[kernel]
    return {"d_rows": pull_back_rows, "d_keys": pull_back_keys}[kernel](plan, tile, arrays, at_q, at_k)


def _attend(options: dict[str, Any], q: jax.Array, k: jax.Array, v: jax.Array, at_q: Marks, at_k: Marks) -> jax.Array:
    marks: dict[str, Any] = dict(zip(("q_positions", "q_segments"), at_q, strict=False))
    marks |= dict(zip(("kv_positions", "kv_segments"), at_k, strict=False))
    return attention(q, k, v, **marks, **options, implementation="gpu")


# R, D, F, and positions that share a scale.
PRODUCTS: tuple[tuple[str, tuple[int, int, int, int]], ...] = (
    ("decoding, groups of 32", (1, 4096, 4096, 32)),
    ("prefill, groups of 128", (512, 4096, 4096, 128)),
    ("prefill, groups of 32", (512, 4096, 4096, 32)),
)


def _list_quantized_matmul() -> Iterator[Case]:
    """With scales of the dtypes that hsai's formats store."""
    shapes = (*PRODUCTS, ("ragged, groups of 8", (37, 520, 1001, 8)))
    for (name, (rows, contraction, columns, group)), dtype, bits in itertools.product(shapes, DTYPES, (8, 4)):
        values, scale = (
            (((contraction, columns), "int8"), "float32")
            if bits == 8
            else (((contraction // 8, columns), "uint32"), "bfloat16")
        )
        yield Case(
            kernel=f"quantized_matmul int{bits}",
            name=name,
            dtype=dtype,
            function=functools.partial(quantized_matmul, implementation="gpu"),
            operands=_list_operands(((rows, contraction), dtype), values, ((contraction // group, columns), scale)),
            quick=name.startswith("ragged"),
        )
    for dtype in DTYPES:
        each = ((128, 4096), "float16")
        yield Case(
            kernel="quantized_matmul int4",
            name="decoding, groups of 32, from a minimum",
            dtype=dtype,
            function=functools.partial(quantized_matmul, implementation="gpu"),
            operands=_list_operands(((1, 4096), dtype), ((512, 4096), "uint32"), each, each),
        )
    shapes = (
        *PRODUCTS,
        ("decoding, a scale a column", (1, 4096, 4096, 4096)),
        ("prefill, a scale a column", (512, 4096, 4096, 4096)),
        ("ragged, groups of 40", (37, 480, 1001, 40)),
        ("ragged, a scale a column", (200, 992, 1001, 992)),
    )
    kinds = ((8, False), (4, False), (3, True), (2, False))
    for (name, (rows, contraction, columns, group)), dtype, (bits, centered) in itertools.product(
        shapes, DTYPES, kinds
    ):
        if bits < 4 and not name.startswith("decoding, groups"):
            continue
        values, scale = (
            (((contraction, columns), "int8"), "float32")
            if bits == 8
            else (((contraction * bits // 32, columns), "uint32"), "bfloat16")
        )
        options: dict[str, Any] = {} if bits == 8 else {"bits": bits, "centered": centered}
        yield Case(
            kernel=f"quantized_matmul int{bits}, rounded activations",
            name=name,
            dtype=dtype,
            function=functools.partial(quantized_matmul, **options, activation_bits=8, implementation="gpu"),
            operands=_list_operands(((rows, contraction), dtype), values, ((contraction // group, columns), scale)),
            quick=name.startswith("ragged") or bits < 4,
        )


VALUES = ("int4", *DTYPES)
"""What sparse weights keep."""


def _list_sparse_matmul() -> Iterator[Case]:
    """With scales of the dtype that hsai's formats store."""
    shapes = (
        *PRODUCTS,
        ("ragged, one scale a column", (37, 704, 1001, 704)),
        ("ragged, groups of 64", (37, 768, 1001, 64)),
    )
    kinds = (*((n, 4, values) for values in VALUES for n in (1, 2, 3)), *((4, 8, values) for values in VALUES))
    deep = ((1, 8, "int4"), (2, 8, "int4"))
    """Their positions fill whole words of 32 bits in contractions of a multiple of 256 and 128 only."""
    for (name, (rows, contraction, columns, group)), dtype, (n, m, held) in itertools.product(
        shapes, DTYPES, (*kinds, *deep)
    ):
        if ((n, m, held) in deep) != (contraction == 768) or ((n, m) != (2, 4) and not name.startswith("ragged")):
            continue
        kept = contraction * n // m
        indices = ((kept * POSITION_BITS[m] // 32, columns), jnp.uint32)
        scale = [((contraction // group, columns), jnp.bfloat16)] if held == "int4" else []
        yield Case(
            kernel=f"sparse_matmul {n}:{m} {held}",
            name=name,
            dtype=dtype,
            function=functools.partial(sparse_matmul, n=n, m=m, implementation="gpu"),
            operands=_list_operands(
                ((rows, contraction), dtype), _describe_values(held, kept, columns), indices, *scale
            ),
            quick=name.startswith("ragged"),
        )


def _describe_values(held: str, kept: int, columns: int) -> tuple[tuple[int, int], str]:
    """Shape and dtype of what a sparse weight keeps."""
    return ((kept // 8, columns), "uint32") if held == "int4" else ((kept, columns), held)


def _list_blocked() -> Iterator[Case]:
    """sparse_matmul by V:N:M weights, with scales of the dtype that hsai's formats store."""
    # V, n, m, R, D, F, g
    shapes: tuple[tuple[str, tuple[int, int, int, int, int, int, int]], ...] = (
        ("decoding, V 64, groups of 64", (64, 2, 8, 1, 4096, 4096, 64)),
        ("decoding, V 128, groups of 128", (128, 2, 16, 8, 4096, 4096, 128)),
        ("prefill, V 64, groups of 64", (64, 2, 8, 512, 4096, 4096, 64)),
        ("prefill, V 128, groups of 128", (128, 2, 8, 512, 4096, 4096, 128)),
        ("prefill, V 128, groups of 32", (128, 2, 16, 512, 4096, 4096, 32)),
        ("ragged, V 48, groups of 64", (48, 1, 8, 37, 768, 1008, 64)),
        ("ragged, V 144, groups of 48", (144, 3, 16, 37, 768, 1008, 48)),
        ("ragged, V 16, one scale a column", (16, 2, 32, 37, 768, 1008, 768)),
    )
    for (name, (v, n, m, rows, contraction, columns, group)), dtype, held in itertools.product(shapes, DTYPES, VALUES):
        kept = contraction * n // m
        indices, choices = ((kept // 16, columns), jnp.uint32), ((contraction // 32, columns // v), jnp.uint32)
        x, *weight = _list_operands(
            ((rows, contraction), dtype), _describe_values(held, kept, columns), indices, choices
        )
        scale = jax.ShapeDtypeStruct((contraction // group, columns), jnp.bfloat16) if held == "int4" else None
        yield Case(
            kernel=f"sparse_matmul V:{n}:{m} {held}",
            name=name,
            dtype=dtype,
            function=functools.partial(sparse_matmul, n=n, m=m, implementation="gpu"),
            operands=(x, *weight[:2], scale, weight[2]),
            quick=rows < 64,
        )


def _list_operands(*arrays: tuple[tuple[int, ...], Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays)


LARGER = "twice the "
"""In the names of cases whose tile is not the kernel's own."""
TRAINING = ("head dim 64", "head dim 128", "head dim 256", "prefill, groups of 32", "prefill, a scale a column")
"""Names of the cases of which there are such."""


def _with_larger_tiles(list_cases: Callable[[], Iterator[Case]]) -> Iterator[Case]:
    """The cases, and of some in bfloat16 those with one side of the tile doubled, as tuning would try it."""
    larger = []
    for case in list_cases():
        yield case
        training = case.name in TRAINING
        if training and case.dtype == "bfloat16" and not case.kernel.startswith("attention d_"):
            larger.append(case)
    for case in larger:
        own = _find_tile(case)
        for side in sorted(own.asked.keys() - {"warps", "stages"}):
            tiles = {own.key: {**own.asked, side: 2 * own.asked[side]}}
            doubled = dataclasses.replace(case, name=f"{case.name}; {LARGER}{side}", tiles=tiles)
            # What the call has no use for is cut off again, as blocks of more than a group are.
            if _find_tile(doubled).tile != own.tile:
                yield doubled


def _find_tile(case: Case) -> Use:
    """The tile that the case's kernel asks for."""
    with compile_for("gpu"), use_tiles(case.tiles), record_tiles() as used:
        # By a function of its own: what jax has traced before would record nothing.
        jax.eval_shape(functools.partial(case.function), *case.operands)
    return next(use for use in used if use.kernel == case.kernel)


LISTS: Mapping[str, Callable[[], Iterator[Case]]] = {
    "attention": functools.partial(_with_larger_tiles, _list_attention),
    "quantized_matmul": functools.partial(_with_larger_tiles, _list_quantized_matmul),
    "sparse_matmul": lambda: itertools.chain(_with_larger_tiles(_list_sparse_matmul), _list_blocked()),
}
"""Every API that has GPU kernels, and its cases."""
