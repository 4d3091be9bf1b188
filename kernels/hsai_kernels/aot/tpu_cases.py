"""The programs for TPUs: for every kernel a few shapes, a ragged one among them, in each dtype.

Dimensions: B batch, T query, S key, N heads, K kv heads, H head dim; R rows, D embed or contraction,
F ffn or outputs, V vocabulary or outputs that choose together, g positions that share a scale.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hsai_kernels.aot.cache_cases import list_caches
from hsai_kernels.aot.case import DTYPES, Case
from hsai_kernels.ops.attention.api import attention
from hsai_kernels.ops.cross_entropy.api import cross_entropy
from hsai_kernels.ops.gated_mlp.api import gated_mlp
from hsai_kernels.ops.norm_matmul.api import norm_matmul
from hsai_kernels.ops.quantized_matmul.api import quantized_matmul
from hsai_kernels.ops.sparse_matmul.api import sparse_matmul
from hsai_kernels.ops.sparse_matmul.reference import POSITION_BITS
from hsai_kernels.packing import count_elements


def _list_attention() -> Iterator[Case]:
    # B, T, S, N, K, H
    shapes: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
        ("ragged, head dim 80, window, softcap, segments", (1, 50, 77, 6, 2, 80), {"window": 30, "softcap": 30.0}),
        ("decoding, head dim 128", (2, 1, 4096, 8, 2, 128), {}),
        ("decoding, head dim 64", (2, 1, 1500, 15, 5, 64), {}),
        ("tiny", (1, 3, 3, 1, 1, 8), {}),
        ("head dim 64", (2, 1024, 1024, 4, 2, 64), {}),
        ("ragged blocks, head dim 80, segments", (1, 300, 1300, 4, 1, 80), {"segments": True}),
        ("head dim 128", (1, 2048, 2048, 8, 2, 128), {}),
        ("head dim 256", (1, 2048, 2048, 2, 2, 256), {"window": 512}),
    )
    for (name, shape, options), dtype in itertools.product(shapes, DTYPES):
        batch, queries, keys, heads, kv_heads, head_dim = shape
        options = dict(options)
        segments = options.pop("segments", len(options) > 1)
        q = jax.ShapeDtypeStruct((batch, queries, heads, head_dim), dtype)
        k = jax.ShapeDtypeStruct((batch, keys, kv_heads, head_dim), dtype)
        marks = tuple(jax.ShapeDtypeStruct((batch, length), jnp.int32) for length in (queries, keys))
        attend = functools.partial(_attend, options)
        passes: tuple[tuple[str, Callable[..., Any]], ...] = (
            ("attention forward", attend),
            ("attention backward", functools.partial(_pull_back, attend)),
        )
        for kernel, function in passes:
            if queries == 1 and kernel == "attention backward":
                continue
            yield Case(
                kernel=kernel,
                name=name,
                dtype=dtype,
                function=function,
                operands=(q, k, k, *marks * (2 if segments else 1)),
                quick=queries <= 64,
            )
    yield from list_caches("tpu", "decoding, head dim 128", 1500)


def _attend(options: dict[str, Any], q: jax.Array, k: jax.Array, v: jax.Array, *marks: jax.Array) -> jax.Array:
    names = ("q_positions", "kv_positions", "q_segments", "kv_segments")
    given: dict[str, Any] = dict(zip(names, marks, strict=False))
    return attention(q, k, v, **given, **options, implementation="tpu")


def _pull_back(attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, *marks: jax.Array) -> Any:
    """The gradients of q, k and v for some gradient of the output; XLA keeps of the forward pass what they need."""
    out, pull = jax.vjp(lambda *operands: attend(*operands, *marks), q, k, v)
    return pull(out)


def _list_cross_entropy() -> Iterator[Case]:
    # T, D, V
    shapes: tuple[tuple[str, tuple[int, int, int], dict[str, Any]], ...] = (
        ("ragged, softcap, z-loss", (40, 128, 300), {"softcap": 30.0, "z_loss": 1e-4}),
        ("D 1024, V 50257", (1000, 1024, 50257), {}),
        ("D 2048, V 32768", (2048, 2048, 32768), {}),
        ("D 4096, V 128256", (2048, 4096, 128256), {}),
        ("D 8192, V 128256, softcap", (2048, 8192, 128256), {"softcap": 30.0}),
    )
    for (name, (tokens, embed, vocab), options), dtype in itertools.product(shapes, DTYPES):
        x = jax.ShapeDtypeStruct((tokens, embed), dtype)
        w = jax.ShapeDtypeStruct((embed, vocab), jnp.float32)
        targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        lose = functools.partial(cross_entropy, **options, implementation="tpu")
        passes: tuple[tuple[str, Callable[..., Any]], ...] = (
            ("cross_entropy forward", lose),
            ("cross_entropy backward", functools.partial(_pull_back_loss, lose)),
        )
        for kernel, function in passes:
            yield Case(
                kernel=kernel,
                name=name,
                dtype=dtype,
                function=function,
                operands=(x, w, targets),
                quick=tokens <= 64,
            )


def _pull_back_loss(lose: Callable[..., jax.Array], x: jax.Array, w: jax.Array, targets: jax.Array) -> Any:
    """The gradients of x and w for some gradient of the loss."""
    loss, pull = jax.vjp(lambda x, w: lose(x, w, targets), x, w)
    return pull(loss)


def _list_layers(kernel: str) -> Iterator[Case]:
    """norm_matmul and gated_mlp."""
    # R, D, F
    shapes = (
        ("ragged", (20, 128, 300)),
        ("decoding, D 4096, F 14336", (1, 4096, 14336)),
        ("D 2048, F 5632", (300, 2048, 5632)),
        ("D 4096, F 14336", (2048, 4096, 14336)),
        ("D 8192, F 28672", (2048, 8192, 28672)),
    )
    for (name, (rows, embed, ffn)), dtype in itertools.product(shapes, DTYPES):
        x, w = jax.ShapeDtypeStruct((rows, embed), dtype), jax.ShapeDtypeStruct((embed, ffn), dtype)
        operands: tuple[Any, ...]
        if kernel == "norm_matmul":
            function = functools.partial(norm_matmul, eps=1e-5, implementation="tpu")
            operands = (x, jax.ShapeDtypeStruct((embed,), jnp.float32), w)
        else:
            function = functools.partial(gated_mlp, implementation="tpu")
            operands = (x, w, w, jax.ShapeDtypeStruct((ffn, embed), dtype))
        yield Case(
            kernel=kernel,
            name=name,
            dtype=dtype,
            function=function,
            operands=operands,
            quick=rows <= 64,
        )


def _list_quantized() -> Iterator[Case]:
    """With scales of the dtypes, and zero where, hsai's formats have them."""
    # R, D, F, g
    shapes: tuple[tuple[str, tuple[int, int, int, int]], ...] = (
        ("ragged", (5, 40, 65, 40)),
        ("ragged columns, two deep", (3, 1280, 200, 64)),
        ("decoding, groups of 32", (1, 2048, 5632, 32)),
        ("decoding, groups of 128", (8, 4096, 4096, 128)),
        ("decoding, a scale a column", (1, 576, 1536, 576)),
        ("prefill, groups of 32", (700, 2048, 1000, 32)),
        ("prefill, a scale a column", (512, 2048, 2048, 2048)),
    )
    for (name, (rows, depth, columns, group)), dtype in itertools.product(shapes, DTYPES):
        x = _shape(dtype, rows, depth)
        for kind, bits, values in (
            ("int8", 4, _shape("int8", depth, columns)),
            ("int4", 4, _shape("uint32", depth // 8, columns)),
            ("int3", 3, _shape("uint32", depth * 3 // 32, columns)),
            ("int2", 2, _shape("uint32", depth // 16, columns)),
        ):
            scale = _shape("float32" if kind == "int8" else "bfloat16", depth // group, columns)
            if values.dtype == jnp.uint32 and depth % count_elements(bits):
                continue
            yield Case(
                kernel=f"quantized_matmul {kind}",
                name=name,
                dtype=dtype,
                function=functools.partial(quantized_matmul, bits=bits, centered=bits < 4, implementation="tpu"),
                operands=(x, values, scale),
                quick=rows < 8,
            )
    for dtype in DTYPES:
        x, words, scale = _shape(dtype, 1, 2048), _shape("uint32", 256, 5632), _shape("float16", 64, 5632)
        yield Case(
            kernel="quantized_matmul int4",
            name="decoding, groups of 32, from a minimum",
            dtype=dtype,
            function=functools.partial(quantized_matmul, implementation="tpu"),
            operands=(x, words, scale, scale),
        )
        yield Case(
            kernel="quantized_matmul int2",
            name="decoding, groups of 64, ternary",
            dtype=dtype,
            function=functools.partial(quantized_matmul, bits=2, implementation="tpu"),
            operands=(x, _shape("uint32", 128, 5632), _shape("bfloat16", 32, 5632)),
        )
    yield from _list_rounded()


def _list_rounded() -> Iterator[Case]:
    """Activations rounded to int8: groups of whole pieces (tpu_rounded.py), smaller and ragged ones, and one."""
    # R, D, F, g
    shapes: tuple[tuple[str, tuple[int, int, int, int]], ...] = (
        ("ragged, groups of 40", (5, 480, 65, 40)),
        ("ragged columns, two deep, groups of 64", (3, 1280, 200, 64)),
        ("decoding, groups of 32", (1, 2048, 5632, 32)),
        ("decoding, groups of 128", (8, 4096, 4096, 128)),
        ("decoding, a scale a column", (1, 576, 1536, 576)),
        ("prefill, groups of 32", (700, 2048, 1000, 32)),
        ("prefill, groups of 128", (512, 4096, 4096, 128)),
        ("prefill, a scale a column", (512, 2048, 2048, 2048)),
    )
    kinds = (("int8", 4, False), ("int4", 4, False), ("int3", 3, True), ("int2", 2, False))
    for (name, (rows, depth, columns, group)), dtype, (kind, bits, centered) in itertools.product(
        shapes, DTYPES, kinds
    ):
        if bits < 4 and "64" not in name and name != "prefill, groups of 128":
            continue
        values = _shape("int8", depth, columns) if kind == "int8" else _shape("uint32", depth * bits // 32, columns)
        scale = _shape("float32" if kind == "int8" else "bfloat16", depth // group, columns)
        options: dict[str, Any] = {"bits": bits, "centered": centered, "activation_bits": 8}
        yield Case(
            kernel=f"quantized_matmul {kind}, rounded activations",
            name=name,
            dtype=dtype,
            function=functools.partial(quantized_matmul, **options, implementation="tpu"),
            operands=(_shape(dtype, rows, depth), values, scale),
            quick=rows < 8,
        )


def _list_sparse() -> Iterator[Case]:
    # n, m, R, D, F, g
    shapes: tuple[tuple[str, tuple[int, int, int, int, int, int]], ...] = (
        ("2:4, ragged, groups of 16", (2, 4, 5, 96, 65, 16)),
        ("3:4, ragged columns, two deep", (3, 4, 3, 1280, 200, 64)),
        ("1:4, decoding, groups of 32", (1, 4, 1, 2048, 5632, 32)),
        ("2:4, decoding, groups of 32", (2, 4, 1, 2048, 5632, 32)),
        ("2:4, decoding, groups of 128", (2, 4, 8, 4096, 4096, 128)),
        ("2:4, prefill, groups of 32", (2, 4, 700, 2048, 1000, 32)),
        ("2:4, prefill, a scale a column", (2, 4, 512, 2048, 2048, 2048)),
        ("4:8, ragged, groups of 64", (4, 8, 5, 192, 65, 64)),
        ("2:8, ragged columns, two deep", (2, 8, 3, 1280, 200, 128)),
        ("1:8, decoding, groups of 64", (1, 8, 1, 2048, 5632, 64)),
        ("4:8, decoding, groups of 64", (4, 8, 1, 2048, 5632, 64)),
        ("4:8, prefill, groups of 64", (4, 8, 700, 2048, 1000, 64)),
    )
    for (name, (n, m, rows, depth, columns, group)), dtype in itertools.product(shapes, DTYPES):
        kept = depth * n // m
        x, indices = _shape(dtype, rows, depth), _shape("uint32", kept * POSITION_BITS[m] // 32, columns)
        for kind, values, scale in (
            (dtype, _shape(dtype, kept, columns), None),
            ("int4", _shape("uint32", kept // 8, columns), _shape("bfloat16", depth // group, columns)),
        ):
            yield Case(
                kernel=f"sparse_matmul {n}:{m} {kind}",
                name=name,
                dtype=dtype,
                function=functools.partial(sparse_matmul, n=n, m=m, implementation="tpu"),
                operands=(x, values, indices) if scale is None else (x, values, indices, scale),
                quick=rows < 8 and (columns < 300 or n == 1),
            )


def _list_blocked() -> Iterator[Case]:
    """sparse_matmul by V:N:M weights."""
    # V, n, m, R, D, F, g
    shapes: tuple[tuple[str, tuple[int, int, int, int, int, int, int]], ...] = (
        ("ragged, V 48, groups of 64", (48, 1, 8, 5, 256, 240, 64)),
        ("ragged columns, V 80, two deep, groups of 80", (80, 3, 16, 3, 5120, 240, 80)),
        ("ragged columns, V 16, two deep", (16, 2, 32, 7, 5120, 208, 160)),
        ("decoding, V 64, groups of 64", (64, 2, 8, 1, 2048, 5632, 64)),
        ("decoding, V 128, groups of 128", (128, 2, 16, 8, 4096, 4096, 128)),
        ("decoding, V 32, a scale a column", (32, 2, 32, 1, 4096, 4096, 4096)),
        ("prefill, V 64, groups of 64", (64, 2, 8, 700, 2048, 1024, 64)),
        ("prefill, V 128, a scale a column", (128, 2, 16, 512, 2048, 2048, 2048)),
    )
    for (name, (v, n, m, rows, depth, columns, group)), dtype in itertools.product(shapes, DTYPES):
        kept = depth * n // m
        x, indices = _shape(dtype, rows, depth), _shape("uint32", kept // 16, columns)
        choices = _shape("uint32", depth // 32, columns // v)
        for kind, values, scale in (
            (dtype, _shape(dtype, kept, columns), None),
            ("int4", _shape("uint32", kept // 8, columns), _shape("bfloat16", depth // group, columns)),
        ):
            yield Case(
                kernel=f"sparse_matmul V:{n}:{m} {kind}",
                name=name,
                dtype=dtype,
                function=functools.partial(sparse_matmul, n=n, m=m, implementation="tpu"),
                operands=(x, values, indices, scale, choices),
                quick=name.startswith("ragged") or (rows <= 8 and v > 32),
            )


def _shape(dtype: str, *dimensions: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dimensions, dtype)


LISTS: Mapping[str, Callable[[], Iterator[Case]]] = {
    "attention": _list_attention,
    "cross_entropy": _list_cross_entropy,
    "gated_mlp": functools.partial(_list_layers, "gated_mlp"),
    "norm_matmul": functools.partial(_list_layers, "norm_matmul"),
    "quantized_matmul": _list_quantized,
    "sparse_matmul": lambda: itertools.chain(_list_sparse(), _list_blocked()),
}
"""Every API that has TPU kernels, and its cases."""
