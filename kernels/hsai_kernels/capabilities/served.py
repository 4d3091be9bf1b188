"""Which calls a platform has a kernel for, and why it has none for others: asked of the kernels, of which none runs.

B batch, T query, S key, N heads, K kv heads, H head dim; D contraction, F outputs, g positions that share a scale.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from hsai_kernels.dispatch import ORDER, BackendMissing, compile_for
from hsai_kernels.ops.attention.api import BACKENDS as ATTENTION
from hsai_kernels.ops.attention.api import attention
from hsai_kernels.ops.cross_entropy.api import BACKENDS as CROSS_ENTROPY
from hsai_kernels.ops.cross_entropy.api import SUM_BACKENDS, cross_entropy, cross_entropy_sum
from hsai_kernels.ops.gated_mlp.api import BACKENDS as GATED_MLP
from hsai_kernels.ops.gated_mlp.api import gated_mlp
from hsai_kernels.ops.norm_matmul.api import BACKENDS as NORM_MATMUL
from hsai_kernels.ops.norm_matmul.api import norm_matmul
from hsai_kernels.ops.paged_attention.api import BACKENDS as PAGED_ATTENTION
from hsai_kernels.ops.paged_attention.api import paged_attention
from hsai_kernels.ops.quantized_matmul.api import BACKENDS as QUANTIZED_MATMUL
from hsai_kernels.ops.quantized_matmul.api import quantized_matmul
from hsai_kernels.ops.rope.api import BACKENDS as ROPE
from hsai_kernels.ops.rope.api import rope
from hsai_kernels.ops.sparse_matmul.api import BACKENDS as SPARSE_MATMUL
from hsai_kernels.ops.sparse_matmul.api import sparse_matmul

PLATFORMS = tuple(ORDER)
DTYPE = "bfloat16"
"""Of activations: every kernel has it."""
D, F, GROUP = 256, 64, 64
ROUNDED = "activations rounded to int8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A kind of call of one API, by an example of it."""

    name: str
    backends: Mapping[str, Any]
    function: Callable[..., jax.Array]
    """Of the operands and `implementation`."""
    operands: Mapping[str, jax.ShapeDtypeStruct]


def explain_missing(call: Call, platform: str) -> str | None:
    """Why the platform has no kernel for such a call; None if it has one, though the native ones may not be built."""
    if platform not in call.backends:
        return "there is none"
    function = functools.partial(call.function, implementation=platform)
    with compile_for(platform):
        try:
            jax.eval_shape(lambda operands: function(**operands), dict(call.operands))
        except BackendMissing:
            return None
        except NotImplementedError as error:
            return str(error)
    return None


def list_calls() -> list[Call]:
    """Every API, and every kind of format that it takes: of N:8 and V:N:M patterns one each."""
    return [*_list_attention(), *_list_layers(), *_list_quantized(), *_list_sparse()]


def render_served() -> str:
    """A table: one row a call, one column a platform; the reasons under it."""
    lines = [f"| call | {' | '.join(PLATFORMS)} |", f"|---|{':-:|' * len(PLATFORMS)}"]
    reasons = []
    for call in list_calls():
        missing = {platform: explain_missing(call, platform) for platform in PLATFORMS}
        lines.append(f"| {call.name} | {' | '.join('kernel' if why is None else 'no' for why in missing.values())} |")
        for reason in dict.fromkeys(filter(None, missing.values())):
            named = [platform for platform in call.backends if missing.get(platform) == reason]
            reasons += [f"- {call.name}, {' and '.join(sorted(named))}: {reason}"] if named else []
    return "\n".join([*lines, "", "Where an API has kernels that do not serve a call, they say:", "", *reasons]) + "\n"


def _shape(dtype: str, *dimensions: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dimensions, dtype)


def _list_attention() -> list[Call]:
    calls = []
    for held, dtype, width, scale in (
        ("", DTYPE, 128, None),
        (", int8 cache", "int8", 128, _shape("float32", 2, 64, 2)),
        (", int4 cache", "uint8", 64, _shape("bfloat16", 2, 64, 2, 2)),
    ):
        cache = {"k": _shape(dtype, 2, 64, 2, width), "v": _shape(dtype, 2, 64, 2, width)}
        if scale is not None:
            cache |= {"k_scale": scale, "v_scale": scale}
        queries = {"q": _shape(DTYPE, 2, 1, 4, 128), "q_positions": _shape("int32", 2, 1)}
        rows = {**queries, **cache, "kv_positions": _shape("int32", 2, 64)}
        calls.append(Call(name=f"attention{held}", backends=ATTENTION, function=attention, operands=rows))
        # A layer, whose pages are what rows are above.
        pages = {name: jax.ShapeDtypeStruct((1, *array.shape), array.dtype) for name, array in cache.items()}
        pages |= {**queries, "layer": _shape("int32"), "table": _shape("int32", 2, 1)}
        name = f"paged_attention{held}"
        calls.append(Call(name=name, backends=PAGED_ATTENTION, function=paged_attention, operands=pages))
    return sorted(calls, key=lambda call: call.name.split(",")[0])


def _list_layers() -> list[Call]:
    x, w = _shape(DTYPE, 4, D), _shape(DTYPE, D, F)
    loss = {"x": x, "w": w, "targets": _shape("int32", 4)}
    angles = _shape("float32", 4, 1, 32)
    return [
        Call(name="cross_entropy", backends=CROSS_ENTROPY, function=cross_entropy, operands=loss),
        Call(
            name="cross_entropy_sum",
            backends=SUM_BACKENDS,
            function=cross_entropy_sum,
            operands={**loss, "weights": _shape("float32", 4)},
        ),
        Call(
            name="gated_mlp",
            backends=GATED_MLP,
            function=gated_mlp,
            operands={"x": x, "gate": w, "up": w, "down": _shape(DTYPE, F, D)},
        ),
        Call(
            name="norm_matmul",
            backends=NORM_MATMUL,
            function=functools.partial(norm_matmul, eps=1e-5),
            operands={"x": x, "gain": _shape("float32", D), "w": w},
        ),
        Call(
            name="rope",
            backends=ROPE,
            function=rope,
            operands={"x": _shape(DTYPE, 4, 2, 64), "cos": angles, "sin": angles},
        ),
    ]


def _list_quantized() -> list[Call]:
    x, scale = _shape(DTYPE, 1, D), _shape("bfloat16", D // GROUP, F)
    calls = []
    kinds: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("int8", 8, {}),
        ("int4", 4, {}),
        ("int4 from a minimum", 4, {}),
        ("int4, centered", 4, {"centered": True}),
        ("int3", 3, {}),
        ("int3, centered", 3, {"centered": True}),
        ("int2 (ternary)", 2, {}),
        ("int2, centered", 2, {"centered": True}),
    )
    for (name, bits, options), activation_bits in itertools.product(kinds, (None, 8)):
        values = _shape("int8", D, F) if bits == 8 else _shape("uint32", D * bits // 32, F)
        operands = {"x": x, "values": values, "scale": scale}
        if "minimum" in name:
            operands["minimum"] = scale
        calls.append(
            Call(
                name=f"quantized_matmul {name}" + ("" if activation_bits is None else f", {ROUNDED}"),
                backends=QUANTIZED_MATMUL,
                function=functools.partial(quantized_matmul, bits=bits, activation_bits=activation_bits, **options),
                operands=operands,
            )
        )
    return calls


def _list_sparse() -> list[Call]:
    calls = []
    patterns = (("1:4", 1, 4, 2), ("2:4", 2, 4, 2), ("3:4", 3, 4, 2), ("4:8", 4, 8, 3), ("V:2:8", 2, 8, 2))
    for pattern, n, m, bits in patterns:
        kept = D * n // m
        weight = {"indices": _shape("uint32", kept * bits // 32, F)}
        if pattern.startswith("V"):
            weight["choices"] = _shape("uint32", D // 32, 1)
        scale = _shape("bfloat16", D // GROUP, F)
        kinds: tuple[tuple[str, int, jax.ShapeDtypeStruct, dict[str, Any]], ...] = (
            ("bfloat16", 1, _shape("bfloat16", kept, F), {}),
            ("bfloat16, many rows", 64, _shape("bfloat16", kept, F), {}),
            ("int8", 1, _shape("int8", kept, F), {}),
            ("int4", 1, _shape("uint32", kept // 8, F), {}),
            (f"int4, {ROUNDED}", 1, _shape("uint32", kept // 8, F), {"activation_bits": 8}),
        )
        for kind, rows, values, options in kinds:
            if rows > 1 and m != 4:
                continue  # refused, if for no other reason, for its format
            operands = {"x": _shape(DTYPE, rows, D), "values": values, **weight}
            if not kind.startswith("bfloat16"):
                operands["scale"] = scale
            calls.append(
                Call(
                    name=f"sparse_matmul {pattern} {kind}",
                    backends=SPARSE_MATMUL,
                    function=functools.partial(sparse_matmul, n=n, m=m, **options),
                    operands=operands,
                )
            )
    return calls
