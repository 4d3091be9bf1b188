"""Chunked cross-entropy: the plain one's numbers, without the plain one's memory."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.sharding import MeshConfig, array_sharding, make_mesh, use_mesh
from hsai.train.loss import cross_entropy_sum

B, D, V = 3, 7, 50


def make_inputs(length: int, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """hidden, head, targets, and weights of which some are zero and some are no ones."""
    draw = np.random.default_rng(seed)
    hidden = draw.standard_normal((B, length, D)).astype(np.float32)
    head = draw.standard_normal((D, V)).astype(np.float32)
    weights = draw.choice([0.0, 0.5, 1.0], (B, length)).astype(np.float32)
    return hidden, head, draw.integers(0, V, (B, length), np.int32), weights


def plain(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """The definition."""
    chances = jax.nn.softmax(jnp.einsum("btd,dv->btv", hidden, head), axis=-1)
    return -jnp.sum(weights * jnp.log(jnp.take_along_axis(chances, targets[..., None], axis=-1)[..., 0]))


CHUNKED = jax.jit(jax.value_and_grad(cross_entropy_sum, (0, 1)), static_argnames="chunk")
PLAIN = jax.jit(jax.value_and_grad(plain, (0, 1)))


@pytest.mark.parametrize(("length", "chunk"), [(12, 4), (12, 5), (12, 1), (12, 12), (12, 50), (1, 3)])
def test_value_and_gradients_are_the_plain_ones(length: int, chunk: int) -> None:
    """Chunks that divide T, that do not, and that exceed it."""
    for seed in range(3):
        inputs = make_inputs(length, seed)
        wanted, (by_hidden, by_head) = PLAIN(*inputs)
        found, grads = CHUNKED(*inputs, chunk=chunk)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grads[0], by_hidden, rtol=0, atol=1e-5)
        np.testing.assert_allclose(grads[1], by_head, rtol=0, atol=1e-4)
        assert found.dtype == jnp.float32


def test_large_logits_do_not_overflow() -> None:
    hidden, head, targets, weights = make_inputs(4)
    found, grads = CHUNKED(1e4 * hidden, head, targets, weights, chunk=2)
    assert jnp.isfinite(found) and all(jnp.isfinite(grad).all() for grad in grads)


def test_bfloat16_activations_give_a_float32_head_gradient() -> None:
    """Products in bfloat16, sums over positions in float32: within 1 % of the exact gradient."""
    hidden, *others = make_inputs(12)
    wanted = PLAIN(hidden, *others)[1][1]
    found = CHUNKED(jnp.asarray(hidden, jnp.bfloat16), *others, chunk=4)[1][1]
    assert found.dtype == jnp.float32
    assert jnp.linalg.norm(found - wanted) < 0.01 * jnp.linalg.norm(wanted)


def shapes_in(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shape of every value in a program, those inside of its scans, checkpoints and calls included."""
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in [*equation.invars, *equation.outvars])
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def largest_with_vocabulary(chunk: int, length: int) -> int:
    """Positions of the largest array over the vocabulary in the program of the gradient."""
    grad = jax.grad(lambda *xs: cross_entropy_sum(*xs, chunk=chunk), (0, 1))
    shapes = list(shapes_in(jax.make_jaxpr(grad)(*make_inputs(length)).jaxpr))
    assert (D, V) in shapes
    return max(int(np.prod(shape)) // V for shape in shapes if V in shape and D not in shape)


@pytest.mark.parametrize("length", [32, 96])
def test_no_program_holds_the_logits_of_all_positions(length: int) -> None:
    assert largest_with_vocabulary(8, length) == B * 8
    assert largest_with_vocabulary(length, length) == B * length  # the search finds them where they are


def temporary_bytes(chunk: int, length: int) -> int:
    """Of the compiled gradient, beyond its arguments and results."""
    vocab, hidden = 4096, jax.ShapeDtypeStruct((2, length, D), jnp.float32)
    head, rows = jax.ShapeDtypeStruct((D, vocab), jnp.float32), (2, length)
    grad = jax.jit(jax.grad(lambda *xs: cross_entropy_sum(*xs, chunk=chunk), (0, 1)))
    program = grad.lower(
        hidden, head, jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.float32)
    ).compile()
    size: int = program.memory_analysis().temp_size_in_bytes
    return size


def test_memory_follows_the_chunk_and_not_the_text() -> None:
    logits_of_a_chunk = 2 * 32 * 4096 * 4
    small, longer, larger = temporary_bytes(32, 256), temporary_bytes(32, 2048), temporary_bytes(256, 2048)
    assert longer < small + logits_of_a_chunk < 8 * logits_of_a_chunk
    assert larger > 6 * small


def repeated(program: str) -> list[str]:
    """The lines of a compiled program that run once a turn of some loop, in the loop's body or in what it calls."""
    called: dict[str, set[str]] = {}
    lines: dict[str, list[str]] = {}
    for line in program.splitlines():
        if line.endswith("{") and (named := re.match(r"(?:ENTRY )?%?([\w.-]+) ", line)):
            name = named[1]
            lines[name], called[name] = [], set()
        elif line.startswith("  "):
            lines[name].append(line)
            called[name] |= set(re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", line))
    reached, found = list(set(re.findall(r"body=%?([\w.-]+)", program))), set[str]()
    while reached:
        if (name := reached.pop()) not in found:
            found.add(name)
            reached += called[name]
    return [line for name in found for line in lines[name]]


def test_the_head_is_collected_once_and_not_once_a_chunk() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    hidden, head, targets, weights = (np.tile(x, (8, 1, 1)[: x.ndim]) for x in make_inputs(24))
    hidden, head = np.tile(hidden, (1, 1, 8)), np.tile(head[:D], (8, 1))  # D = 56 divides over the devices
    axes = (("batch", "seq", "embed"), ("embed", "vocab"), ("batch", "seq"), ("batch", "seq"))
    with use_mesh(mesh):
        placed = [
            jax.device_put(x, array_sharding(mesh, names, x.shape))
            for x, names in zip((hidden, head, targets, weights), axes, strict=True)
        ]
        grad = jax.jit(jax.grad(lambda *xs: cross_entropy_sum(*xs, chunk=4), (0, 1)), out_shardings=None)
        text = grad.lower(*placed).compile().as_text()
    # Its gradient too is summed over chunks first where the compiler moves sums out of loops: on TPUs, not on CPUs.
    gather = re.compile(r"= (\S+) all-gather(?:-start)?\(")
    everywhere = [found[1] for line in text.splitlines() if (found := gather.search(line))]
    in_loops = [found[1] for line in repeated(text) if (found := gather.search(line))]
    assert any("[56,50]" in shape for shape in everywhere)
    assert [shape for shape in in_loops if "50" in shape] == []
