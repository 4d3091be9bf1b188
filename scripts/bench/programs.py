"""What cases of one program share: operands that are drawn, and the compiled program as a runner."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.ceilings import find_cache_size
from bench.timing import Runner

MOST_READ = 64
"""Operands of one program that reads copies: XLA's compiler takes long for thousands, or ends the process."""


def make_runner(name: str, function: Callable[..., Any], arguments: Sequence[Any], *, disturbs: bool = False) -> Runner:
    def build() -> Callable[[], object]:
        compiled = jax.jit(function).lower(*arguments).compile()
        return lambda: jax.block_until_ready(compiled(*arguments))

    return Runner(name=name, build=build, disturbs=disturbs)


def make_reader(
    name: str, function: Callable[..., jax.Array], x: jax.Array, operands: Any, *, most: int = 0, disturbs: bool = False
) -> Runner:
    """function(x, operands), where reading `operands` takes the time: in copies that no cache holds, or in `most`.

    They are read in turn, by programs of MOST_READ at most, and each x waits for the result before it.
    """
    copies = most or count_copies(sum(leaf.nbytes for leaf in jax.tree.leaves(operands)))
    programs = -(-copies // MOST_READ)
    each = -(-copies // programs)  # of each program as many, so that there may be a few more

    def program(total: jax.Array, x: jax.Array, copied: Sequence[Any]) -> jax.Array:
        for operands in copied:
            total += 1e-30 * jnp.sum(function(x + total.astype(x.dtype), operands), dtype=jnp.float32)
        return total

    def build() -> Callable[[], object]:
        copied = [[jax.tree.map(lambda leaf: leaf.copy(), operands) for _ in range(each)] for _ in range(programs)]
        nothing = jnp.zeros((), jnp.float32)
        compiled = jax.jit(program).lower(nothing, x, copied[0]).compile()

        def run() -> jax.Array:
            total = nothing
            for held in copied:
                total = compiled(total, x, held)
            return total.block_until_ready()

        return run

    return Runner(name=name, build=build, times=programs * each, disturbs=disturbs)


def count_copies(size: int) -> int:
    """How many operands of `size` bytes fill the last-level cache twice."""
    return -(-2 * find_cache_size() // size)


def draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(2)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
