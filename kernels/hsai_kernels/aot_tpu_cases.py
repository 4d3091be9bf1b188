"""The programs that aot_tpu.py compiles: for every TPU kernel a few shapes, a ragged one among them, in each dtype.

Dimensions: B batch, T query, S key, N heads, K kv heads, H head dim.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from hsai_kernels.ops.attention.api import attention
from hsai_kernels.ops.attention.tpu_blocks import choose_blocks

DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program to compile, by the API with `implementation="tpu"`."""

    kernel: str
    name: str
    dtype: str
    """Of the activations."""
    function: Callable[..., Any]
    operands: tuple[Any, ...]
    """jax.ShapeDtypeStruct each."""
    tile: str
    """The blocks that the backend chose, for people."""
    quick: bool
    """Small and ragged: compiled by the tests for every chip."""


def list_cases(kernel: str, *, quick: bool) -> Iterator[Case]:
    """The cases of one of KERNELS: all, or the quick ones."""
    return (case for case in _LISTS[kernel]() if case.quick or not quick)


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
        blocks = choose_blocks(queries * heads // kv_heads, keys, head_dim, dtype)
        attend = functools.partial(_attend, options)
        passes: tuple[tuple[str, Callable[..., Any]], ...] = (
            ("attention forward", attend),
            ("attention backward", functools.partial(_pull_back, attend)),
        )
        for (kernel, function), (rows, columns) in zip(passes, blocks, strict=True):
            if queries == 1 and kernel == "attention backward":
                continue
            yield Case(
                kernel=kernel,
                name=name,
                dtype=dtype,
                function=function,
                operands=(q, k, k, *marks * (2 if segments else 1)),
                tile=f"{rows} rows x {columns} keys",
                quick=queries <= 64,
            )


def _attend(options: dict[str, Any], q: jax.Array, k: jax.Array, v: jax.Array, *marks: jax.Array) -> jax.Array:
    names = ("q_positions", "kv_positions", "q_segments", "kv_segments")
    given: dict[str, Any] = dict(zip(names, marks, strict=False))
    return attention(q, k, v, **given, **options, implementation="tpu")


def _pull_back(attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, *marks: jax.Array) -> Any:
    """The gradients of q, k and v for some gradient of the output; XLA keeps of the forward pass what they need."""
    out, pull = jax.vjp(lambda *operands: attend(*operands, *marks), q, k, v)
    return pull(out)


_LISTS: dict[str, Callable[[], Iterator[Case]]] = {"attention": _list_attention}
KERNELS = tuple(_LISTS)
"""Every API that has TPU kernels here."""
