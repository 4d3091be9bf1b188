"""cross_entropy over a vocabulary that is split over devices, inside of jax.shard_map: every backend, gradients too."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import cross_entropy, cross_entropy_sum
from hsai_kernels.interpret import interpret_tpu
from hsai_kernels.ops.cross_entropy.shapes import CrossEntropyShape
from tests.kernels.test_cross_entropy import ask_oracle_for_sum, draw
from tests.kernels.tolerances import assert_close

pytestmark = [
    pytest.mark.usefixtures("no_races"),
    pytest.mark.skipif(jax.device_count() < 4, reason=f"needs 4 devices, here are {jax.device_count()}"),
]

P = jax.sharding.PartitionSpec
SHAPE = CrossEntropyShape(lead=(2,), tokens=9, embed=128, vocab=260)  # 65 words a device


def run_split(function: Any, operands: tuple[jax.Array, ...]) -> Any:
    """The summed losses of 4 devices, and gradients of x and w by vjp where the parts are."""

    def compute(x: jax.Array, w: jax.Array, targets: jax.Array, pull: jax.Array) -> Any:
        return jax.value_and_grad(lambda x, w: function(x, w, targets, pull), (0, 1))(x, w)

    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    split = P(None, "model")
    with jax.set_mesh(mesh):
        shard = jax.shard_map(compute, in_specs=(P(), split, P(), P()), out_specs=(P(), (P(), split)), check_vma=False)
        return jax.jit(shard)(*operands)


SOFT = {"softcap": 4.0, "z_loss": 0.1}
CASES: list[tuple[bool, str, dict[str, Any]]] = [
    *[
        (summed, name, options)
        for summed in (False, True)
        for name in ("reference", "chunked")
        for options in ({}, SOFT)
    ],
    (False, "tpu", SOFT),  # the interpreter is slow, and the sum is of the same kernels
]


@pytest.mark.parametrize(("summed", "implementation", "options"), CASES, ids=str)
def test_loss_and_gradients_are_those_of_a_whole_vocabulary(
    summed: bool, implementation: str, options: dict[str, Any]
) -> None:
    operands = draw(SHAPE, "float32")

    def lose(*operands: jax.Array, **place: Any) -> jax.Array:
        x, w, targets, pull = operands
        if summed:
            return cross_entropy_sum(x, w, targets, pull, chunk=4, **options, **place)
        return jnp.sum(pull * cross_entropy(x, w, targets, chunk=4, **options, **place))

    with interpret_tpu() if implementation == "tpu" else contextlib.nullcontext():
        found = run_split(functools.partial(lose, implementation=implementation, split=("model",)), operands)
    wanted = ask_oracle_for_sum(operands, **options)[:3]
    # Magnitudes bound what rounding could do to a sum of many terms; it does not come near that of the largest.
    for array, (expected, magnitude) in zip(jax.tree.leaves(found), wanted, strict=True):
        assert_close(array, expected, np.minimum(magnitude, 100.0), "float32")


def test_targets_count_over_the_whole_vocabulary() -> None:
    """260 words: 259 is one of them, though a device has 65; 260 is none."""
    x, w, targets, _ = draw(SHAPE, "float32")
    targets = targets.at[0, 0].set(259).at[1, 2].set(260)

    def lose(x: jax.Array, w: jax.Array, targets: jax.Array, _: jax.Array) -> jax.Array:
        return jnp.sum(jnp.isnan(cross_entropy(x, w, targets, split=("model",))).astype(jnp.float32))

    (count, _) = run_split(lose, (x, w, targets, targets))
    assert count == 1
