"""Functions that each device computes on its own part of the operands: the door to kernels on a mesh.

The compiler splits plain jax over a mesh by itself. A kernel (Pallas, FFI) it cannot split, and so it would run on all
of the operands on every device. `map_shards` says how the operands are cut, by their logical axes, and hands
each device's part to a function which then is a program for one device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from hsai.sharding import RULES, Axes

Splits = Mapping[str, tuple[str, ...]]
"""Logical axis -> the mesh axes that it is split over, outermost first; () for one that every device has whole."""


def mesh_sizes() -> dict[str, int]:
    """Size of each axis of the active mesh that the compiler splits over; those of a surrounding shard_map are none.

    Empty without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual}


def find_splits(*operands: tuple[Axes, Any]) -> Splits:
    """How the active mesh splits the logical axes of `operands`, each an array or a pytree of arrays with its axes.

    Names stand for one split each, as letters of an einsum stand for one size. An axis takes the mesh axes that `RULES`
    allow it and that no earlier one has taken, as far as each of its sizes divides by them: a packed weight has words,
    indices and scales of fewer rows than the contraction is long. A floating array with one row (the scale of a whole
    column) has no say, and stays whole.

    Raises ValueError for an axis that is not in `RULES`, one that an operand names twice, and a wrong number of axes.
    """
    for axes, _ in operands:
        named = [axis for axis in axes if axis is not None]
        if unknown := [axis for axis in named if axis not in RULES]:
            raise ValueError(f"unknown logical axis {unknown[0]!r} in {axes}; known: {', '.join(RULES)}")
        if len(set(named)) < len(named):
            raise ValueError(f"axes {axes} name one axis twice")
    if not (mesh := mesh_sizes()):
        return {axis: () for axes, _ in operands for axis in axes if axis is not None}
    sizes: dict[str, list[int]] = {}
    for axes, operand in operands:
        for leaf in jax.tree.leaves(operand):
            if len(axes) != leaf.ndim:
                raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {leaf.shape}")
            for axis, size in zip(axes, leaf.shape, strict=True):
                if axis is not None:
                    voices = sizes.setdefault(axis, [])
                    if size > 1 or not jnp.issubdtype(leaf.dtype, jnp.floating):
                        voices.append(size)
    used: set[str] = set()
    splits = {}
    for axis, voices in sizes.items():
        taken: list[str] = []
        for name in RULES[axis]:
            parts = math.prod(mesh[other] for other in taken) * mesh.get(name, 1)
            if (
                name in mesh
                and name not in used
                and mesh[name] > 1
                and all(size % parts == 0 for size in voices or [1])
            ):
                taken.append(name)
        used.update(taken)
        splits[axis] = tuple(taken)
    return splits


def count_parts(names: Sequence[str]) -> int:
    """How many devices the mesh axes `names` are."""
    mesh = mesh_sizes()
    return math.prod(mesh[name] for name in names)


def map_shards(
    function: Callable[..., Any], splits: Splits, in_axes: Sequence[Axes], out_axes: Any
) -> Callable[..., Any]:
    """`function`, computed by every device of the active mesh on its part; itself where there is no such mesh.

    What the function returns must be the whole result of a device's part: where it sums over an axis that is split, it
    adds the parts of the sum with `add_parts`. Reverse-mode gradients are those of the whole: jax's transposition adds
    the gradients of an operand over devices that have the same part of it, and takes those of a result which several
    devices computed alike for one.

    Args:
      function: of as many operands as there are `in_axes`, each an array, a pytree of arrays, or None.
      splits: of every axis that is split, by `find_splits` of these operands.
      in_axes: logical axes of each operand; those of a pytree are the same for all of its leaves.
      out_axes: logical axes of the result, or a tuple of them for a tuple of results.
    Returns: a function of whole operands, whose result is whole.
    """
    mesh = mesh_sizes()
    if all(size == 1 for size in mesh.values()):
        return function

    # Named somewhere, for jax adds up gradients over every mesh axis that is not, be it of one device.
    single = tuple(name for name, size in mesh.items() if size == 1)

    def lay(axes: Axes, shape: Sequence[int | None]) -> PartitionSpec:
        named = zip(axes, shape, strict=True)
        entries = [() if size == 1 else splits.get(axis or "", ()) for axis, size in named]
        return PartitionSpec(*(entry + (single if place == 0 else ()) or None for place, entry in enumerate(entries)))

    def call(*operands: Any) -> Any:
        leaves, structure = jax.tree.flatten(operands)
        in_specs = tuple(
            lay(axes, leaf.shape)
            for axes, operand in zip(in_axes, operands, strict=True)
            for leaf in jax.tree.leaves(operand)
        )
        several = bool(out_axes) and isinstance(out_axes[0], tuple)
        out_specs = tuple(lay(axes, [None] * len(axes)) for axes in (out_axes if several else [out_axes]))
        # Kernels do not tell jax along which axes their results vary, as its check would need.
        shard = jax.shard_map(
            lambda *leaves: function(*jax.tree.unflatten(structure, leaves)),
            in_specs=in_specs,
            out_specs=out_specs if several else out_specs[0],
            axis_names=set(mesh),
            check_vma=False,
        )
        return shard(*leaves)

    return call


def add_parts(x: jax.Array, names: Sequence[str]) -> jax.Array:
    """The sum over the devices of the mesh axes `names`, made and returned in float32; x itself where there are none.

    For functions inside of `map_shards`.
    """
    return jax.lax.psum(x.astype(jnp.float32), tuple(names)) if names else x
