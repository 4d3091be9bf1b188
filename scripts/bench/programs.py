"""What cases of one program share: operands that are drawn, and the compiled program as a runner."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.timing import Runner


def make_runner(name: str, function: Callable[..., Any], arguments: Sequence[Any], *, disturbs: bool = False) -> Runner:
    def build() -> Callable[[], object]:
        compiled = jax.jit(function).lower(*arguments).compile()
        return lambda: jax.block_until_ready(compiled(*arguments))

    return Runner(name=name, build=build, disturbs=disturbs)


def draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(2)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
